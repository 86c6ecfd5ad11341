"""Losses of a whole batch, with a memory, and in sums, through the commands: what is cut and who computes changes nothing."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from dpocli.commands import evaluate
from dpocli.config.loss_expression import LossChoice
from dpocli.run.directory import RunDirectory
from dpocli.scoring import passes
from dpocli.training.trainer import StepOutcome, Trainer
from tests.commands.conftest import HELD_OUT, MODEL, TRAIN, Run, metrics_of, moments_of, quiet
from tests.commands.ranks import ended

ALL_OF_THEM = "aot+aot_unpaired+beta_dpo(beta_dpo_alpha=0.1)+2*bco_pair(beta=0.1)+sft"
MIXTURE = "0.8*dpo+0.2*bco_pair(beta=0.1)+sft"
REMEMBERING = "beta_dpo(beta=0.2)+bco_pair(beta=0.4)"
# 40 pairs in batches of 9: the fifth batch holds 4, and the sixth begins a new epoch.
STEPS = ("--batch-size", 9, "--max-steps", 6, "--learning-rate", "3e-4", "--save-every", 6)
SIZES = [9, 9, 9, 9, 4, 9]
ONE_PASS, TWO_PASSES, MANY_PASSES = ("--token-budget", 4096), ("--token-budget", 450), ("--token-budget", 180)


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model, shaken. Where the policy is the reference, every loss of a batch has the same gradient."""
    directory = tmp_path_factory.mktemp("model") / "other"
    shutil.copytree(MODEL, directory)
    generator = torch.Generator().manual_seed(0)
    weights = load_file(directory / "model.safetensors")
    for name, weight in weights.items():
        if weight.dim() > 1:
            weights[name] = weight + 0.15 * weight.std() * torch.randn(weight.shape, generator=generator)
    save_file(weights, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.fixture(scope="module")
def far(other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training pairs with the log-probs of the other model."""
    out = tmp_path_factory.mktemp("far") / "ref"
    quiet("precompute", "--model", other_model, "--data", TRAIN, "--limit", 40, "--out", out)
    return out


@pytest.fixture(scope="module")
def far_held_out(other_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 held-out pairs with the same."""
    out = tmp_path_factory.mktemp("far") / "ref-heldout"
    quiet("precompute", "--model", other_model, "--data", HELD_OUT, "--limit", 12, "--out", out)
    return out


@pytest.fixture(scope="module")
def weighted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pairs, of which the third is the first with a weight other than 1."""
    directory = tmp_path_factory.mktemp("weighted")
    rows = [json.loads(line) for line in TRAIN.read_text().splitlines()[:20]]
    for index, row in enumerate(rows):
        row["weight"] = 1.0 if index < 2 else [0.0, 0.5, 2.0][index % 3]
    (directory / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    quiet("precompute", "--model", MODEL, "--data", directory / "rows.jsonl", "--out", directory / "ref")
    return directory / "ref"


def line_of(far: Path, far_held_out: Path, *settings: object) -> tuple[object, ...]:
    held_out = ("--eval-reference", far_held_out, "--eval-every", 3)
    return ("train", "--model", MODEL, "--reference", far, *held_out, *STEPS, *settings)


def provenance_of(run: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((run / "model" / "dpocli.json").read_text())
    return value


def gradients_of(run: Path) -> dict[str, torch.Tensor]:
    """AdamW's first moment after the last step: a sum over the gradients of all steps."""
    moments = moments_of(max((run / "checkpoints").iterdir()))
    return {name: moment for name, moment in moments.items() if name.endswith("exp_avg")}


def assert_same_run(found: Path, expected: Path) -> None:
    """Equal to the rounding of float32, over all steps: metrics, gradients, and what the losses remember."""
    rows, expected_rows = metrics_of(found), metrics_of(expected)
    assert [row.keys() for row in rows] == [row.keys() for row in expected_rows]
    for row, expected_row in zip(rows, expected_rows, strict=True):
        for name, value in expected_row.items():
            # What is a difference of log-probs has their rounding.
            slack = 5e-5 if "rewards" in name or "log" in name else 0.0
            assert row[name] == pytest.approx(value, rel=5e-5, abs=slack), name
    gradients, expected_gradients = gradients_of(found), gradients_of(expected)
    scale = max(float(gradient.abs().max()) for gradient in expected_gradients.values())
    for name, gradient in expected_gradients.items():
        np.testing.assert_allclose(gradients[name], gradient, rtol=1e-3, atol=1e-4 * scale, err_msg=name)
    states, expected_states = (provenance_of(run)["loss_states"] for run in (found, expected))
    assert states.keys() == expected_states.keys()
    for name, state in expected_states.items():
        assert states[name] == pytest.approx(state, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    "loss", [MIXTURE, *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("aot", "beta_dpo"))]
)
def test_micro_batches_change_nothing(
    loss: str, far: Path, far_held_out: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = {}
    for name, budget in (("one", ONE_PASS), ("many", MANY_PASSES)):
        result = dpocli(*line_of(far, far_held_out, "--loss", loss, *budget), "--out", tmp_path / name)
        assert result.code == 0, result.err
        said[name] = " ".join(result.err.split())
    assert "no extra cost" in said["one"]
    assert "micro-batches 1.0 a step" in said["one"]
    assert "each is scored twice a step" in said["many"]
    assert float(said["many"].partition("micro-batches ")[2].split()[0]) >= 3.5
    assert_same_run(tmp_path / "many", tmp_path / "one")
    # Each micro-batch taken for a batch: what could not be told apart from that would prove nothing.
    monkeypatch.setattr(LossChoice, "is_whole_batch", property(lambda _: False))
    wrong = dpocli(*line_of(far, far_held_out, "--loss", loss, *TWO_PASSES), "--out", tmp_path / "wrong")
    assert wrong.code == 0, wrong.err
    with pytest.raises(AssertionError, match=r"grad_norm|loss"):
        assert_same_run(tmp_path / "wrong", tmp_path / "one")


@pytest.mark.parametrize(
    "settings",
    [
        # The last batch of an epoch holds one pair, so that one process has none.
        pytest.param(("--loss", ALL_OF_THEM, "--batch-size", 13, *MANY_PASSES), id="a process without pairs"),
        pytest.param(("--loss", MIXTURE, *ONE_PASS), id="one micro-batch each", marks=pytest.mark.slow),
    ],
)
def test_processes_change_nothing(
    settings: tuple[object, ...], far: Path, far_held_out: Path, tmp_path: Path, dpocli: Run
) -> None:
    line = line_of(far, far_held_out, *settings)
    one = dpocli(*line, *ONE_PASS, "--out", tmp_path / "one")
    assert one.code == 0, one.err
    codes, said = ended(2, *line, "--out", tmp_path / "two")
    assert codes == [0, 0], said
    assert "no extra cost" in one.err
    assert "each is scored twice a step" in " ".join(said.split())
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_losses_that_depend_on_one_pair_are_scored_once(far: Path, tmp_path: Path, dpocli: Run) -> None:
    line = ("train", "--model", MODEL, "--reference", far, *STEPS, *TWO_PASSES, "--max-steps", 1, "--loss")
    result = dpocli(*line, "dpo+0.1*bco_pair(delta=none)+sft", "--out", tmp_path / "run")
    assert result.code == 0, result.err
    assert "whole batch" not in result.err
    assert "scored twice" not in result.err


@pytest.fixture(scope="module")
def remembering(far: Path, far_held_out: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with both losses that have a memory."""
    out = tmp_path_factory.mktemp("remembering") / "run"
    quiet(*line_of(far, far_held_out, "--loss", REMEMBERING, *TWO_PASSES, "--save-every", 2), "--out", out)
    return out


def test_the_memory_is_what_the_metrics_say(remembering: Path) -> None:
    """Every pair counts alike in bco_pair's, every batch in beta_dpo's."""
    rows = metrics_of(remembering)[1:]
    assert len(rows) == len(SIZES)
    usual = seen = total = 0.0
    for row, size in zip(rows, SIZES, strict=True):
        usual = 0.9 * usual + 0.1 * row["logratios/margins"]
        seen += size
        total += size * 0.4 * (row["logratios/chosen"] + row["logratios/rejected"]) / 2
        assert row["rewards/margins"] == pytest.approx(0.2 * row["logratios/margins"])  # of the first term
    states = provenance_of(remembering)["loss_states"]
    assert states["beta_dpo"] == pytest.approx({"mean": usual})
    assert states["bco_pair"] == pytest.approx({"pairs": seen, "mean": total / seen})
    checkpoint = json.loads((remembering / "checkpoints" / "step-6" / "state.json").read_text())
    assert checkpoint["loss_states"] == states


def test_evaluate_goes_by_what_training_remembers(
    remembering: Path, far_held_out: Path, tmp_path: Path, dpocli: Run
) -> None:
    line = ("evaluate", "--reference", far_held_out, "--json", "--model")
    report = dpocli(*line, remembering / "model", "--out", tmp_path / "report")
    assert report.code == 0, report.err
    last = metrics_of(remembering)[-1]
    for name in ("loss", "rewards/margins", "rewards/chosen", "logratios/margins", "logps/rejected"):
        assert report.json[name] == pytest.approx(last[f"eval/{name}"], rel=1e-5, abs=1e-5), name
    # Alone, each of them goes by it too.
    each = dpocli(*line, remembering / "model", "--loss", "beta_dpo,bco_pair", "--out", tmp_path / "each")
    assert each.code == 0, each.err
    for name in ("beta_dpo", "bco_pair"):
        assert each.json["by_loss"][name]["loss"] == pytest.approx(last[f"eval/loss/{name}"], rel=1e-5), name
    forgetful = tmp_path / "forgetful"
    shutil.copytree(remembering / "model", forgetful)
    provenance = provenance_of(remembering)
    (forgetful / "dpocli.json").write_text(json.dumps(provenance | {"loss_states": {}}))
    other = dpocli(*line, forgetful, "--out", tmp_path / "other")
    assert other.json["loss"] != pytest.approx(report.json["loss"], rel=1e-5)
    # With another beta, rewards are on another scale than what is remembered.
    rescaled = [
        dpocli(*line, model, "--loss", "bco_pair", "--beta", 4, "--out", tmp_path / f"rescaled-{model.name}")
        for model in (remembering / "model", forgetful)
    ]
    assert rescaled[0].json["loss"] == rescaled[1].json["loss"]


def stop_after(rows: int, patch: pytest.MonkeyPatch) -> None:
    """As if somebody touched OUT/stop once there are so many rows of metrics."""

    def requested(out: RunDirectory) -> bool:
        path = out.path / "metrics.jsonl"
        return path.exists() and len(path.read_text().splitlines()) >= rows

    patch.setattr(RunDirectory, "stop_requested", requested)


def break_in(step: int, patch: pytest.MonkeyPatch) -> None:
    """As if the machine went down in a step."""
    whole = Trainer.step

    def broken(trainer: Trainer, number: int) -> StepOutcome:
        if number == step:
            raise RuntimeError("the machine goes down")
        return whole(trainer, number)

    patch.setattr(Trainer, "step", broken)


def test_a_run_goes_on_with_the_same_bits(
    remembering: Path, far: Path, far_held_out: Path, tmp_path: Path, dpocli: Run
) -> None:
    line, undisturbed = line_of(far, far_held_out, "--loss", REMEMBERING, *TWO_PASSES, "--save-every", 2), remembering
    for how, last in (("stopped", 3), ("broken", 2)):
        disturbed = tmp_path / how
        with pytest.MonkeyPatch.context() as patch:
            if how == "stopped":
                stop_after(4, patch)  # steps 0 to 3: a checkpoint is written where otherwise none is
            else:
                break_in(4, patch)  # after step 3, which no checkpoint holds
            first = dpocli(*line, "--out", disturbed)
        assert first.code == 75 if how == "stopped" else first.code not in (0, 75), first.err
        assert [row["step"] for row in metrics_of(disturbed)] == [0, 1, 2, 3]
        assert not (disturbed / "model").exists()
        second = dpocli(*line, "--out", disturbed)
        assert second.code == 0, second.err
        assert f"Resuming after step {last} of 6" in second.err
        assert metrics_of(disturbed) == metrics_of(undisturbed)
        for file in ("dpocli.json", "model.safetensors"):
            assert (disturbed / "model" / file).read_bytes() == (undisturbed / "model" / file).read_bytes()
        checkpoints = [run / "checkpoints" / "step-6" / "state.json" for run in (disturbed, undisturbed)]
        states = [json.loads(path.read_text())["loss_states"] for path in checkpoints]
        assert states[0] == states[1]
        assert states[0].keys() == {"beta_dpo", "bco_pair"}


def test_a_run_that_forgot_what_its_loss_knew_is_told_apart(
    remembering: Path, far: Path, far_held_out: Path, tmp_path: Path, dpocli: Run
) -> None:
    line = line_of(far, far_held_out, "--loss", REMEMBERING, *TWO_PASSES, "--save-every", 2)
    with pytest.MonkeyPatch.context() as patch:
        break_in(4, patch)
        dpocli(*line, "--out", tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "step-2" / "state.json"
    state = json.loads(path.read_text())
    assert state.pop("loss_states").keys() == {"bco_pair", "beta_dpo"}
    path.write_text(json.dumps(state))
    assert dpocli(*line, "--out", tmp_path / "run").code == 0
    rows, expected = metrics_of(tmp_path / "run"), metrics_of(remembering)
    assert rows[:3] == expected[:3]
    assert rows[3]["loss"] != expected[3]["loss"]


def test_several_losses_are_evaluated_in_one_pass(
    far_held_out: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored: list[int] = []

    def counting(scorer: Any, pairs: Any) -> Any:
        scored.append(len(pairs))
        return passes.score(scorer, pairs)

    monkeypatch.setattr(evaluate, "score", counting)

    def report_of(losses: str) -> tuple[dict[str, Any], dict[str, list[Any]]]:
        scored.clear()
        out = tmp_path / losses
        result = dpocli(
            "evaluate", "--model", MODEL, "--reference", far_held_out, "--loss", losses, "--out", out, "--json",
            "--token-budget", 600,
        )  # fmt: skip
        assert result.code == 0, result.err
        assert json.loads((out / "metrics.json").read_text()) == result.json
        assert sum(scored) == 12
        return result.json, pq.read_table(out / "pairs.parquet").to_pydict()

    names = ["dpo", "ipo", "simpo", "aot"]
    together, table = report_of(",".join(names))
    assert list(together["by_loss"]) == names
    rewards = {"chosen_rewards", "rejected_rewards", "margins", "losses", "noise"}
    for name in names:
        alone, columns = report_of(name)
        assert alone["by_loss"] == {}
        assert together["by_loss"][name] == {key: alone[key] for key in together["by_loss"][name]}
        assert {"loss_choice", "loss", "rewards/accuracies", "rewards/margins"} <= together["by_loss"][name].keys()
        assert rewards <= columns.keys()
        for kind in rewards:
            assert table[kind if name == "dpo" else f"{name}/{kind}"] == columns[kind]
        if name == "dpo":
            (model,) = together["models"]
            others = {"by_loss": {}, "scoring": alone["scoring"], "models": [model | {"by_loss": {}}]}
            assert together | others == alone
            assert table.keys() == columns.keys() | {f"{other}/{kind}" for other in names[1:] for kind in rewards}
    assert len({together["by_loss"][name]["loss"] for name in names}) == 4


@pytest.mark.parametrize("loss", ["aot", "aot_unpaired", "dpo+0.1*aot"])
def test_losses_by_rank_refuse_weights(loss: str, weighted: Path, cache: Path, tmp_path: Path, dpocli: Run) -> None:
    for place, command in (
        ("train", ("train", "--model", MODEL, "--reference", weighted)),
        ("held out", ("train", "--model", MODEL, "--reference", cache, "--eval-reference", weighted)),
        ("evaluate", ("evaluate", "--model", MODEL, "--reference", weighted)),
    ):
        result = dpocli(*command, "--loss", loss, "--out", tmp_path / place)
        assert result.code == 2, place
        said = " ".join(result.err.split())
        assert "18 pairs" in said
        assert "source row 2" in said
        assert "Traceback" not in said
        assert not (tmp_path / place / "config.yaml").exists()
        assert not (tmp_path / place / "model").exists()


@pytest.mark.parametrize("loss", [pytest.param("beta_dpo", marks=pytest.mark.slow), "bco_pair(beta=0.1)"])
def test_the_other_losses_of_a_batch_take_weights(loss: str, weighted: Path, tmp_path: Path, dpocli: Run) -> None:
    line = ("train", "--model", MODEL, "--reference", weighted, "--loss", loss, "--batch-size", 7, "--epochs", 2)
    rate = ("--learning-rate", "1e-3", "--save-every", 6)
    for name, budget in (("one", ONE_PASS), ("many", MANY_PASSES)):
        result = dpocli(*line, *rate, *budget, "--out", tmp_path / name)
        assert result.code == 0, result.err
    rows, expected_rows = metrics_of(tmp_path / "many"), metrics_of(tmp_path / "one")
    for row, expected in zip(rows, expected_rows, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "logratios/chosen"):
            assert row[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-4 if "/" in name else 0.0), name


def same_but_for(out: Path, config: Path) -> Mapping[str, Any]:
    """A configuration less its own directory."""
    values = yaml.safe_load(config.read_text())
    assert values.pop("out") == str(out)
    return values  # type: ignore[no-any-return]


def test_a_sum_says_what_each_term_is(far: Path, far_held_out: Path, tmp_path: Path, dpocli: Run) -> None:
    run, report = tmp_path / "run", tmp_path / "report"
    result = dpocli(*line_of(far, far_held_out, "--loss", "dpo+0.2*sft"), "--beta", 0.3, "--out", run)
    assert result.code == 0, result.err
    rows = metrics_of(run)
    for row in rows:
        for prefix in ("eval/",) if row["step"] == 0 else ("", "eval/") if row["step"] % 3 == 0 else ("",):
            terms = row[f"{prefix}loss/dpo"] + 0.2 * row[f"{prefix}loss/sft"]
            assert row[f"{prefix}loss"] == pytest.approx(terms)
            assert row[f"{prefix}rewards/margins"] == pytest.approx(0.3 * row[f"{prefix}logratios/margins"])
    provenance = provenance_of(run)
    dpo = {"name": "dpo", "weight": 1.0, "beta": 0.3, "hyperparameters": {"label_smoothing": 0.0}}
    sft = {"name": "sft", "weight": 0.2, "beta": None, "hyperparameters": {"reduction": "mean"}}
    assert provenance["loss"] == {"terms": [dpo, sft]}
    assert provenance["loss_states"] == {}
    line = ("evaluate", "--model", run / "model", "--reference", far_held_out, "--json")
    default = dpocli(*line, "--out", report)
    assert default.code == 0, default.err
    assert default.json["loss_choice"] == provenance["loss"]
    assert default.json["loss"] == pytest.approx(rows[-1]["eval/loss"], rel=1e-4)
    one_term = dpocli(*line, "--loss", "dpo", "--out", tmp_path / "one-term")
    assert one_term.json["loss_choice"]["beta"] == 0.3
    assert one_term.json["loss"] == pytest.approx(rows[-1]["eval/loss/dpo"], rel=1e-4)


def test_a_sum_in_yaml_is_the_sum_on_the_line(far: Path, tmp_path: Path, dpocli: Run) -> None:
    by_flag, by_file, again = tmp_path / "flag", tmp_path / "file", tmp_path / "again"
    line = ("train", "--model", MODEL, "--reference", far, *STEPS, "--max-steps", 3, "--loss")
    first = dpocli(*line, "0.8*dpo(beta=0.3)+0.2*bco_pair(beta=0.05)+sft(reduction=sum)", "--out", by_flag)
    assert first.code == 0, first.err
    config = tmp_path / "run.yaml"
    config.write_text(f"""\
model: {MODEL}
reference: {far}
batch_size: 9
max_steps: 3
learning_rate: 3e-4
loss:
  - {{name: dpo, weight: 0.8, beta: 0.3}}
  - name: bco_pair
    weight: 2e-1
    beta: 5.0e-2
  - {{name: sft, reduction: sum}}
""")
    second = dpocli("train", "--config", config, "--out", by_file)
    third = dpocli("train", "--config", by_file / "config.yaml", "--out", again)
    assert (second.code, third.code) == (0, 0), second.err + third.err
    assert metrics_of(by_flag) == metrics_of(by_file) == metrics_of(again)
    assert provenance_of(by_flag) == provenance_of(by_file) == provenance_of(again)
    assert [term["beta"] for term in provenance_of(by_file)["loss"]["terms"]] == [0.3, 0.05, None]
    assert same_but_for(by_file, by_file / "config.yaml") == same_but_for(again, again / "config.yaml")
    # Two spellings of one loss are one run.
    once_more = dpocli("train", "--config", config, "--out", by_flag)
    assert once_more.code == 0
    assert "nothing to do" in once_more.out


def test_log_ratios_are_told_where_there_is_a_reference(
    far: Path, far_held_out: Path, tmp_path: Path, dpocli: Run
) -> None:
    kinds = {f"logratios/{kind}" for kind in ("chosen", "rejected", "margins", "accuracies", "ties")}
    with_one, without = tmp_path / "with", tmp_path / "without"
    first = dpocli(*line_of(far, far_held_out, "--loss", "simpo"), "--max-steps", 3, "--out", with_one)
    second = dpocli(
        "train", "--model", MODEL, "--data", TRAIN, "--limit", 40, "--eval-fraction", 0.3, *STEPS, "--max-steps", 3,
        "--loss", "simpo", "--out", without,
    )  # fmt: skip
    assert (first.code, second.code) == (0, 0), first.err + second.err
    last = metrics_of(with_one)[-1]
    assert kinds | {f"eval/{kind}" for kind in kinds} <= last.keys()
    assert last["logratios/margins"] == pytest.approx(last["logratios/chosen"] - last["logratios/rejected"])
    rows = metrics_of(without)
    assert "eval/loss" in rows[-1]
    assert not [name for row in rows for name in row if "logratios" in name]
