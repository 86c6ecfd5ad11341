"""`evaluate` from the command line: several models, gates, slices, a second reference, several processes."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpocli.cache.reader import PairStore
from dpocli.commands import evaluate
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.errors import ExitCode
from tests.caches import with_other_values
from tests.commands.broken_inputs import replace_json, swap_two_tokens
from tests.commands.conftest import HELD_OUT, MODEL, Run, quiet
from tests.commands.ranks import ended, on_processes

SETTINGS = ("--learning-rate", "1e-3", "--batch-size", "20", "--beta", "0.3")


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Models of 2 and of 6 steps from the same start."""
    found = {}
    for steps in (2, 6):
        out = tmp_path_factory.mktemp("runs") / f"run-{steps}"
        quiet("train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS, "--max-steps", steps)
        found[steps] = out / "model"
    return found


def known_values(pair: EncodedPair) -> ReferenceLogps:
    """Of 4 rows in a row, 3 have the chosen side ahead: -1 against -3 in all; one has it the other way round."""
    ahead, behind = -1.0, -3.0
    chosen, rejected = (behind, ahead) if pair.row % 4 == 3 else (ahead, behind)
    sides = (pair.chosen_ids, chosen), (pair.rejected_ids, rejected)
    return ReferenceLogps(*(np.full(len(ids), total / len(ids), np.float32) for ids, total in sides))


def test_a_cache_with_known_values_gives_exactly_those(held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    known = tmp_path / "known"
    with_other_values(held_out_cache, known, known_values)
    result = dpocli("evaluate", "--model", MODEL, "--reference", known, "--out", tmp_path / "r", "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report["accuracies"]["reference"]["value"] == 18 / 24
    columns = pq.read_table(tmp_path / "r" / "pairs.parquet").to_pydict()
    policy = np.array(columns["policy_chosen_logps"]) - columns["policy_rejected_logps"]
    margins = 0.1 * (policy - np.where(np.array(columns["row"]) % 4 == 3, -2, 2))
    np.testing.assert_allclose(columns["margins"], margins, atol=1e-5)
    assert report["rewards/accuracies"] == (margins > 0).mean()
    assert report["accuracies"]["policy"]["value"] == (policy > 0).mean()
    assert report["calibration"]["brier"] == pytest.approx(np.square(1 / (1 + np.exp(margins))).mean(), rel=1e-5)
    longer = np.sign(np.array(columns["chosen_tokens"]) - columns["rejected_tokens"])
    assert report["accuracies"]["pick_the_longer"]["value"] == ((longer + 1) / 2).mean()


def test_several_models_in_one_table_as_they_are_given(
    runs: Mapping[int, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "r"
    line = ("evaluate", "--model", runs[6], "--model", MODEL, "--model", runs[2], "--reference", held_out_cache)
    result = dpocli(*line, "--out", out, "--json")
    assert result.code == 0, result.err
    report = result.json
    assert report == json.loads((out / "metrics.json").read_text())
    assert [(entry["name"], entry["step"]) for entry in report["models"]] == [
        (str(runs[6]), 6),
        (str(MODEL), None),
        (str(runs[2]), 2),  # of another run, since its settings are others
    ]
    # The untrained model is judged by the loss of those that were trained from it.
    assert [entry["loss_choice"]["beta"] for entry in report["models"]] == [0.3] * 3
    assert report["model"] == str(runs[6])
    for name in ("rewards/accuracies", "loss", "accuracies", "calibration", "slices"):
        assert report[name] == report["models"][0][name]
    alone = dpocli(
        "evaluate", "--model", runs[6], "--reference", held_out_cache, "--out", tmp_path / "alone", "--json"
    ).json
    for name in ("loss", "rewards/margins", "rewards/accuracies"):
        assert report["models"][0][name] == pytest.approx(alone[name], rel=1e-5), name
    columns = pq.read_table(out / "pairs.parquet").to_pydict()
    second, third = report["comparisons"]
    assert (second["model"], second["against"], third["against"]) == (str(runs[6]), str(MODEL), str(runs[2]))
    change = np.array(columns["margins"]) - columns["model-3/margins"]
    assert third["margin_difference"] == pytest.approx(change.mean())
    assert third["margin_interval"][0] < change.mean() < third["margin_interval"][1]
    assert second["margin_difference"] > third["margin_difference"] > 0
    # The second is the reference itself, which ties and stands at 50%.
    assert report["models"][1]["rewards/accuracies_ties_half"] == 0.5
    assert second["accuracy_difference"] == pytest.approx(report["rewards/accuracies"] - 0.5)
    shown = dpocli(*line, "--out", out).out  # the finished report, as a table
    assert "the first less each" in shown
    assert "ties on" in shown


def test_each_model_is_let_go_before_the_next(
    runs: Mapping[int, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    import weakref

    living: list[weakref.ref[Any]] = []
    make = evaluate.frozen_scorer

    def watched(*arguments: Any, **more: Any) -> Any:
        assert [reference() for reference in living] == [None] * len(living)
        scorer = make(*arguments, **more)
        living.append(weakref.ref(scorer.model))
        return scorer

    monkeypatch.setattr(evaluate, "frozen_scorer", watched)
    line = ("evaluate", "--model", MODEL, "--model", runs[2], "--reference", held_out_cache, "--out", tmp_path / "r")
    assert dpocli(*line).code == 0
    assert len(living) == 2


def test_models_of_other_losses_are_compared_by_accuracy_only(
    runs: Mapping[int, Path], cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    other = tmp_path / "simpo"
    line = ("train", "--model", MODEL, "--reference", cache, "--out", other, "--loss", "simpo", "--max-steps", 1)
    assert dpocli(*line, "--batch-size", 8).code == 0
    line = ("evaluate", "--model", runs[6], "--model", other / "model", "--reference", held_out_cache)
    result = dpocli(*line, "--out", tmp_path / "r")
    assert result.code == 0, result.err
    assert f"{other / 'model'}: compared by accuracy only; the losses differ: dpo" in result.out
    (comparison,) = json.loads((tmp_path / "r" / "metrics.json").read_text())["comparisons"]
    assert comparison["margin_difference"] is None
    assert comparison["accuracy_difference"] is not None


def test_models_of_other_tokenizers_are_compared_by_accuracy_over_raw_rows(
    runs: Mapping[int, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    """Each encodes the rows with its own tokenizer; the rows are the same."""
    other = shutil.copytree(runs[6], tmp_path / "other")
    replace_json(other / "tokenizer.json", swap_two_tokens)
    line = ("evaluate", "--data", HELD_OUT, "--limit", 12, "--loss", "simpo", "--model", runs[6], "--model")
    result = dpocli(*line, other, "--out", tmp_path / "r", "--json")
    assert result.code == 0, result.err
    (comparison,) = result.json["comparisons"]
    assert (comparison["pairs"], comparison["margin_difference"]) == (12, None)
    assert comparison["why_no_margin"] == "the tokenizers differ"
    same = dpocli(*line, runs[2], "--out", tmp_path / "same", "--json")
    assert same.json["comparisons"][0]["margin_difference"] is not None
    assert not list((tmp_path / "same").glob("pairs-*"))  # encoded once


# gates


def test_a_gate_that_fails_ends_with_6_when_everything_is_written(
    runs: Mapping[int, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "r"
    line = ("evaluate", "--model", runs[6], "--reference", held_out_cache, "--out", out, "--require", "reward_margin>0")
    result = dpocli(*line, "--require", "reward_accuracy_low>=0.999", "--json")
    assert result.code == ExitCode.GATE
    report = json.loads((out / "metrics.json").read_text())
    assert result.json == report
    margin, low = report["requirements"]
    assert (margin["holds"], low["holds"]) == (True, False)
    assert low["value"] == report["rewards/accuracies_interval"][0]
    said = f"--require reward_accuracy_low>=0.999: it is {low['value']:.6g}"
    assert said in result.err
    assert "reward_margin" not in result.err
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", ExitCode.GATE)
    assert said in status["message"]
    assert (out / "pairs.parquet").is_file()


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("reward_acuracy>=0.6", "did you mean reward_accuracy or"),
        ("reward_accuracy=0.6", "is no requirement"),
        ("accuracy_difference>0", "there is no figure accuracy_difference here; it takes a second --model"),
        ("accuracy_difference_low>0", "it takes a second --model"),
        ("rewards/accuracies>0", "did you mean"),
        ("displacement_low>0", "did you mean displacement"),
    ],
)
def test_a_gate_that_cannot_be_is_an_error_before_anything_is_scored(
    gate: str, words: str, held_out_cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "frozen_scorer", None)
    out = tmp_path / "r"
    result = dpocli("evaluate", "--model", MODEL, "--reference", held_out_cache, "--out", out, "--require", gate)
    assert result.code == ExitCode.USAGE
    assert words in result.err
    assert not (out / "metrics.json").exists()


@pytest.mark.parametrize(
    "losses",
    [
        "dpo,ipo",
        "bco_pair",
        "dpo+0.2*sft",
        *(pytest.param(loss, marks=pytest.mark.slow) for loss in ("aot", "beta_dpo", "wpo", "simpo")),
    ],
)
def test_gates_are_known_beforehand_with_every_kind_of_loss(
    losses: str, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    gates = ("--require", "brier<=1", "--require", "reference_accuracy>=0", "--require", "reward_margin_median<1e9")
    line = ("evaluate", "--model", MODEL, "--reference", held_out_cache, "--loss", losses, "--out", tmp_path / "r")
    result = dpocli(*line, *gates, "--second-reference", held_out_cache, "--require", "second_reference_accuracy>=0")
    assert result.code == 0, result.err


# slices and references


def test_kept_columns_make_slices(tmp_path: Path, dpocli: Run) -> None:
    line = ("evaluate", "--model", MODEL, "--data", HELD_OUT, "--limit", 40, "--loss", "simpo", "--slice-by", "fault")
    result = dpocli(*line, "--keep-columns", "fault", "--out", tmp_path / "r", "--json")
    assert result.code == 0, result.err
    faults = [json.loads(row)["fault"] for row in HELD_OUT.read_text(encoding="utf-8").splitlines()[:40]]
    assert {entry["name"]: entry["pairs"] for entry in result.json["slices"]["fault"]} == {
        fault: faults.count(fault) for fault in faults
    }
    assert pq.read_table(tmp_path / "r" / "pairs.parquet")["kept/fault"].to_pylist() == faults
    assert "reference" not in result.json["accuracies"]
    without = dpocli(*line, "--out", tmp_path / "without")
    assert (without.code, "--slice-by fault: the pairs carry no such column" in without.err) == (ExitCode.USAGE, True)


def test_a_second_reference_is_joined_by_pair(
    runs: Mapping[int, Path], held_out_cache: Path, cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    """It has other row numbers and fewer pairs, and knows nothing of the first."""
    rows = HELD_OUT.read_text(encoding="utf-8").splitlines(keepends=True)[:24]
    (tmp_path / "rows.jsonl").write_text("".join(rows[::-2]), encoding="utf-8")
    made, second = tmp_path / "made", tmp_path / "second"
    assert dpocli("precompute", "--model", MODEL, "--data", tmp_path / "rows.jsonl", "--out", made).code == 0
    with_other_values(made, second, known_values)
    line = ("evaluate", "--model", runs[6], "--reference", held_out_cache, "--out", tmp_path / "r", "--json")
    result = dpocli(*line, "--second-reference", second)
    assert result.code == 0, result.err
    found = result.json["second_reference"]
    assert (found["pairs"], found["accuracy"]["value"]) == (12, 9 / 12)
    columns = pq.read_table(tmp_path / "r" / "pairs.parquet").to_pydict()
    ids = {pair_id.tobytes().hex() for pair_id in PairStore.open(second).columns.pair_ids}
    there = np.array([pair_id in ids for pair_id in columns["pair_id"]])
    assert there.sum() == 12
    assert [value is not None for value in columns["second_ref_margins"]] == there.tolist()
    policy, reference = (
        np.array(columns[f"{whose}_chosen_logps"], dtype=float)
        - np.array(columns[f"{whose}_rejected_logps"], dtype=float)
        for whose in ("policy", "second_ref")
    )
    margins = 0.3 * (policy - reference)[there]
    assert found["rewards/margins"] == pytest.approx(margins.mean())
    assert found["rewards/accuracies"] == (margins > 0).mean()
    nothing_shared = dpocli(*line[:-3], "--out", tmp_path / "nothing", "--second-reference", cache)
    assert nothing_shared.code == ExitCode.CACHE
    assert "it has none of the pairs" in nothing_shared.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--model", MODEL), "given twice"),
        (("--model", "b", "--adapter", "a"), "--adapter: belongs to one --model, and there are 2"),
        (("--second-reference", "x", "--data", "y"), "--second-reference: there is no first"),
    ],
)
def test_what_does_not_go_together(more: tuple[object, ...], words: str, tmp_path: Path, dpocli: Run) -> None:
    reference = () if "--data" in more else ("--reference", "r")
    result = dpocli("evaluate", "--model", MODEL, *reference, "--out", tmp_path / "r", *more)
    assert result.code == ExitCode.USAGE
    assert words in result.err


# processes


def assert_alike(one: Any, two: Any, where: str = "") -> None:
    """Equal but for the rounding of float32 sums in other company."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), where
        for name in one.keys() - {"scoring", "environment"}:
            assert_alike(one[name], two[name], f"{where}/{name}")
    elif isinstance(one, list):
        assert len(one) == len(two), where
        for index, items in enumerate(zip(one, two, strict=True)):
            assert_alike(*items, f"{where}/{index}")
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-3, abs=1e-4), where
    else:
        assert one == two, where


def test_two_processes_find_the_same_figures_and_one_gate(
    runs: Mapping[int, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    line = ("evaluate", "--model", runs[6], "--model", runs[2], "--reference", held_out_cache, "--require", "brier<1")
    one, two = tmp_path / "one", tmp_path / "two"
    assert dpocli(*line, "--out", one).code == 0
    on_processes(2, *line, "--out", two)
    reports = [json.loads((out / "metrics.json").read_text()) for out in (one, two)]
    assert_alike(*reports)
    codes, said = ended(2, *line, "--require", "brier>1", "--out", two)
    assert codes == [ExitCode.GATE] * 2, said
    assert json.loads((two / "status.json").read_text())["exit_code"] == ExitCode.GATE


def test_the_same_model_by_another_name_is_given_twice(held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    link = tmp_path / "link"
    link.symlink_to(MODEL)
    line = ("evaluate", "--model", MODEL, "--model", link, "--reference", held_out_cache, "--out", tmp_path / "r")
    result = dpocli(*line)
    assert result.code == 2
    assert f"{MODEL} and {link}: given twice" in result.err


def test_a_gate_on_what_only_the_pairs_can_tell_does_not_hold(
    runs: Mapping[int, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    """A single prompt: the interval of a margin is null."""
    out = tmp_path / "r"
    line = ("--data", HELD_OUT, "--limit", 1, "--loss", "simpo", "--out", out, "--require", "reward_margin_low>-100")
    result = dpocli("evaluate", "--model", runs[6], *line)
    assert result.code == ExitCode.GATE, result.err
    assert "it is undefined here" in result.err
    assert json.loads((out / "metrics.json").read_text())["rewards/margins_interval"] is None


def test_the_noise_is_that_of_the_rougher_dtype(tmp_path: Path, dpocli: Run) -> None:
    """A cache of bfloat16 under a policy of float32: what differs is rounding, and is called that."""
    cache = tmp_path / "rough"
    quiet("precompute", "--model", MODEL, "--data", HELD_OUT, "--limit", 12, "--out", cache, "--dtype", "bfloat16")
    line = ("evaluate", "--model", MODEL, "--reference", cache, "--dtype", "float32", "--json")
    result = dpocli(*line, "--out", tmp_path / "r")
    assert result.code == 0, result.err
    assert result.json["rewards/within_noise"] == 1.0
    apart = dpocli(*line, "--loss", "simpo", "--out", tmp_path / "apart")  # which looks at no reference
    assert apart.code == 0, apart.err
    assert apart.json["rewards/within_noise"] < 0.5


@pytest.mark.parametrize("gate", ["margin_difference>=-9", "margin_difference_low>=-9"])
def test_a_difference_of_margins_that_cannot_be_is_refused_beforehand(
    runs: Mapping[int, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run, gate: str
) -> None:
    line = ("evaluate", "--model", runs[6], "--model", runs[2], "--reference", held_out_cache, "--out", tmp_path / "r")
    assert dpocli(*line, "--require", gate).code == 0
    shutil.copytree(runs[2], tmp_path / "other")
    replace_json(tmp_path / "other" / "dpocli.json", lambda told: told["loss"].update(beta=0.7))
    line = ("evaluate", "--model", runs[6], "--model", tmp_path / "other", "--reference", held_out_cache)
    result = dpocli(*line, "--out", tmp_path / "other-r", "--require", gate)
    assert result.code == 2
    assert "there is no such difference; the losses differ" in result.err
