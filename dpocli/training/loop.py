"""The run of steps: held-out evaluations, log lines and checkpoints between them, and a stop where one is asked for."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpocli.cache.view import PairView
from dpocli.config.commands import TrainOptions
from dpocli.distributed.signals import StopFlag
from dpocli.errors import NumericsError, PreemptedError
from dpocli.run.directory import RunDirectory
from dpocli.training.model_selection import Course
from dpocli.training.monitor import Monitor
from dpocli.training.trainer import Trainer


def run_steps(
    trainer: Trainer,
    first: int,
    held_out: PairView | None,
    checkpoints: Path,
    out: RunDirectory,
    stop: StopFlag,
    monitor: Monitor,
) -> int:
    """Runs step `first` to the last, or to where the held-out loss has stopped to improve.

    Returns:
        The step at which the run has ended; there is a checkpoint of it.

    Raises:
        PreemptedError: asked to stop; a checkpoint is written.
        NumericsError: a loss or a gradient is not finite; the checkpoints are as they were.
    """
    options, last = trainer.options, trainer.schedule.num_steps
    tenth = max(1, round(last / 10))
    save_every, eval_every = options.checkpoints.save_every or tenth, options.held_out.every or tenth

    deadline = out.started + 60 * (options.checkpoints.max_minutes or math.inf)

    def asked_to_stop() -> bool:
        return trainer.processes.any(bool(stop) or out.stop_requested())

    def time_is_up() -> bool:
        # Asked after a step, so that every turn makes one, however short its time is.
        return trainer.processes.any(time.monotonic() >= deadline)

    def is_due(step: int) -> bool:
        return held_out is not None and (step % eval_every == 0 or step == last)

    def evaluation(step: int) -> dict[str, float] | None:
        """Held-out metrics where they are due; None where they were cut short."""
        if held_out is None or not is_due(step):
            return {}
        with trainer.account.of("evaluation"), _naming_the_last_good(trainer, checkpoints):
            return trainer.held_out(held_out, asked_to_stop)

    def stopped(step: int) -> PreemptedError:
        saved = "with a checkpoint" if step else "before the first"
        return PreemptedError(
            f"Stopped on request after step {step} of {last}, {saved}. The same command line goes on."
        )

    done = first - 1
    out.metrics.truncate_after(done or -1)
    if trainer.processes.is_first and (
        text := lost_rows_warning(out.metrics.path, out.metrics.rows(), done, trainer.rows_before, options)
    ):
        monitor.warn(text)
    row = _row_without_evaluation(out, done, trainer.schedule.steps_per_epoch)
    monitor.check_stop([known for known in out.metrics.rows() if not (row and is_due(done)) or known["step"] != done])
    # One process looks at the file, and all go by it.
    if is_due(done) and trainer.processes.any(trainer.processes.is_first and row is not None):
        if (evaluated := evaluation(done)) is None:
            raise stopped(done)
        out.metrics.truncate_after(done - 1)
        monitor.log((row or {}) | evaluated)
    course = Course(options, checkpoints, out.metrics.rows(), trainer.processes, done)
    if course.has_stalled():
        last = done
    with monitor.progress(done):
        for step in range(first, last + 1):
            with trainer.account.of("training"), _naming_the_last_good(trainer, checkpoints):
                outcome = trainer.step(step)
            row = {"step": step, "epoch": step / trainer.schedule.steps_per_epoch} | outcome.metrics
            evaluated = evaluation(step)
            if evaluated:
                course.add(row | evaluated)
            ends = step == last or (bool(evaluated) and course.has_stalled())
            if step % options.logging.log_every == 0 or ends or evaluated != {}:
                monitor.log(row | (evaluated or {}))
            monitor.show(outcome)
            out.update(step=step)
            stopping = asked_to_stop() or time_is_up()
            if ends or step % save_every == 0 or stopping or course.is_best_at(step):
                # Rows first: what decides (which step was the best, when to stop) must be there with the checkpoint.
                out.metrics.sync()
                with trainer.account.of("checkpoints"), monitor.saving():
                    trainer.save(checkpoints, step, out.metrics.num_rows)
                course.saved(step)
                monitor.draw()
            if stopping and (not ends or evaluated is None):
                raise stopped(step)
            if ends:
                return step
    return done


@contextmanager
def _naming_the_last_good(trainer: Trainer, checkpoints: Path) -> Iterator[None]:
    """Adds to the message that numbers went bad where good ones can still be had."""
    try:
        yield
    except NumericsError as error:
        good = trainer.last_finite_checkpoint(checkpoints)
        raise NumericsError(f"{error} The last good checkpoint: {good or 'there is none'}.") from error


def _row_without_evaluation(out: RunDirectory, done: int, steps_per_epoch: int) -> dict[str, float] | None:
    """The row of the last step that is done, where its held-out evaluation was cut short.

    Before the first step that is a row of nothing but its number: the policy is measured before it is trained. So is it
    where the row is gone, as after a kill between taking it away and putting it back with its evaluation.
    """
    if not done:
        return {"step": 0}
    rows = out.metrics.rows()
    if not rows or rows[-1]["step"] != done:
        return {"step": done, "epoch": done / steps_per_epoch}
    return None if any(name.startswith("eval/") for name in rows[-1]) else rows[-1]


def lost_rows_warning(
    path: Path, rows: Sequence[Mapping[str, Any]], done: int, expected: int | None, options: TrainOptions
) -> str | None:
    """What is to be said where rows are gone; None where all are there.

    It is a warning and no error: the weights are whole, nobody may be at the terminal, and nothing but doing the steps
    again would bring the rows back. What --keep-best needs most is in `best.json` too, and is taken from there.

    Args:
        path: of `metrics.jsonl`.
        rows: of it, up to the step `done`.
        done: the step that the run goes on from.
        expected: how many there were when the checkpoint was written; None where it does not say.
        options: of the run.
    """
    if expected is None or len(rows) >= expected:
        return None
    there = {row.get("step") for row in rows}
    gone = [step for step in range(options.logging.log_every, done + 1, options.logging.log_every) if step not in there]
    which = f" (those of steps {_ranges(gone, options.logging.log_every)})" if gone else ""
    needing = [flag for flag, value in _by_history(options) if value]
    lost = (
        f" Held-out evaluations in them are lost for {' and '.join(needing)}: only those still there, and the one that "
        "checkpoints/best.json names, are compared with what comes."
        if needing
        else ""
    )
    return (
        f"{path}: {expected - len(rows):,} of the {expected:,} rows up to step {done} are gone{which}, so that the curves "
        f"and the summary have a gap. The weights are whole, and the run goes on.{lost} If there is a copy of the file, stop "
        "the run, put the copy back and give the same command line again."
    )


def _by_history(options: TrainOptions) -> list[tuple[str, object]]:
    return [("--keep-best", options.held_out.keep_best), ("--early-stopping", options.held_out.early_stopping)]


def _ranges(steps: Sequence[int], apart: int) -> str:
    """Ascending numbers in words: 1 to 4, 7."""
    runs: list[tuple[int, int]] = []
    for step in steps:
        if runs and runs[-1][1] == step - apart:
            runs[-1] = (runs[-1][0], step)
        else:
            runs.append((step, step))
    return ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in runs[:5]) + (
        ", …" if len(runs) > 5 else ""
    )
