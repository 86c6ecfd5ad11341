"""How far a long piece of work is: a live bar for people, a line now and then for log files."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

SECONDS_BETWEEN_LINES = 10.0


def format_value(value: object) -> str:
    """A value for people: floats to four significant figures, a dash for what is missing."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


class Progress:
    """How far a command is. Made by `Terminal.progress`."""

    def __init__(
        self, display: "Display", total: int | None, unit: str, initial: int, clock: Callable[[], float]
    ) -> None:
        self._display, self._clock, self._started = display, clock, clock()
        self._state = _State(done=initial, total=total, unit=unit, initial=initial)

    def update(self, pairs: int = 0, tokens: int = 0, advance: int | None = None, **values: float | str | None) -> None:
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

    def finish(self) -> None:
        self._state.seconds = self._clock() - self._started
        self._display.finish(self._state)


class _State:
    """The figures that a display shows."""

    def __init__(self, done: int, total: int | None, unit: str, initial: int) -> None:
        self.done, self.total, self.unit, self.initial = done, total, unit, initial
        self.pairs = self.tokens = 0
        self.seconds = 0.0
        self.values: dict[str, float | str] = {}

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


class Display(Protocol):
    """Where the figures are shown."""

    def show(self, state: _State) -> None: ...
    def finish(self, state: _State) -> None: ...


class Nothing:
    """For every rank but the first."""

    def show(self, state: _State) -> None:
        pass

    def finish(self, state: _State) -> None:
        pass


class Lines:
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
        self._line(f"{count} {state.unit}{share}", state, "" if left is None else f"{format_duration(left)} left")

    def finish(self, state: _State) -> None:
        self._line(f"{state.done} {state.unit} in {format_duration(state.seconds)}", state, "")

    def _line(self, count: str, state: _State, left: str) -> None:
        parts = (count, state.rates(), left, state.shown_values())
        self._say(f"{self._description}: " + ", ".join(part for part in parts if part))


class Bar:
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


def _short(number: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}"
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"


def format_duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
