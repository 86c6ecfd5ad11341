"""Progress of long work: a live bar on a terminal, now and then a line in a log file."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Counts of a long piece of work, as `Console.progress` shows them. Without a display nothing is shown."""

    def __init__(
        self,
        display: "Bar | Lines | None" = None,
        total: int | None = None,
        unit: str = "pairs",
        initial: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total, self.unit, self.initial, self.done = total, unit, initial, initial
        self.pairs = self.tokens = 0
        self.values: dict[str, float | str] = {}
        self._display, self._clock, self._started = display, clock, clock()

    def update(self, pairs: int = 0, tokens: int = 0, advance: int | None = None, **values: float | str | None) -> None:
        """Count finished work.

        Args:
            pairs: pairs, over all processes.
            tokens: tokens, over all processes.
            advance: how many of `total`; by default 1 where the unit is steps, else `pairs`.
            values: shown beside the bar (`loss=0.69`) until others of the same names replace them.
        """
        self.pairs += pairs
        self.tokens += tokens
        self.done += (1 if self.unit == "steps" else pairs) if advance is None else advance
        self.values |= {name: value for name, value in values.items() if value is not None}
        if self._display:
            self._display.show(self)

    def finish(self) -> None:
        if self._display:
            self._display.finish(self)

    @property
    def seconds(self) -> float:
        return self._clock() - self._started

    @property
    def seconds_left(self) -> float | None:
        """An estimate from this run's own pace; None where there is none."""
        finished = self.done - self.initial
        if self.total is None or finished <= 0:
            return None
        return self.seconds / finished * (self.total - self.done)

    @property
    def rates(self) -> str:
        """Pairs and tokens per second; empty before the first pair."""
        if not self.pairs:
            return ""
        seconds = max(self.seconds, 1e-9)
        pairs, tokens = f"{_short(self.pairs / seconds)} pairs/s", f"{_short(self.tokens / seconds)} tokens/s"
        return f"{pairs}, {tokens}" if self.tokens else pairs

    @property
    def shown_values(self) -> str:
        return ", ".join(f"{name} {format_value(value)}" for name, value in self.values.items())


class Lines:
    """For log files: one plain line at most every ten seconds, and a last one."""

    def __init__(self, say: Callable[[str], None], description: str) -> None:
        self._say, self._description = say, description
        self._last = 0.0

    def show(self, progress: Progress) -> None:
        seconds, done, total, left = progress.seconds, progress.done, progress.total, progress.seconds_left
        if seconds - self._last < SECONDS_BETWEEN_LINES:
            return
        self._last = seconds
        count = f"{done}/{total} {progress.unit} ({done / total:.0%})" if total else f"{done} {progress.unit}"
        self._line(
            count, progress.rates, "" if left is None else f"{format_duration(left)} left", progress.shown_values
        )

    def finish(self, progress: Progress) -> None:
        count = f"{progress.done} {progress.unit} in {format_duration(progress.seconds)}"
        self._line(count, progress.rates, progress.shown_values)

    def _line(self, *parts: str) -> None:
        self._say(f"{self._description}: {', '.join(filter(None, parts))}")


class Bar:
    """For terminals: a live bar."""

    def __init__(self, stream: TextIO, description: str, total: int | None, unit: str, initial: int) -> None:
        from tqdm import tqdm  # here, so that --help does not import it

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

    def show(self, progress: Progress) -> None:
        self._bar.set_postfix_str(", ".join(filter(None, (progress.rates, progress.shown_values))), False)
        self._bar.update(progress.done - self._bar.n)

    def finish(self, progress: Progress) -> None:
        self.show(progress)
        self._bar.close()

    @contextmanager
    def hidden(self) -> Iterator[None]:
        """Clear the bar while something else is printed."""
        self._bar.clear()
        yield
        self._bar.refresh()


def format_value(value: object) -> str:
    """A value for people: floats with four significant figures, a dash for None."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4f}" if value == 0 or 1e-3 <= abs(value) < 1e4 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def format_duration(seconds: float) -> str:
    """`m:ss`, or `h:mm:ss` from one hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _short(number: float) -> str:
    for factor, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= factor:
            return f"{number / factor:.1f}{suffix}"
    return f"{number:.0f}" if number >= 10 else f"{number:.1f}"
