"""The commands on a large cache: how long until they are at work, and the memory that they take; run by `scale.py`."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from environments import ROOT
from scale_world import World

SECONDS_BETWEEN_LOOKS = 0.02
PREEMPTED = 75
REFUSED = 4


@dataclass(frozen=True)
class Took:
    """What a command took."""

    label: str
    milestone: str
    """What was waited for; empty where only the end counts."""
    until_milestone: float | None
    """Seconds since the process was started."""
    after_stop: float | None
    """Seconds from the stop to the end, where it was stopped at the milestone."""
    until_end: float
    peak_bytes: int
    """Largest resident memory."""


def commands(world: World) -> Iterator[Took]:
    """One after the other, each in a new directory."""
    run, report = world.root / "run", world.root / "report"
    cache = [f"--reference={world.cache}"]
    train = ["train", f"--model={world.policy}", *cache, f"--out={run}", "--max-steps=2", "--batch-size=32"]
    evaluate = ["evaluate", f"--model={world.policy}", *cache, f"--out={report}", "--loss=dpo", "--beta=0.1"]
    metrics = run / "metrics.jsonl"

    def first_step(_: str) -> bool:
        return metrics.exists() and '"step": 1' in metrics.read_text()

    def first_check(said: str) -> bool:
        return "Step 0" in said

    def first_line(said: str) -> bool:
        return re.search(r"^evaluate: [\d,]+/", said, re.MULTILINE) is not None

    yield took("train, 2 steps of 32 pairs", train, "first step", first_step, run)
    shutil.rmtree(run)
    held_out = [*train, "--eval-fraction=0.001"]
    yield took("train, then SIGTERM", held_out, "held-out pairs, 0.1%, about to be scored", first_check, run, stop=True)
    shutil.rmtree(run)
    line = "a line of progress (after 10 s of scoring)"
    yield took("evaluate, then SIGTERM", evaluate, line, first_line, report, stop=True)
    shutil.rmtree(report)
    yield took("precompute again: nothing to do", world.precompute_line())
    yield took("precompute, other --max-length: refused", [*world.precompute_line(), "--max-length=600"], code=REFUSED)


def took(
    label: str,
    line: Sequence[str],
    milestone: str = "",
    reached: Callable[[str], bool] = lambda _: False,
    out: Path | None = None,
    *,
    stop: bool = False,
    code: int = 0,
) -> Took:
    """Runs a command line to its end, or stops it where the milestone is reached.

    Args:
        label: of the row in the table.
        line: the arguments of `dpocli`.
        milestone: in words.
        reached: whether it is, from what the command has said so far.
        out: a directory that must not be there yet.
        stop: whether to end it there.
        code: with which it must end, unless it is stopped.
    """
    if out:
        shutil.rmtree(out, ignore_errors=True)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    log = Path(f"/tmp/dpocli-scale-{os.getpid()}.log")
    began = time.perf_counter()
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-m", "dpocli", *line], stdout=subprocess.DEVNULL, stderr=stderr, env=environment
        )
        until_milestone = stopped = None
        while not (ended := os.wait4(process.pid, os.WNOHANG))[0]:
            time.sleep(SECONDS_BETWEEN_LOOKS)
            if milestone and until_milestone is None and reached(log.read_text()):
                until_milestone = time.perf_counter() - began
                if stop:
                    process.send_signal(signal.SIGTERM)
                    stopped = time.perf_counter()
    now = time.perf_counter()
    _, status, usage = ended
    process.returncode = os.waitstatus_to_exitcode(status)
    said = log.read_text()
    log.unlink()
    if process.returncode != (PREEMPTED if stop else code):
        sys.exit(f"{label}: exit status {process.returncode}\n{said[-4000:]}")
    after_stop = None if stopped is None else now - stopped
    return Took(label, milestone, until_milestone, after_stop, now - began, usage.ru_maxrss * 1024)
