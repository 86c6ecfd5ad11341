"""Rows of metrics reach the trackers that were asked for, and no others."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.errors import UsageError
from dpocli.training.trackers import Trackers, check_trackers

ROWS = [{"step": 1, "loss": 0.7, "eval/loss": 0.8}, {"step": 2, "loss": 0.6}]


def options(out: Path, *track: str) -> TrainOptions:
    return build_options(TrainOptions, model="m", out=out, reference="r", track=list(track))


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Trackers(options(tmp_path, "tensorboard"), enabled=True) as trackers:
        for row in ROWS:
            trackers.log(row)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 5)) for event in events.Scalars("loss")] == [(1, 0.7), (2, 0.6)]
    assert events.Tags()["scalars"] == ["loss", "eval/loss"]


def test_wandb_gets_each_step_and_is_resumed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[object] = []
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row["loss"])), finish=lambda: logged.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: logged.append(given["id"]) or run))
    with Trackers(options(tmp_path / "my-run", "wandb"), enabled=True) as trackers:
        for row in ROWS:
            trackers.log(row)
    name = str(logged[0])
    assert name.startswith("my-run-")
    assert logged[1:] == [(1, 0.7), (2, 0.6), "end"]


def test_only_one_process_tracks(tmp_path: Path) -> None:
    with Trackers(options(tmp_path, "tensorboard"), enabled=False) as trackers:
        trackers.log(ROWS[0])
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"--track wandb: it is not installed. `pip install 'dpocli\[trackers\]'`"):
        check_trackers(options(tmp_path, "wandb"))
