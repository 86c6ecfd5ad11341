"""One process that opens a cache, reads from it and looks through it; run by `scale.py`. Imports no torch."""

import json
import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dpocli.cache.data_report import DataReport
from dpocli.cache.reader import PairStore

BATCH = 128
BATCHES = 30
WINDOW = 4096
"""Pairs that `evaluate` sorts by length together."""
WINDOWS = 5
PASS = 2
"""Pairs that go through a model at once on a CPU."""
SAMPLE_SECONDS = 0.005

Found = TypeVar("Found")


@dataclass(frozen=True)
class Phase:
    """What one part of the measurement took."""

    seconds: float
    cpu_seconds: float
    """Of all threads: steadier than the clock where other work runs beside."""
    num_pairs: int
    before: int
    """Anonymous bytes before it."""
    peak: int
    """Most anonymous bytes during it."""
    after: int


def anonymous_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "the kernel does not tell anonymous memory"
    return int(found[1]) * 1024


def measured(num_pairs: int, work: Callable[[], Found]) -> tuple[Found, Phase]:
    """What the work gives, and what it took."""
    ended = threading.Event()
    before = anonymous_bytes()
    seen = [before]

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began, began_on_cpu = time.perf_counter(), time.process_time()
    try:
        result = work()
    finally:
        seconds, on_cpu = time.perf_counter() - began, time.process_time() - began_on_cpu
        ended.set()
        watcher.join()
    after = anonymous_bytes()
    return result, Phase(seconds, on_cpu, num_pairs, before, max(*seen, after), after)


def measure(directory: Path, num_pairs: int) -> dict[str, Any]:
    """For the table; in a process that has done nothing else."""
    phases: dict[str, Phase] = {}
    store, phases["open: the start of train and evaluate"] = measured(num_pairs, lambda: PairStore.open(directory))
    shuffled = np.random.default_rng(0).permutation(len(store))

    def at_random(first: int) -> None:
        for start in range(first, first + BATCH * BATCHES, BATCH):
            store.load(shuffled[start : start + BATCH])

    def one_after_another() -> None:
        for start in range(0, min(len(store), WINDOW * WINDOWS), WINDOW):
            by_length = start + np.argsort(-store.pair_lengths[start : start + WINDOW])
            for place in range(0, len(by_length), PASS):
                store.load(by_length[place : place + PASS])

    for turn, name in enumerate(("shuffled, as train reads", "shuffled, as many again")):
        _, phases[name] = measured(BATCH * BATCHES, lambda turn=turn: at_random(turn * BATCH * BATCHES))
    _, phases["in order, as evaluate reads"] = measured(min(len(store), WINDOW * WINDOWS), one_after_another)
    _, phases["triage"] = measured(num_pairs, lambda: DataReport.of(store))
    return {
        "tokens": sum(store.counts[f"{name}_tokens"] for name in ("prompt", "chosen", "rejected")),
        "phases": {name: asdict(phase) for name, phase in phases.items()},
    }


if __name__ == "__main__":
    print(json.dumps(measure(Path(sys.argv[1]), int(sys.argv[2]))))
