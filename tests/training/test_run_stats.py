"""What a run takes, added up over its starts; and curves that cost next to nothing on the way."""

import json
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Console
from dpocli.training import monitor
from dpocli.training.monitor import Monitor
from dpocli.training.run_stats import RunStats
from dpocli.training.schedule import Schedule

CPU = torch.device("cpu")


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_seconds_add_up_over_starts() -> None:
    clock = Clock()
    first = RunStats(CPU, clock)
    with first.of("training"):
        clock.now += 5
    clock.now += 100
    with first.of("checkpoints"):
        clock.now += 1
    first.notes["step0"] = {"mean": 0.5}
    second = RunStats(CPU, clock)
    second.check_stop(json.loads(json.dumps(first.to_json())))
    with second.of("training"):
        clock.now += 2
    assert (second.seconds("training"), second.seconds_of_this_start("training")) == (7, 2)
    assert second.to_json()["seconds"] == {"training": 7, "evaluation": 0, "checkpoints": 1}
    assert (second.starts, second.notes) == (2, {"step0": {"mean": 0.5}})


def test_the_peak_of_a_start_before_counts() -> None:
    account = RunStats(CPU)
    assert 1 << 20 < account.peak_bytes < 1 << 40
    account.check_stop(account.to_json() | {"peak_memory_bytes": 1 << 50})
    assert account.peak_bytes == 1 << 50


def test_a_checkpoint_of_an_older_version_has_no_account() -> None:
    account = RunStats(CPU)
    account.check_stop({})
    assert account.starts == 1


@pytest.mark.parametrize(("cost", "between"), [(0.1, 30.0), (3.0, 150.0)])
def test_curves_are_drawn_now_and_then(
    cost: float, between: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After half a minute at the earliest, and never for more than a fiftieth of the time."""
    clock, drawn = Clock(), []

    def draw(*_: object) -> None:
        drawn.append(clock.now)
        clock.now += cost

    monkeypatch.setattr(monitor, "draw_curves", draw)
    trainer = SimpleNamespace(
        loss=LossChoice.of("dpo"), schedule=Schedule(8, 2, 4, 0), processes=SimpleNamespace(is_first=True)
    )
    out = SimpleNamespace(path=tmp_path, metrics=SimpleNamespace(rows=list))
    speaker = Monitor(cast(Any, trainer), cast(Any, out), cast(Any, None), Console(), clock)
    while clock.now < 1000:
        clock.now += 1
        speaker.draw()
    assert drawn[0] == 30
    gaps = [later - earlier - cost for earlier, later in pairwise(drawn)]
    assert all(between <= round(gap, 6) <= between + 1 for gap in gaps), gaps
    assert len(gaps) > 3
