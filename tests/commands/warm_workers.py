"""Workers of `precompute` as processes of their own, forked from one that is warm: cheap to kill."""

import importlib
import itertools
import multiprocessing
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import torch

from dpocli.cache.writer import CacheWriter
from dpocli.cli import run_command_line
from dpocli.commands.reference import Reference
from dpocli.distributed.signals import EarlyStop

BEGUN, WRITTEN = "begun", "written"
HELD = "held here"

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.commands.warmed_up"])


@dataclass
class Tally:
    """What all workers on one cache did: a line a tile, in a file that each appends to."""

    path: Path

    def count(self, event: str, first_row: int, num_rows: int) -> None:
        with self.path.open("a") as file:
            file.write(f"{event} {first_row} {num_rows}\n")

    def events(self, event: str) -> list[tuple[int, int]]:
        """(first row, number of rows) of each tile that was begun or written, as often as it was."""
        lines = [line.split() for line in self.path.read_text().splitlines()] if self.path.exists() else []
        return [(int(first), int(count)) for name, first, count in lines if name == event]

    def rows(self, event: str) -> int:
        return sum(count for _, count in self.events(event))

    def lost_tiles(self, parts: Sequence[str]) -> int:
        """Tiles that were begun and not written, counted as often as that happened."""
        begun, written = (Counter(first for first, _ in self.events(event)) for event in (BEGUN, WRITTEN))
        there = {int(name.split("-")[1]) for name in parts}
        # A worker may be killed after its part has its name, and before it counts it.
        return sum(begun[first] - max(written[first], first in there) for first in begun)


@dataclass
class Worker:
    """A running command line, all that it says in `log`."""

    process: ForkServerProcess
    log: Path

    @classmethod
    def start(
        cls, line: Sequence[object], log: Path, tally: Tally | None = None, hold: tuple[str, int] | None = None
    ) -> "Worker":
        process = _FORKED.Process(target=_work, args=([str(word) for word in line], log, tally, hold))
        process.start()
        return cls(process, log)

    @classmethod
    def start_held(cls, method: str, number: int, line: Sequence[object], log: Path) -> "Worker":
        """Start a command that stops before it calls a method ("module:Class.method") for the `number`th time.

        So a kill comes in time on any machine.
        """
        worker = cls.start(line, log, hold=(method, number))
        worker.wait_until(lambda: log.exists() and HELD in log.read_text())
        return worker

    @property
    def is_alive(self) -> bool:
        return self.process.is_alive()

    @property
    def pid(self) -> int:
        assert self.process.pid
        return self.process.pid

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.is_alive, self.log.read_text()
            assert time.monotonic() < deadline, "what the test waits for did not happen"
            time.sleep(0.01)

    def end(self, number: signal.Signals | None = None) -> int:
        """The exit code (negative: of a signal), after a signal if one is given."""
        if number is not None and self.is_alive:
            os.kill(self.pid, number)
        self.process.join(120)
        code = self.process.exitcode
        assert code is not None, "the worker does not end"
        self.process.close()
        return code


def _work(line: list[str], log: Path, tally: Tally | None, hold: tuple[str, int] | None) -> None:
    early_stop = EarlyStop()
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if tally:
        _count(Reference, "complete", lambda pairs: tally.count(BEGUN, pairs[0].row, len(pairs)), before=True)
        _count(CacheWriter, "write", lambda tile: tally.count(WRITTEN, tile.start, tile.num_rows), before=False)
    if hold:
        _hold(*hold)
    sys.exit(run_command_line(line, early_stop))


def _hold(name: str, number: int) -> None:
    module, _, place = name.partition(":")
    class_name, _, method_name = place.partition(".")
    owner = getattr(importlib.import_module(module), class_name)
    method, calls = getattr(owner, method_name), itertools.count(1)

    def held(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            print(HELD, flush=True)
            time.sleep(3600)
        return method(*arguments, **named)

    setattr(owner, method_name, held)


def _count(owner: type, name: str, count: Callable[[Any], None], *, before: bool) -> None:
    """Replace a method by one that also counts, by its first argument."""
    method = getattr(owner, name)

    def counting(self: object, first: Any, *more: Any, **named: Any) -> Any:
        if before:
            count(first)
        result = method(self, first, *more, **named)
        if not before:
            count(first)
        return result

    setattr(owner, name, counting)
