"""The main job, end to end: precompute, train, evaluate, and what each leaves behind."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dpocli.commands import evaluate
from dpocli.config.flags import build_options
from dpocli.distributed.processes import Processes
from dpocli.evaluation.pair_table import ScoredPairs
from tests.commands.conftest import HELD_OUT, MODEL, TRAIN, Run, metrics_of, pictures, quiet

SETTINGS = ("--learning-rate", "5e-4", "--batch-size", "8", "--max-steps", "6", "--save-every", "2")


@pytest.fixture(scope="module")
def trained(cache: Path, held_out_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "run"
    with pictures():
        quiet(
            "train", "--model", MODEL, "--reference", cache, "--eval-reference", held_out_cache, "--out", out, *SETTINGS,
            "--eval-every", 3, "--beta", 0.3,
        )  # fmt: skip
    return out


def test_a_run_leaves_what_the_contract_lists(trained: Path) -> None:
    assert {"config.yaml", "model", "checkpoints", "metrics.jsonl", "curves.png", "summary.json", "status.json"} <= {
        path.name for path in trained.iterdir()
    }
    assert sorted(path.name for path in (trained / "checkpoints").iterdir()) == ["step-4", "step-6"]
    status = json.loads((trained / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 6)
    rows = metrics_of(trained)
    assert [row["step"] for row in rows] == list(range(7))
    assert [row["step"] for row in rows if "eval/loss" in row] == [0, 3, 6]
    names = "loss rewards/chosen rewards/rejected rewards/accuracies rewards/margins logps/chosen logps/rejected"
    assert {*names.split(), "grad_norm", "learning_rate"} <= set(rows[1])


def test_the_first_loss_is_ln_2_and_training_lowers_it(trained: Path) -> None:
    rows = metrics_of(trained)
    assert rows[0]["eval/loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[1]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[-1]["eval/loss"] < rows[0]["eval/loss"] - 0.005
    assert rows[-1]["eval/rewards/margins"] > 0


def test_the_saved_model_loads_generates_and_knows_its_loss(trained: Path) -> None:
    model, report = AutoModelForCausalLM.from_pretrained(trained / "model", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(trained / "model")
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(MODEL)
    assert model.dtype == original.dtype
    assert not torch.equal(model.get_input_embeddings().weight, original.get_input_embeddings().weight)
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello?"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]
    provenance = json.loads((trained / "model" / "dpocli.json").read_text())
    assert provenance["loss"] == {"name": "dpo", "beta": 0.3, "hyperparameters": {"label_smoothing": 0.0}}


def test_evaluate_takes_the_models_loss_and_agrees_with_training(
    trained: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "report"
    result = dpocli("evaluate", "--model", trained / "model", "--reference", held_out_cache, "--out", out, "--json")
    assert result.code == 0, result.err
    report, last = result.json, metrics_of(trained)[-1]
    assert report["loss_choice"]["beta"] == 0.3
    for name in ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "logps/rejected"):
        assert report[name] == pytest.approx(last[f"eval/{name}"], rel=1e-4, abs=1e-4), name
    assert json.loads((out / "metrics.json").read_text()) == report
    pairs = pq.read_table(out / "pairs.parquet")
    assert pairs.num_rows == report["pairs"] == 24
    margins = np.array(pairs["margins"])
    assert report["rewards/accuracies"] == pytest.approx((margins > 0).mean())
    assert report["rewards/margins_quantiles"]["0.5"] == pytest.approx(np.median(margins))
    assert sum(entry["pairs"] for entry in report["by_source"].values()) == 24


def test_evaluate_keeps_one_piece_a_window_and_windows_change_nothing(
    held_out_cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered: list[int] = []

    def gather(processes: Processes, parts: list[ScoredPairs]) -> list[ScoredPairs]:
        if isinstance(parts[0], ScoredPairs):
            gathered.append(len(parts))
        return parts

    monkeypatch.setattr(Processes, "gather", gather)
    tables = []
    for window in (4096, 5):
        monkeypatch.setattr(evaluate, "PAIRS_AT_ONCE", window)
        out = tmp_path / str(window)
        line = ("evaluate", "--model", MODEL, "--reference", held_out_cache, "--out", out, "--token-budget", 16)
        assert dpocli(*line).code == 0
        tables.append(pq.read_table(out / "pairs.parquet"))
    assert gathered == [1, 5]
    assert tables[0] == tables[1]


def test_the_reference_itself_ties_on_every_pair(held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    # One pair at a time on both sides, so that even the last digit is the same.
    result = dpocli(
        "evaluate", "--model", MODEL, "--reference", held_out_cache, "--out", tmp_path / "r", "--json"
    )  # fmt: skip
    assert result.code == 0, result.err
    assert abs(result.json["rewards/margins"]) < 1e-5
    assert result.json["loss"] == pytest.approx(np.log(2), abs=1e-6)


def test_the_config_that_a_run_writes_reproduces_it(trained: Path, tmp_path: Path, dpocli: Run) -> None:
    again = tmp_path / "again"
    result = dpocli("train", "--config", trained / "config.yaml", "--out", again)
    assert result.code == 0, result.err
    assert metrics_of(again) == metrics_of(trained)
    first, second = (path / "model" / "model.safetensors" for path in (trained, again))
    assert first.read_bytes() == second.read_bytes()


def test_the_same_line_on_a_finished_run_has_nothing_to_do(
    trained: Path, cache: Path, held_out_cache: Path, dpocli: Run
) -> None:
    line = (
        "train", "--model", MODEL, "--reference", cache, "--eval-reference", held_out_cache, "--out", trained, *SETTINGS,
        "--eval-every", 3, "--beta",
    )  # fmt: skip
    weights = (trained / "model" / "model.safetensors").stat().st_mtime_ns
    result = dpocli(*line, 0.3)
    assert (result.code, "nothing to do" in result.out) == (0, True), result.err
    assert (trained / "model" / "model.safetensors").stat().st_mtime_ns == weights
    other = dpocli(*line, 0.2)
    assert other.code == 2
    assert "loss: dpo(beta=0.3, label_smoothing=0) -> dpo(beta=0.2, label_smoothing=0)" in other.err


def test_micro_batches_do_not_change_the_run(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    losses = []
    for budget in (16, 700, 100_000):
        out = tmp_path / str(budget)
        result = dpocli(
            "train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS, "--max-steps", 3,
            "--token-budget", budget,
        )  # fmt: skip
        assert result.code == 0, result.err
        losses.append([(row["loss"], row["grad_norm"]) for row in metrics_of(out)])
    for other in losses[1:]:
        np.testing.assert_allclose(other, losses[0], rtol=1e-4)


def test_reference_free_training_from_raw_rows_equals_training_from_a_cache(
    cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    raw, cached = tmp_path / "raw", tmp_path / "cached"
    settings = (*SETTINGS, "--max-steps", 3, "--loss", "simpo", "--gamma", 0.5)
    first = dpocli("train", "--model", MODEL, "--data", TRAIN, "--limit", 40, "--out", raw, *settings)
    second = dpocli("train", "--model", MODEL, "--reference", cache, "--out", cached, *settings)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    beside = [{k: v for k, v in row.items() if not k.startswith("logratios/")} for row in metrics_of(cached)]
    assert metrics_of(raw) == beside  # a cache knows the reference, though the loss does not look at it
    report = dpocli(
        "evaluate", "--model", raw / "model", "--data", HELD_OUT, "--limit", 8, "--out", tmp_path / "e", "--json"
    )
    assert report.code == 0, report.err
    assert report.json["loss_choice"]["name"] == "simpo"


def test_a_held_out_fraction_shares_no_prompt_with_training(cache: Path, tmp_path: Path) -> None:
    from dpocli.cache.reader import PairStore
    from dpocli.commands.train_setup import split_pairs
    from dpocli.config.commands import TrainOptions

    store = PairStore.open(cache)
    options = build_options(TrainOptions, model=str(MODEL), out=tmp_path, reference=cache, eval_fraction=0.3)
    training, held_out = split_pairs(options.held_out, store, None)
    assert held_out is not None
    assert len(training) + len(held_out) == len(store) == 40
    prompts = [{pair.prompt_ids.tobytes() for pair in view.load(np.arange(len(view)))} for view in (training, held_out)]
    assert prompts[0]
    assert prompts[1]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize(
    "loss",
    [
        "dpo_norm",
        "wpo",
        *(
            pytest.param(loss, marks=pytest.mark.slow)
            for loss in ("dpo", "dpo_reference_free", "hinge", "ipo", "simpo")
        ),
    ],
)
def test_every_loss_trains_from_one_cache(loss: str, cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    result = dpocli(
        "train", "--model", MODEL, "--reference", cache, "--out", out, "--loss", loss, "--learning-rate", "1e-3",
        "--batch-size", 20, "--epochs", 3, shorten=False,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert (out / "checkpoints" / "step-5").is_dir(), "a tenth of 6 steps is one"
    rows = metrics_of(out)
    assert rows[-1]["loss"] < rows[0]["loss"]


def test_bfloat16_trains_and_the_step0_check_holds(tmp_path: Path, dpocli: Run) -> None:
    ref, out = tmp_path / "ref", tmp_path / "run"
    first = dpocli("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 20, "--out", ref, "--dtype", "bfloat16")
    second = dpocli("train", "--model", MODEL, "--reference", ref, "--out", out, *SETTINGS)
    assert (first.code, second.code) == (0, 0), first.err + second.err
    assert "bfloat16" in second.err  # taken from the cache
    assert "Step-0 check" in second.err


def test_a_failed_step0_check_stops_before_the_first_step(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    result = dpocli(
        "train", "--model", MODEL, "--reference", cache, "--out", out, "--scoring", "padded", "--step0-tolerance", 1e-12
    )
    assert result.code == 5
    assert "Step-0 check" in result.err
    assert not (out / "checkpoints").exists()
    assert json.loads((out / "status.json").read_text())["exit_code"] == 5


def test_a_run_that_diverges_stops_with_the_pairs_and_keeps_its_checkpoint(
    cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "run"
    result = dpocli(
        "train", "--model", MODEL, "--reference", cache, "--out", out, "--learning-rate", "1e30", "--batch-size", 8,
        "--max-steps", 5, "--save-every", 1, "--max-grad-norm", 0,
    )  # fmt: skip
    assert result.code == 5, result.err
    assert "Step 2" in result.err
    assert not (out / "model").exists()
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-1"]
    assert json.loads((out / "status.json").read_text())["state"] == "failed"
