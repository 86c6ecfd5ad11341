"""What a run takes, added up over its starts; curves that cost next to nothing; trackers that get what was asked for."""

import json
import sys
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dpocli.checkpoint.state import Spent
from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Console
from dpocli.errors import UsageError
from dpocli.training import monitor
from dpocli.training.monitor import Monitor, RunStats, check_trackers
from dpocli.training.schedule import Schedule

CPU = torch.device("cpu")
ROWS = [{"step": 1, "loss": 0.7, "eval/loss": 0.8}, {"step": 2, "loss": 0.6}]


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(monitor, "perf_counter", clock)
    return clock


def monitor_of(out: Path, *track: str, is_first: bool = True, done: int = 0) -> Monitor:
    """A monitor of a run of four steps of which nothing is there but what it reads."""
    setup = SimpleNamespace(
        loss=LossChoice.of("dpo"), schedule=Schedule(8, 2, 4, 0), processes=SimpleNamespace(is_first=is_first),
        options=build_options(TrainOptions, model="m", out=out, reference="r", track=list(track)),
    )  # fmt: skip
    directory = SimpleNamespace(path=out, metrics=SimpleNamespace(rows=list, append=lambda _: None))
    return Monitor(cast(Any, SimpleNamespace(setup=setup)), cast(Any, directory), RunStats(CPU), done, Console())


def test_seconds_add_up_over_starts(clock: Clock) -> None:
    first = RunStats(CPU)
    with first.timing("training"):
        clock.now += 5
    clock.now += 100
    with first.timing("checkpoints"):
        clock.now += 1
    first.notes["step0"] = {"mean": 0.5}
    second = RunStats(CPU, Spent.model_validate_json(json.dumps(first.to_json())))
    with second.timing("training"):
        clock.now += 2
    assert (second.seconds("training"), second.seconds_of_this_start("training")) == (7, 2)
    assert second.to_json()["seconds"] == {"training": 7, "evaluation": 0, "checkpoints": 1}
    assert (second.starts, second.notes) == (2, {"step0": {"mean": 0.5}})


def test_the_peak_of_a_start_before_counts() -> None:
    stats = RunStats(CPU)
    assert 1 << 20 < stats.peak_bytes < 1 << 40
    spent = Spent.model_validate(stats.to_json() | {"peak_memory_bytes": 1 << 50})
    assert RunStats(CPU, spent).peak_bytes == 1 << 50


def test_a_checkpoint_of_an_older_version_has_no_totals() -> None:
    assert RunStats(CPU, None).starts == 1


@pytest.mark.parametrize(("cost", "between"), [(0.1, 30.0), (3.0, 150.0)])
def test_curves_are_drawn_now_and_then(
    cost: float, between: float, clock: Clock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After half a minute at the earliest, and never for more than a fiftieth of the time."""
    drawn = []

    def draw(*_: object) -> None:
        drawn.append(clock.now)
        clock.now += cost

    monkeypatch.setattr(monitor, "draw_curves", draw)
    speaker = monitor_of(tmp_path)
    while clock.now < 1000:
        clock.now += 1
        speaker.draw()
    assert drawn[0] == 30
    gaps = [later - earlier - cost for earlier, later in pairwise(drawn)]
    assert all(between <= round(gap, 6) <= between + 1 for gap in gaps), gaps
    assert len(gaps) > 3


def test_tensorboard_reads_what_was_logged(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with monitor_of(tmp_path, "tensorboard") as speaker:
        for row in ROWS:
            speaker.log(row)
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, round(event.value, 5)) for event in events.Scalars("loss")] == [(1, 0.7), (2, 0.6)]
    assert events.Tags()["scalars"] == ["loss", "eval/loss"]


def test_wandb_gets_each_step_and_is_resumed_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logged: list[object] = []
    run = SimpleNamespace(log=lambda row, step: logged.append((step, row["loss"])), finish=lambda: logged.append("end"))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda **given: logged.append(given["id"]) or run))
    with monitor_of(tmp_path / "my-run", "wandb") as speaker:
        for row in ROWS:
            speaker.log(row)
    name = str(logged[0])
    assert name.startswith("my-run-")
    assert logged[1:] == [(1, 0.7), (2, 0.6), "end"]


def test_only_one_process_tracks(tmp_path: Path) -> None:
    with monitor_of(tmp_path, "tensorboard", is_first=False) as speaker:
        speaker.log(ROWS[0])
    assert not (tmp_path / "tensorboard").exists()


def test_a_tracker_that_is_not_installed_is_reported_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UsageError, match=r"--track wandb: it is not installed. `pip install 'dpocli\[trackers\]'`"):
        check_trackers(["wandb"])
