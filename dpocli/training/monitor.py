"""What a run tells while it trains: rows, the live line, warnings in words, and its curves."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from dpocli.console.console import Console
from dpocli.console.progress import Progress
from dpocli.report.training_curves import draw_curves
from dpocli.run.directory import RunDirectory
from dpocli.training.diagnostics import Diagnostics
from dpocli.training.trackers import Trackers
from dpocli.training.trainer import StepOutcome, Trainer

SECONDS_BETWEEN_DRAWINGS = 30.0

DRAWING_TAKES_AT_MOST = 0.02
"""Share of the time that goes into curves between the first step and the last."""


class Monitor:
    """Speaks for a run; on other processes than the first, to nobody."""

    def __init__(
        self,
        trainer: Trainer,
        out: RunDirectory,
        trackers: Trackers,
        console: Console,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._trainer, self._out, self._trackers, self._terminal = trainer, out, trackers, console
        self._clock = clock
        self._watch = Diagnostics(trainer.loss, trainer.schedule)
        self._progress: Progress | None = None
        self._next_drawing = clock() + SECONDS_BETWEEN_DRAWINGS
        self._draws = trainer.processes.is_first
        self._slowest_save = 0.0

    def check_stop(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Takes in the rows of earlier starts; what was said of them is not said again."""
        for row in rows:
            self._watch.see(row)

    def log(self, row: Mapping[str, float]) -> None:
        """A row of `metrics.jsonl`, and what is to be said about it."""
        self._out.metrics.append(row)
        self._trackers.log(row)
        for warning in self._watch.see(row):
            self._terminal.warn(f"Step {warning.step}: {warning.text}")

    def warn(self, text: str) -> None:
        """What may be wrong although the run goes on."""
        self._terminal.warn(text)

    @contextmanager
    def progress(self, done: int) -> Iterator[None]:
        """The live line, while there are steps."""
        last = self._trainer.schedule.num_steps
        with self._terminal.progress(last, "train", unit="steps", initial=done) as self._progress:
            yield

    def show(self, outcome: StepOutcome) -> None:
        """A step on the live line."""
        assert self._progress
        if not self._trainer.processes.is_first:
            return
        account = self._trainer.account
        share = self._trainer.throughput.share_of_the_rate(account.seconds_of_this_start("training"))
        self._progress.update(
            pairs=outcome.num_pairs,
            tokens=outcome.num_tokens,
            loss=outcome.metrics["loss"],
            accuracy=outcome.metrics["rewards/accuracies"],
            margin=outcome.metrics["rewards/margins"],
            MFU=None if share is None else f"{share:.0%}",
            memory=f"{account.peak_bytes / 2**30:.1f} GiB",
        )

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a checkpoint: what it took, where that is news, and a warning where it is too long to survive a preemption."""
        began = self._clock()
        yield
        seconds, grace = self._clock() - began, self._trainer.options.checkpoints.grace_seconds
        if seconds <= 2 * self._slowest_save:
            return
        self._slowest_save = seconds
        self._terminal.say(f"Saving a checkpoint took {seconds:.1f} s.")
        if seconds > grace:
            self._terminal.warn(
                f"That is longer than the {grace:g} s between a stop signal and the kill (--grace-seconds): a run that is "
                "preempted then loses the steps since its last checkpoint. Raise the launcher's limit (torchrun "
                "--shutdown-timeout, SLURM's --signal=B:USR1@SECONDS) or save more often with --save-every."
            )

    def draw(self) -> None:
        """`curves.png` of the rows so far, unless that would take too much of the run's time."""
        began = self._clock()
        if not self._draws or began < self._next_drawing:
            return
        self._draws = draw_curves_or_warn(self._out, self._terminal)
        ended = self._clock()
        self._next_drawing = ended + max(SECONDS_BETWEEN_DRAWINGS, (ended - began) / DRAWING_TAKES_AT_MOST)


def draw_curves_or_warn(out: RunDirectory, console: Console) -> bool:
    """Draws `curves.png`. A picture is no reason to lose a run: False where it cannot be drawn, which is said."""
    try:
        draw_curves(out.metrics.rows(), out.path / "curves.png")
    except Exception as error:
        console.warn(f"curves.png could not be drawn ({type(error).__name__}: {error}). The run goes on without it.")
        return False
    return True
