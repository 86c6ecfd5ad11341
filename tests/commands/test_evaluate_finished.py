"""A finished evaluation is printed again and never changed; one that was stopped or killed is made from the start."""

import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpocli.commands import evaluate, finished_evaluation
from dpocli.errors import ExitCode, NumericsError
from tests.commands.broken_inputs import replace_json
from tests.commands.conftest import HELD_OUT, MODEL, Run, quiet
from tests.commands.test_evaluate_checkpoints import change_config, change_weights
from tests.commands.warm_workers import Worker


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(MODEL, tmp_path / "model"))


@pytest.fixture
def line(model: Path, held_out_cache: Path, tmp_path: Path) -> tuple[object, ...]:
    return ("evaluate", "--model", model, "--reference", held_out_cache, "--out", tmp_path / "r", "--show-pairs", 1)


@pytest.fixture
def no_scoring(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From the call on, no model can be loaded for scoring."""
    return lambda: monkeypatch.setattr(evaluate, "frozen_scorer", None)


def content(directory: Path) -> dict[str, tuple[bytes, int]]:
    """Every file with its bytes and the time of its last write."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


def test_the_same_command_prints_it_again_and_writes_nothing(
    line: tuple[object, ...], model: Path, tmp_path: Path, dpocli: Run, no_scoring: Callable[[], None]
) -> None:
    first = dpocli(*line)
    assert first.code == 0, first.err
    before = content(tmp_path / "r")
    assert {"metrics.json", "inputs.json", "pairs.parquet", "config.yaml", "status.json"} <= before.keys()
    assert not [name for name in before if name.startswith(finished_evaluation.STAGING)]
    no_scoring()
    again = dpocli(*line)
    assert (again.code, again.out) == (0, first.out), again.err
    shown = dpocli(*line, "--json", "--token-budget", 64, "--scoring", "padded", "--loss", "dpo", "--beta", 0.1)
    assert shown.json == json.loads(before["metrics.json"][0]), (
        "what cannot change a figure, and defaults, are the same"
    )
    (tmp_path / "link").symlink_to(model)
    assert dpocli(*line[:2], tmp_path / "link", *line[3:]).code == 0
    assert content(tmp_path / "r") == before


def test_other_gates_are_judged_by_it(
    line: tuple[object, ...], tmp_path: Path, dpocli: Run, no_scoring: Callable[[], None]
) -> None:
    out = tmp_path / "r"
    assert dpocli(*line, "--require", "ties<0.5").code == ExitCode.GATE
    before = content(out)
    no_scoring()
    failed = dpocli(*line, "--require", "ties<0.5")
    assert (failed.code, content(out)) == (ExitCode.GATE, before), "the same command has the same outcome"
    for refused in (("--loss", "ipo"), ("--lost", "ipo"), ("--require", "tees"), ("--reference", tmp_path / "none")):
        assert dpocli(*line, *refused).code in (ExitCode.USAGE, ExitCode.CACHE), refused
        assert content(out) == before, refused
    held = dpocli(*line, "--require", "ties>0.5", "--json")
    assert (held.code, held.json["requirements"][0]["holds"]) == (0, True)
    unknown = dpocli(*line, "--require", "tees>0.5")
    assert (unknown.code, "did you mean ties" in unknown.err) == (2, True)
    missing = dpocli(*line, "--require", "accuracy_difference>0")
    assert (missing.code, "it takes a second --model" in missing.err) == (2, True)
    after = content(out)
    assert {name for name in after if after[name] != before[name]} == {"status.json"}
    assert json.loads(after["status.json"][0])["exit_code"] == 0, "that of the last command which was not refused"


DIFFERENT: dict[str, tuple[tuple[object, ...], str]] = {
    "loss": (("--loss", "ipo"), "loss: dpo(beta=0.1, label_smoothing=0) -> ipo(beta="),
    "beta": (("--beta", 0.2), " -> dpo(beta=0.2, label_smoothing=0)"),
    "dtype": (("--dtype", "bfloat16"), "dtype: null -> bfloat16"),
    "slices": (("--slice-by", "fault"), 'slice_by: [] -> ["fault"]'),
    "pairs shown": (("--show-pairs", 2), "show_pairs: 1 -> 2"),
    "another model": (("--model", "sample_data/tiny-model"), "model: "),
}


@pytest.mark.parametrize("difference", DIFFERENT)
def test_another_one_is_refused_and_writes_nothing(
    line: tuple[object, ...], tmp_path: Path, dpocli: Run, difference: str
) -> None:
    assert dpocli(*line).code == 0
    before = content(tmp_path / "r")
    more, words = DIFFERENT[difference]
    if "--model" in more:
        more = ("--model", MODEL)
    result = dpocli(*line, *more)
    assert result.code == 2, result.err
    assert "it holds a finished evaluation with other settings or inputs" in result.err
    assert words in result.err
    assert content(tmp_path / "r") == before


def test_content_is_compared_and_not_names(
    line: tuple[object, ...], model: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    out, moved = tmp_path / "r", shutil.copytree(held_out_cache, tmp_path / "moved")
    assert dpocli(*line, "--reference", moved, "--second-reference", moved).code == 0
    before = content(out)
    assert dpocli(*line, "--second-reference", held_out_cache).code == 0, "the same pairs in another place"
    shutil.rmtree(moved)
    gone = dpocli(*line, "--reference", moved, "--second-reference", moved)
    assert gone.code == 0, f"a cache may be deleted when all is done: {gone.err}"
    without = dpocli(*line)
    assert (without.code, f"second reference: {moved} -> none" in without.err) == (2, True)
    quiet("precompute", "--model", MODEL, "--data", HELD_OUT, "--limit", 23, "--out", moved)
    other = dpocli(*line, "--reference", moved, "--second-reference", held_out_cache)
    assert (other.code, f"pairs: {moved}, with other content" in other.err) == (2, True)
    for change, words in ((change_weights, "weights"), (change_config, "configuration")):
        change(model)
        changed = dpocli(*line, "--second-reference", held_out_cache)
        assert (changed.code, f"the {words} of --model {model}" in changed.err) == (2, True)
    assert content(out) == before


def test_rows_are_compared_without_encoding_them(
    model: Path, tmp_path: Path, dpocli: Run, no_scoring: Callable[[], None]
) -> None:
    rows = HELD_OUT.read_text(encoding="utf-8").splitlines(keepends=True)
    (tmp_path / "rows.jsonl").write_text("".join(rows[:6]), encoding="utf-8")
    line = ("evaluate", "--model", model, "--data", tmp_path / "rows.jsonl", "--loss", "simpo", "--out", tmp_path / "r")
    assert dpocli(*line).code == 0
    before = content(tmp_path / "r")
    no_scoring()
    assert dpocli(*line).code == 0
    assert dpocli(*line, "--max-length", 64).code == 2
    (tmp_path / "rows.jsonl").write_text("".join(rows[1:7]), encoding="utf-8")
    result = dpocli(*line)
    assert (result.code, "rows.jsonl'], with other content" in result.err) == (2, True), result.err
    assert content(tmp_path / "r") == before


@pytest.mark.parametrize(("name", "text"), [("metrics.json", "{"), ("inputs.json", "{"), ("inputs.json", "{}")])
def test_what_cannot_be_compared_is_refused(
    line: tuple[object, ...], tmp_path: Path, dpocli: Run, name: str, text: str
) -> None:
    assert dpocli(*line).code == 0
    (tmp_path / "r" / name).write_text(text)
    before = content(tmp_path / "r")
    result = dpocli(*line)
    assert (result.code, f"{name} is missing or damaged" in result.err) == (2, True), result.err
    assert content(tmp_path / "r") == before


def test_a_failure_leaves_no_results_and_the_next_start_makes_them(
    line: tuple[object, ...], tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise NumericsError("no.")

    with monkeypatch.context() as patched:
        patched.setattr(evaluate, "frozen_scorer", broken)
        assert dpocli(*line).code == 5
    assert not {"metrics.json", "pairs.parquet", "inputs.json"} & content(tmp_path / "r").keys()
    assert json.loads((tmp_path / "r" / "status.json").read_text())["exit_code"] == 5
    assert dpocli(*line, "--loss", "ipo").code == 0, "nothing was finished, so this may be another one"


@pytest.mark.parametrize(
    ("method", "stop"),
    [
        ("dpocli.commands.evaluate:EvaluateJob._score", signal.SIGINT),
        ("dpocli.commands.evaluate:EvaluateJob._score", signal.SIGKILL),
        ("pathlib:Path.rmdir", signal.SIGKILL),  # of the emptied directory, when all files are in place
    ],
)
def test_one_that_is_killed_is_made_from_the_start(
    line: tuple[object, ...], tmp_path: Path, dpocli: Run, method: str, stop: signal.Signals
) -> None:
    Worker.start_held(method, 1, line, tmp_path / "log").end(stop)
    is_finished = method == "pathlib:Path.rmdir"
    assert (tmp_path / "r" / "metrics.json").exists() is is_finished
    before = content(tmp_path / "r")
    assert dpocli(*line).code == 0
    after = content(tmp_path / "r")
    assert {"metrics.json", "pairs.parquet", "inputs.json"} <= after.keys()
    assert (after["metrics.json"] == before.get("metrics.json")) is is_finished
    assert json.loads(after["status.json"][0])["state"] == "done"


def test_one_that_is_killed_between_its_files_is_made_from_the_start(
    line: tuple[object, ...], tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a kill leaves it: some of the results are in place, `metrics.json` is not."""
    out, replace = tmp_path / "r", Path.replace

    def broken(path: Path, target: Path) -> Path:
        if target == out / "metrics.json":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", broken)
        assert dpocli(*line).code == ExitCode.INTERRUPTED
    (out / "plots").mkdir(exist_ok=True)
    (out / "plots" / "margins.png").write_text("of before")
    assert (out / "pairs.parquet").is_file()
    assert not (out / "metrics.json").exists()
    replace_json(out / "inputs.json", lambda inputs: inputs.update(loss=["ipo"]))
    assert dpocli(*line).code == 0
    assert json.loads((out / "inputs.json").read_text())["loss"] == ["dpo(beta=0.1, label_smoothing=0)"]


def test_a_result_that_another_process_finished_meanwhile_stays(
    line: tuple[object, ...], tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = evaluate.report_of

    def meanwhile(*arguments: Any) -> Any:
        (tmp_path / "r" / "metrics.json").write_text("{}")
        return make(*arguments)

    monkeypatch.setattr(evaluate, "report_of", meanwhile)
    result = dpocli(*line)
    assert (result.code, "another process finished an evaluation there" in result.err) == (2, True)
    assert (tmp_path / "r" / "metrics.json").read_text() == "{}"
