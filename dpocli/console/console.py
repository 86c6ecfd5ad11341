"""Output of a command: the result on stdout; messages, tables and progress on stderr.

Every process of a launcher makes its own `Console`. Those other than rank 0 are silent, except for errors.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import IO, Any, TextIO

from rich.console import Console as RichConsole
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dpocli.console.progress import Bar, Lines, Progress, format_value

WIDTH_OF_A_FILE = 160
"""Columns of tables in a file or pipe, which has no window to fit."""


@dataclass
class Console:
    """Output of one process.

    Args:
        json: print the result as one JSON object.
        rank: number of this process; only rank 0 prints.
        clock: seconds, for tests.
    """

    json: bool = False
    rank: int = 0
    clock: Callable[[], float] = time.monotonic
    _bar: Bar | None = field(default=None, init=False, repr=False)

    def say(self, text: str) -> None:
        """Print a message."""
        if self.rank == 0:
            self._paragraph(text)

    def warn(self, text: str) -> None:
        """Print a warning; the command continues."""
        if self.rank == 0:
            self._paragraph(text, "warning: ", "bold yellow")

    def error(self, text: str) -> None:
        """Print why the command ends. Every rank may, since perhaps only one knows."""
        self._paragraph(text, "error: " if self.rank == 0 else f"error (rank {self.rank}): ", "bold red")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table that is not part of the result."""
        if self.rank == 0:
            with self._bar.hidden() if self._bar else nullcontext():
                Printer(sys.stderr).table(title, columns, rows)

    def result(self, data: Mapping[str, Any], render: Callable[["Printer"], None]) -> None:
        """Print the result on stdout: `data` as one JSON object with --json, else what `render` prints."""
        if self.rank != 0:
            return
        if not self.json:
            render(Printer(sys.stdout))
            return
        try:
            print(json.dumps(without_nan(data), ensure_ascii=False, default=str), flush=True)
        except BrokenPipeError:
            silence(sys.stdout)

    @contextmanager
    def progress(
        self, total: int | None, description: str, unit: str = "pairs", initial: int = 0
    ) -> Iterator[Progress]:
        """Show the progress of a long piece of work.

        Args:
            total: how many there are; None where that is unknown.
            description: a word or two.
            unit: what `total` counts: "pairs", "rows" or "steps".
            initial: how many an earlier run has done.
        """
        display: Bar | Lines | None = None
        if self.rank == 0 and sys.stderr.isatty():
            display = self._bar = Bar(sys.stderr, description, total, unit, initial)
        elif self.rank == 0:
            display = Lines(self.say, description)
        progress = Progress(display, total, unit, initial, self.clock)
        try:
            yield progress
        finally:
            self._bar = None
            progress.finish()

    def _paragraph(self, text: str, prefix: str = "", style: str = "") -> None:
        with self._bar.hidden() if self._bar else nullcontext():
            Printer(sys.stderr).say(text, prefix, style)


class Printer:
    """Writes paragraphs and tables to one stream: coloured on a terminal, plain elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        width = None if stream.isatty() else WIDTH_OF_A_FILE
        self._console = _QuietConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)

    def say(self, text: str, prefix: str = "", style: str = "") -> None:
        """Print one paragraph, never wrapped, so that commands in it can be copied and logs be searched."""
        self._console.print(Text.assemble((prefix, Style.parse(style)), text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Print a table; columns of numbers (or None) are aligned to the right."""
        table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            numeric = all(_is_number(row[index]) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", header_style="dim", overflow="fold")
        for row in rows:
            table.add_row(*(Text(format_value(value)) for value in row))
        self._console.print(table)


class _QuietConsole(RichConsole):
    def on_broken_pipe(self) -> None:
        """Ignore a closed pipe (`| head`, a dead log): rich would exit, and end a run of days."""
        silence(self.file)


def silence(stream: IO[str]) -> None:
    """Redirect a broken stream to the null device, so that later writes and the interpreter's last flush succeed."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, descriptor)
    os.close(null)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


def without_nan(value: Any) -> Any:
    """Replace NaN and infinity, which JSON does not have, by None."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value


def rank_from_environment(launcher: str = "torchrun") -> int:
    """Rank of this process by its launcher's variables; 0 without a launcher."""
    value = os.environ.get("SLURM_PROCID" if launcher == "slurm" else "RANK") or "0"
    return int(value) if value.isdigit() else 0


def lone_process_warning() -> str | None:
    """A warning where `accelerate launch` started one process without a process group."""
    # Its simple launcher alone sets the first; the others are set for several processes, or were set before.
    names = ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT")
    if not all(map(os.environ.get, names)) or os.environ.get("WORLD_SIZE"):
        return None
    return (
        "accelerate launch has started this as one process of no group. If several were meant, start with accelerate launch "
        "--multi_gpu (on CPUs too, without --cpu), or with torchrun."
    )
