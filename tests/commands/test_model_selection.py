"""--keep-best and --early-stopping: what held-out pairs decide, and that a kill at any point decides nothing else."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dpocli.run.directory import RunDirectory
from dpocli.run.metrics_log import MetricsLog
from dpocli.training.model_selection import BestCheckpoint
from dpocli.training.trainer import Trainer
from tests.commands.conftest import MODEL, Run, metrics_of, quiet, start, tensors_of
from tests.commands.test_kill import steps_done
from tests.commands.warm_workers import Worker

# With so high a rate the held-out loss is at its best after the second step.
LINE = (
    "train", "--model", MODEL, "--learning-rate", "2e-3", "--lr-schedule", "constant", "--batch-size", 8,
    "--max-steps", 24, "--eval-every", 2, "--save-every", 3, "--keep-best", "loss", "--early-stopping", 3,
)  # fmt: skip


def line(cache: Path, held_out_cache: Path, out: Path) -> tuple[object, ...]:
    return (*LINE, "--reference", cache, "--eval-reference", held_out_cache, "--out", out)


@pytest.fixture(scope="module")
def undisturbed(cache: Path, held_out_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("best") / "run"
    quiet(*line(cache, held_out_cache, out))
    return out


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def names(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").iterdir())


def assert_same_run(out: Path, other: Path) -> None:
    assert metrics_of(out) == metrics_of(other)
    assert names(out) == names(other)
    assert (out / "checkpoints" / "best.json").read_bytes() == (other / "checkpoints" / "best.json").read_bytes()
    first, second = (load_file(path / "model" / "model.safetensors") for path in (out, other))
    assert all(torch.equal(first[name], second[name]) for name in second)
    told = [
        {name: summary_of(path)[name] for name in ("steps", "model_step", "stopped_early", "best", "warnings")}
        for path in (out, other)
    ]
    assert told[0] == told[1]


def test_the_run_ends_where_the_held_out_loss_has_stopped_to_improve(undisturbed: Path) -> None:
    losses = {row["step"]: row["eval/loss"] for row in metrics_of(undisturbed) if "eval/loss" in row}
    assert list(losses) == [0, 2, 4, 6, 8]
    assert min(losses, key=lambda step: losses[step]) == 2
    summary = summary_of(undisturbed)
    assert (summary["steps"], summary["stopped_early"], summary["best"]["step"]) == (8, True, 2)
    status = json.loads((undisturbed / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("done", 0, 8)


def test_the_model_is_the_best_one_and_its_checkpoint_stays(undisturbed: Path) -> None:
    assert names(undisturbed) == ["best.json", "step-2", "step-6", "step-8"]
    assert summary_of(undisturbed)["model_step"] == 2
    saved, last = (tensors_of(undisturbed / "checkpoints" / f"step-{step}") for step in (2, 8))
    model = load_file(undisturbed / "model" / "model.safetensors")
    assert model
    assert all(torch.equal(weight, saved[f"model/{name}"].to(weight.dtype)) for name, weight in model.items())
    assert not all(torch.equal(saved[f"model/{name}"], last[f"model/{name}"]) for name in model)


def test_evaluate_finds_the_best_models_figures(
    undisturbed: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    result = dpocli(
        "evaluate", "--model", undisturbed / "model", "--reference", held_out_cache, "--out", tmp_path / "e", "--json"
    )
    assert result.code == 0, result.err
    summary = summary_of(undisturbed)
    assert result.json["loss"] == pytest.approx(summary["best"]["loss"], rel=1e-4)
    assert result.json["loss"] == pytest.approx(summary["held_out"]["eval/loss"], rel=1e-4)


def test_the_same_line_has_nothing_to_do_and_another_patience_is_another_run(
    undisturbed: Path, cache: Path, held_out_cache: Path, dpocli: Run
) -> None:
    same = line(cache, held_out_cache, undisturbed)
    result = dpocli(*same)
    assert (result.code, "nothing to do" in result.out) == (0, True), result.err
    for change, field in (
        (("--early-stopping", 4), "early_stopping: 3 -> 4"),
        (("--eval-every", 3), "eval_every: 2 -> 3"),
    ):
        other = dpocli(*same, *change)
        assert other.code == 2
        assert field in other.err


class Killed(BaseException):
    """As abrupt as a signal: nothing of the training catches it."""


def at(owner: type, name: str, which: int, *, after: bool) -> Callable[[pytest.MonkeyPatch], None]:
    """Ends the process, in effect, before or after the n-th call of a method."""
    plain = getattr(owner, name)

    def install(patch: pytest.MonkeyPatch) -> None:
        calls = iter(range(1, 1000))

        def dying(self: Any, *arguments: Any, **named: Any) -> Any:
            dies = next(calls) == which
            if dies and not after:
                raise Killed
            result = plain(self, *arguments, **named)
            if dies:
                raise Killed
            return result

        patch.setattr(owner, name, dying)

    return install


POINTS = {
    "after the row of the best step, before its checkpoint": at(Trainer, "save", 1, after=False),
    "after the checkpoint of the best step, before its name": at(BestCheckpoint, "name", 1, after=False),
    "after the name": at(BestCheckpoint, "name", 1, after=True),
    "after the row at which the run ends, before its checkpoint": at(Trainer, "save", 4, after=False),
    "after the last checkpoint": at(Trainer, "save", 4, after=True),
    "while the best model is fetched": at(Trainer, "load", 1, after=True),
    "before the summary": at(RunDirectory, "write_summary", 1, after=False),
    "in the middle": at(MetricsLog, "append", 6, after=True),
}


# Every other one in the long run alone.
@pytest.mark.parametrize(
    "point",
    [pytest.param(point, marks=[pytest.mark.slow] if index % 2 else []) for index, point in enumerate(POINTS)],
)
def test_a_kill_decides_nothing(
    point: str,
    undisturbed: Path,
    cache: Path,
    held_out_cache: Path,
    tmp_path: Path,
    dpocli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "killed"
    with monkeypatch.context() as patch:
        POINTS[point](patch)
        assert dpocli(*line(cache, held_out_cache, out)).code not in (0, 75)
    assert not (out / "summary.json").exists()
    result = dpocli(*line(cache, held_out_cache, out))
    assert result.code == 0, result.err
    assert_same_run(out, undisturbed)


def test_stops_on_request_at_any_moment_decide_nothing(
    undisturbed: Path, cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of an evaluation too, which is then made when the run goes on, and may end it there."""
    out = tmp_path / "stopped"
    codes = []
    while not codes or codes[-1] != 0:
        calls = iter(range(1000))
        patience = 4 + 3 * len(codes)
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "stop_requested", lambda _, left=patience, asked=calls: next(asked) >= left)
            codes.append(dpocli(*line(cache, held_out_cache, out), "--token-budget", 250).code)
        assert len(codes) < 20
    assert set(codes[:-1]) == {75}
    assert len(codes) >= 3
    whole, stopped = summary_of(undisturbed), summary_of(out)
    assert [row["step"] for row in metrics_of(out)] == list(range(9))
    for name in ("steps", "model_step", "stopped_early", "pairs_processed", "tokens_processed", "step0"):
        assert stopped[name] == pytest.approx(whole[name], abs=1e-6), name
    assert 1 < stopped["starts"] <= len(codes)


@pytest.mark.slow
@pytest.mark.parametrize("after", [2, 4, 6, 8])
def test_killed_by_a_signal_it_ends_with_the_same_bits(
    after: int, undisturbed: Path, cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "killed"
    worker = Worker.start(line(cache, held_out_cache, out), tmp_path / "log")
    worker.wait_until(lambda: steps_done(out) >= after)
    worker.end(signal.SIGKILL)
    result = dpocli(*line(cache, held_out_cache, out))
    assert result.code == 0, result.err
    assert_same_run(out, undisturbed)


@pytest.mark.slow
def test_two_processes_decide_as_one(
    undisturbed: Path, cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    """And one process ends what two have begun."""
    out = tmp_path / "two"
    launcher = ("torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "dpocli")
    process = start(*line(cache, held_out_cache, out), launcher=launcher)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    whole, two = summary_of(undisturbed), summary_of(out)
    for name in ("steps", "model_step", "stopped_early", "pairs_processed", "tokens_processed"):
        assert two[name] == whole[name], name
    assert two["best"]["loss"] == pytest.approx(whole["best"]["loss"], rel=1e-5)
    assert two["environment"]["processes"] == 2
    assert names(out) == names(undisturbed)
    (out / "summary.json").unlink()  # as if killed before its end: one process makes it from the checkpoints
    assert dpocli(*line(cache, held_out_cache, out)).code == 0
    assert summary_of(out)["model_step"] == whole["model_step"]


def test_by_accuracy(cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    result = dpocli(
        "train", "--model", MODEL, "--learning-rate", "2e-3", "--lr-schedule", "constant", "--batch-size", 8,
        "--max-steps", 4, "--eval-every", 1, "--keep-best", "accuracy", "--keep-last", 1, "--reference", cache,
        "--eval-reference", held_out_cache, "--out", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    found = [(row["eval/rewards/accuracies"], -row["eval/loss"], row["step"]) for row in metrics_of(out)[1:]]
    best = max(found)[2]
    assert json.loads((out / "checkpoints" / "best.json").read_text())["step"] == best
    assert {"best.json", f"step-{best}", "step-4"} <= set(names(out))
    assert len(names(out)) == 3  # the best, and one beside it
    assert summary_of(out)["stopped_early"] is False
    assert f"after {best} steps" in result.out


def test_a_run_that_only_gets_worse_says_so(cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    result = dpocli(
        "train", "--model", MODEL, "--learning-rate", "2e-2", "--batch-size", 8, "--max-steps", 2, "--eval-every", 1,
        "--warmup-ratio", 0, "--keep-best", "loss", "--reference", cache, "--eval-reference", held_out_cache,
        "--out", out,
    )  # fmt: skip
    assert result.code == 0, result.err
    assert "No evaluation was better than that of the untrained policy" in result.err
    assert summary_of(out)["warnings"][-1]["kind"] == "no better than untrained"
    assert summary_of(out)["model_step"] in (1, 2)


@pytest.mark.parametrize("options", [("--keep-best", "loss"), ("--early-stopping", 2)])
def test_without_held_out_pairs_it_is_a_usage_error(
    options: tuple[object, ...], cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    result = dpocli("train", "--model", MODEL, "--reference", cache, "--out", tmp_path / "run", *options)
    assert result.code == 2
    assert "--eval-reference" in result.err
    assert not (tmp_path / "run").exists()
