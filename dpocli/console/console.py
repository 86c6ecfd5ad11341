"""What the user sees. stdout carries the result and nothing else; messages, tables on the way and progress go to stderr.

Under a launcher every process makes its own `Console`; those other than rank 0 are silent, except for errors.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, TextIO

from rich.console import Console as RichConsole
from rich.style import Style
from rich.table import Table
from rich.text import Text

from dpocli.console.progress import Bar, Display, Lines, Nothing, Progress, format_value

WIDTH_OF_A_FILE = 160
"""Columns for tables that go to a file or pipe, where there is no window to fit."""


def rank_from_environment(launcher: str = "torchrun") -> int:
    """The number that the launcher gave this process; 0 without a launcher."""
    value = os.environ.get("SLURM_PROCID" if launcher == "slurm" else "RANK") or "0"
    return int(value) if value.isdigit() else 0


def lone_process_warning() -> str | None:
    """What to say where `accelerate launch` was to start several processes and started one."""
    given = os.environ
    # Its plain launcher alone sets the first, and the others only for several processes or where they stood there before.
    if not all(given.get(name) for name in ("ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT")) or given.get(
        "WORLD_SIZE"
    ):
        return None
    return (
        "accelerate launch has started this as one process of no group. If several were meant, start with accelerate launch "
        "--multi_gpu (on CPUs too, without --cpu), or with torchrun."
    )


class Printer:
    """Writes paragraphs and tables to one stream: coloured on a terminal, plain elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        width = None if stream.isatty() else WIDTH_OF_A_FILE
        self._console = _QuietConsole(file=stream, width=width, highlight=False, markup=False, emoji=False)

    def say(self, text: str, prefix: str = "", style: str = "") -> None:
        """One paragraph. It is never wrapped, so that commands in it can be copied and logs be searched."""
        self._console.print(Text.assemble((prefix, Style.parse(style)), text), soft_wrap=True)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """A table; columns that hold only numbers (or dashes for missing ones) are aligned to the right."""
        table = Table(title=title or None, title_justify="left", title_style="bold", box=None, pad_edge=False)
        for index, column in enumerate(columns):
            numeric = all(_is_number(row[index]) for row in rows)
            table.add_column(column, justify="right" if numeric else "left", header_style="dim", overflow="fold")
        for row in rows:
            table.add_row(*(Text(format_value(value)) for value in row))
        self._console.print(table)


class _QuietConsole(RichConsole):
    def on_broken_pipe(self) -> None:
        """A reader who has gone away (`| head`, a dead log pipe) is no reason to stop a run of days; rich would."""
        silence(self.file)


def silence(stream: IO[str]) -> None:
    """Point a broken stream at nowhere, so that neither later writes nor the interpreter's last flush complain."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, descriptor)
    os.close(nowhere)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


@dataclass
class Console:
    """Everything that a command says to its user.

    Args:
        json: the result is wanted as one JSON object.
        rank: number of this process; only rank 0 speaks.
        clock: seconds, for tests.
    """

    json: bool = False
    rank: int = 0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._bar: Bar | None = None

    def say(self, text: str) -> None:
        """Tell what is happening."""
        if self.rank == 0:
            self._paragraph(text)

    def warn(self, text: str) -> None:
        """Tell what may be wrong although the command goes on."""
        if self.rank == 0:
            self._paragraph(text, "warning: ", "bold yellow")

    def error(self, text: str) -> None:
        """Tell why the command ends. Every rank may, since only one of them may know."""
        self._paragraph(text, "error: " if self.rank == 0 else f"error (rank {self.rank}): ", "bold red")

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Show figures on the way (those of the result belong into the `render` of `result`)."""
        if self.rank == 0:
            with self._beside_the_bar():
                Printer(sys.stderr).table(title, columns, rows)

    def result(self, data: Mapping[str, Any], render: Callable[[Printer], None]) -> None:
        """Give the result, on stdout: `data` as one JSON object with --json, else what `render` prints."""
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
        """Show how far a long piece of work is.

        Args:
            total: how many there are, where that is known.
            description: a word or two.
            unit: what `total` counts: "pairs", "rows" or "steps".
            initial: how many an earlier run had done already.
        """
        display: Display = Nothing()
        if self.rank == 0:
            if sys.stderr.isatty():
                display = self._bar = Bar(sys.stderr, description, total, unit, initial)
            else:
                display = Lines(self.say, description)
        progress = Progress(display, total, unit, initial, self.clock)
        try:
            yield progress
        finally:
            self._bar = None
            progress.finish()

    def _paragraph(self, text: str, prefix: str = "", style: str = "") -> None:
        with self._beside_the_bar():
            Printer(sys.stderr).say(text, prefix, style)

    @contextmanager
    def _beside_the_bar(self) -> Iterator[None]:
        if self._bar is None:
            yield
        else:
            with self._bar.aside():
                yield


def without_nan(value: Any) -> Any:
    """JSON knows no NaN and no infinity; they become null."""
    if isinstance(value, float):
        return value if value - value == 0 else None
    if isinstance(value, Mapping):
        return {key: without_nan(item) for key, item in value.items()}
    return [without_nan(item) for item in value] if isinstance(value, list | tuple) else value
