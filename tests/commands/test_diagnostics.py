"""What a run tells of itself: the live line, warnings, the summary, curves, and where good weights are left."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dpocli.config.training_options import OptimizerOptions
from dpocli.run.directory import RunDirectory
from dpocli.training import monitor, trainer
from tests.commands.conftest import MODEL, TRAIN, Run, metrics_of, pictures
from tests.commands.shortcuts import STEP0_PAIRS

SETTINGS = ("--learning-rate", "5e-4", "--batch-size", "8", "--max-steps", "6", "--save-every", "2")
STILL = ("--learning-rate", "1e-12", "--batch-size", 2, "--max-steps", 24, "--save-every", 6)
"""Too small a rate for anything to move."""


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def stopping_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    """Without held-out pairs a run asks once a step."""
    asked = iter(range(1, 1000))
    patch.setattr(RunDirectory, "stop_requested", lambda _: next(asked) >= steps)


def test_the_live_line(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    result = dpocli("train", "--model", MODEL, "--reference", cache, "--out", tmp_path / "run", *SETTINGS)
    assert result.code == 0, result.err
    (line,) = [line for line in result.err.splitlines() if line.startswith("train: ")]
    for part in ("6 steps", "pairs/s", "tokens/s", "loss 0.", "accuracy ", "margin ", "MFU ", "%", "memory ", " GiB"):
        assert part in line, line


def test_the_summary_has_what_a_report_needs(
    cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS, "--max-steps", 7)
    with monkeypatch.context() as patch:
        stopping_after(patch, 3)
        assert dpocli(*line).code == 75
    result = dpocli(*line, "--json")
    assert result.code == 0, result.err
    summary = summary_of(out)
    assert result.json == summary
    assert (summary["steps"], summary["model_step"], summary["stopped_early"], summary["best"]) == (7, 7, False, None)
    assert (summary["starts"], summary["warnings"], summary["truncated_share"]) == (2, [], 0.0)
    assert summary["step0"]["num_pairs"] >= STEP0_PAIRS  # measured at the first start, told by the second
    assert summary["pairs_processed"] == 56
    assert {"torch", "transformers", "python", "device", "processes", "hosts", "cpus"} <= set(summary["environment"])
    assert {"learning_rate": 5e-4, "batch_size": 8, "dtype": "float32", "beta": 0.1}.items() <= summary[
        "options"
    ].items()
    assert summary["seconds"]["training"] > 0
    assert summary["pairs_per_second"] == pytest.approx(56 / summary["seconds"]["training"], rel=0.02)
    assert "model_flop_utilisation" not in summary
    assert summary["peak_memory_bytes"] > 1 << 26


def test_tokens_are_those_of_the_steps_that_were_done(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    """An epoch of 40 pairs and two steps of the next."""
    from dpocli.cache.reader import PairStore
    from dpocli.training.schedule import Schedule

    out = tmp_path / "run"
    assert dpocli("train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS, "--max-steps", 7).code == 0
    columns = PairStore.open(cache).columns
    tokens = columns.prompt_tokens + columns.chosen_tokens + columns.rejected_tokens
    schedule = Schedule(40, 8, 7, 0)
    expected = sum(int(tokens[schedule.batch(step)].sum()) for step in range(1, 8))
    assert summary_of(out)["tokens_processed"] == expected


def test_a_warning_is_said_once_whatever_happens(
    cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, "--out", out, *STILL)
    said = []
    for stop_after, code in ((20, 75), (2, 75), (1000, 0)):
        with monkeypatch.context() as patch:
            stopping_after(patch, stop_after)
            result = dpocli(*line)
        assert result.code == code, result.err
        said.append(result.err.count("warning: Step 20: The loss is still at ln 2"))
    assert said == [1, 0, 0]
    assert [(warning["kind"], warning["step"]) for warning in summary_of(out)["warnings"]] == [
        ("loss stuck at ln 2", 20)
    ]


def test_truncated_pairs_are_told_at_the_start(tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    ref, out = tmp_path / "ref", tmp_path / "run"
    cut = dpocli("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 20, "--out", ref, "--max-length", 64)
    assert cut.code == 0, cut.err
    line = ("train", "--model", MODEL, "--reference", ref, "--out", out, *SETTINGS)
    told = []
    for steps, code in ((2, 75), (1000, 0)):
        with monkeypatch.context() as patch:
            stopping_after(patch, steps)
            result = dpocli(*line)
        assert result.code == code, result.err
        told.append("training pairs" in result.err and "were cut to 64 tokens" in result.err)
    assert told == [True, False]
    summary = summary_of(out)
    assert summary["truncated_share"] > 0.1
    assert [(warning["kind"], warning["step"]) for warning in summary["warnings"]] == [("many truncated pairs", 0)]


def test_a_picture_that_cannot_be_drawn_fails_no_run(
    cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"

    def broken(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(monitor, "draw_curves", broken)
    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    result = dpocli("train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS)
    assert result.code == 0, result.err
    assert "warning: curves.png could not be drawn (RuntimeError: no font)" in result.err
    assert (out / "model").is_dir()
    assert not (out / "curves.png").exists()


def test_curves_are_there_before_the_end(
    cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    monkeypatch.setattr(monitor, "SECONDS_BETWEEN_DRAWINGS", 0.0)
    stopping_after(monkeypatch, 2)
    with pictures():
        assert dpocli("train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS).code == 75
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


# numbers that go bad


def rate_of(bad_step: int, rate: float) -> Callable[[OptimizerOptions, int], Callable[[int], float]]:
    return lambda options, num_steps: lambda step: rate if step == bad_step else 1e-4


@pytest.fixture
def breaking_at_step_4(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "learning_rates", rate_of(4, float("nan")))


@pytest.mark.usefixtures("breaking_at_step_4")
def test_the_last_good_checkpoint_is_named_and_nothing_is_touched(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    """The update of step 4 breaks the weights, so that its checkpoint is no good: the loss of step 5 tells."""
    out = tmp_path / "run"
    line = (
        "train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS, "--save-every", 1, "--keep-last", 9,
        "--max-grad-norm", 0,
    )  # fmt: skip
    result = dpocli(*line)
    assert result.code == 5, result.err
    assert "Step 5: the loss is not finite, in the pairs of source rows " in result.err
    assert f"The last good checkpoint: {out}/checkpoints/step-3." in result.err
    assert sorted(path.name for path in (out / "checkpoints").iterdir()) == [f"step-{step}" for step in (1, 2, 3, 4)]
    assert str(out / "checkpoints/step-3") in json.loads((out / "status.json").read_text())["message"]
    before = {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*/*")}
    again = dpocli(*line)
    assert again.code == 5
    assert "step-3." in again.err
    assert {path: path.stat().st_mtime_ns for path in out.glob("checkpoints/*/*")} == before
    assert [row["step"] for row in metrics_of(out)] == [1, 2, 3, 4]


@pytest.mark.usefixtures("breaking_at_step_4")
def test_a_held_out_loss_that_is_not_finite(cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    result = dpocli(
        "train", "--model", MODEL, "--reference", cache, "--eval-reference", held_out_cache, "--out", out, *SETTINGS,
        "--save-every", 1, "--eval-every", 1, "--keep-last", 9, "--max-grad-norm", 0, "--keep-best", "loss",
    )  # fmt: skip
    assert result.code == 5, result.err
    assert "The held-out loss is not finite, in the pairs of source rows 0, 1, 2" in result.err
    assert "and 14 more" in result.err
    assert f"The last good checkpoint: {out}/checkpoints/step-3." in result.err
    assert not (out / "checkpoints/step-4").exists()
    assert not (out / "model").exists()


def test_a_gradient_that_is_not_finite(
    cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights of 1e30 are finite and give a finite loss, since norms scale them away; their checkpoint is no good."""
    monkeypatch.setattr(trainer, "learning_rates", rate_of(4, 1e30))
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, "--out", out, *SETTINGS, "--save-every", 1)
    result = dpocli(*line, "--max-grad-norm", 0, "--keep-last", 9)
    assert result.code == 5, result.err
    assert "Step 5: the gradient is not finite although the loss is, over the pairs of source rows " in result.err
    assert f"The last good checkpoint: {out}/checkpoints/step-3." in result.err


def test_where_there_is_no_good_checkpoint_the_message_says_so(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    result = dpocli(
        "train", "--model", MODEL, "--reference", cache, "--out", tmp_path / "run", "--learning-rate", "1e30",
        "--batch-size", 8, "--max-steps", 3, "--save-every", 1, "--max-grad-norm", 0, "--warmup-ratio", 0,
    )  # fmt: skip
    assert result.code == 5
    assert "The last good checkpoint: there is none." in result.err
