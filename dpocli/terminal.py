"""What the user sees. stdout carries the result and nothing else; messages, tables on the way and progress go to stderr.

Under a launcher every process makes its own `Terminal`; those other than rank 0 are silent, except for errors.
"""

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, Any, Protocol, TextIO

from rich.console import Console
from rich.style import Style
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 10.0
WIDTH_OF_A_FILE = 160
"""Columns for tables that go to a file or pipe, where there is no window to fit."""


def rank_from_environment() -> int:
    """The number that the launcher gave this process; 0 without a launcher."""
    return int(os.environ.get("RANK") or 0)


class Printer:
    """Writes paragraphs and tables to one stream: coloured on a terminal, plain elsewhere."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        width = None if stream.isatty() else WIDTH_OF_A_FILE
        self._console = _Console(file=stream, width=width, highlight=False, markup=False, emoji=False)

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


class _Console(Console):
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


def format_value(value: object) -> str:
    """A value for people: floats to four significant figures, a dash for what is missing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _is_number(value: object) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool))


class Progress:
    """How far a command is. Made by `Terminal.progress`."""

    def __init__(
        self, display: "_Display", total: int | None, unit: str, initial: int, clock: Callable[[], float]
    ) -> None:
        self._display, self._clock, self._started = display, clock, clock()
        self._state = _State(done=initial, total=total, unit=unit, initial=initial)

    def update(self, pairs: int = 0, tokens: int = 0, advance: int | None = None, **values: float | None) -> None:
        """Something was finished.

        Args:
            pairs: how many pairs, over all processes.
            tokens: how many tokens, over all processes.
            advance: by how much, of what `total` counts; by default one where that is steps, else the pairs.
            values: shown beside the bar (`loss=0.69`) until others of the same names replace them.
        """
        state = self._state
        state.pairs += pairs
        state.tokens += tokens
        state.done += (1 if state.unit == "steps" else pairs) if advance is None else advance
        state.seconds = self._clock() - self._started
        state.values |= {name: value for name, value in values.items() if value is not None}
        self._display.show(state)

    def skip(self, count: int) -> None:
        """So many of the total need no work: they move the bar but are no pairs."""
        self._state.done += count

    def _finish(self) -> None:
        self._state.seconds = self._clock() - self._started
        self._display.finish(self._state)


class _State:
    """The figures that a display shows."""

    def __init__(self, done: int, total: int | None, unit: str, initial: int) -> None:
        self.done, self.total, self.unit, self.initial = done, total, unit, initial
        self.pairs = self.tokens = 0
        self.seconds = 0.0
        self.values: dict[str, float] = {}

    def rates(self) -> str:
        seconds = max(self.seconds, 1e-9)
        figures = [f"{_short(self.pairs / seconds)} pairs/s", f"{_short(self.tokens / seconds)} tokens/s"]
        return ", ".join(figures[: 1 + bool(self.tokens)]) if self.pairs else ""

    def shown_values(self) -> str:
        return ", ".join(f"{name} {format_value(value)}" for name, value in self.values.items())

    def seconds_left(self) -> float | None:
        finished = self.done - self.initial
        if self.total is None or finished <= 0:
            return None
        return self.seconds / finished * (self.total - self.done)


class _Display(Protocol):
    def show(self, state: _State) -> None: ...
    def finish(self, state: _State) -> None: ...


class _Nothing:
    """For every rank but the first."""

    def show(self, state: _State) -> None:
        pass

    def finish(self, state: _State) -> None:
        pass


class _Lines:
    """For log files: one plain line at most every ten seconds, and a last one."""

    def __init__(self, say: Callable[[str], None], description: str) -> None:
        self._say, self._description = say, description
        self._last = 0.0

    def show(self, state: _State) -> None:
        if state.seconds - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = state.seconds
        left = state.seconds_left()
        count = f"{state.done}" if not state.total else f"{state.done}/{state.total}"
        share = "" if not state.total else f" ({state.done / state.total:.0%})"
        self._line(f"{count} {state.unit}{share}", state, "" if left is None else f"{_duration(left)} left")

    def finish(self, state: _State) -> None:
        self._line(f"{state.done} {state.unit} in {_duration(state.seconds)}", state, "")

    def _line(self, count: str, state: _State, left: str) -> None:
        parts = (count, state.rates(), left, state.shown_values())
        self._say(f"{self._description}: " + ", ".join(part for part in parts if part))


class _Bar:
    """For people: a live bar."""

    def __init__(self, stream: TextIO, description: str, total: int | None, unit: str, initial: int) -> None:
        from tqdm import tqdm  # here, since --help should not wait for it

        layout = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} {unit} [{elapsed}<{remaining}{postfix}]"
        self._bar = tqdm(
            desc=description,
            total=total,
            unit=unit,
            initial=initial,
            file=stream,
            dynamic_ncols=True,
            bar_format=layout if total else None,
        )

    def show(self, state: _State) -> None:
        self._bar.set_postfix_str(", ".join(part for part in (state.rates(), state.shown_values()) if part), False)
        self._bar.update(state.done - self._bar.n)

    def finish(self, state: _State) -> None:
        self.show(state)
        self._bar.close()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar away while something else is printed."""
        self._bar.clear()
        yield
        self._bar.refresh()


@dataclass
class Terminal:
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
        self._bar: _Bar | None = None

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
        display: _Display = _Nothing()
        if self.rank == 0:
            if sys.stderr.isatty():
                display = self._bar = _Bar(sys.stderr, description, total, unit, initial)
            else:
                display = _Lines(self.say, description)
        progress = Progress(display, total, unit, initial, self.clock)
        try:
            yield progress
        finally:
            self._bar = None
            progress._finish()

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


def _short(number: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}"
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
