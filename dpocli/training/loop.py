"""The run of steps: held-out evaluations, log lines and checkpoints between them, and a stop where one is requested."""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dpocli.config.commands import TrainOptions
from dpocli.distributed.processes import StopRequest
from dpocli.distributed.signals import StopFlag
from dpocli.errors import NumericsError, PreemptedError
from dpocli.run.directory import RunDirectory
from dpocli.training.model_selection import ModelSelection
from dpocli.training.monitor import Monitor
from dpocli.training.trainer import Trainer


def train_loop(trainer: Trainer, done: int, out: RunDirectory, stop: StopFlag, monitor: Monitor) -> int:
    """Run the steps after `done` to the last, or to where the held-out loss has stopped to improve.

    Returns:
        The step at which the run has ended; there is a checkpoint of it.

    Raises:
        PreemptedError: a stop was requested; a checkpoint is written.
        NumericsError: a loss or a gradient is not finite; the checkpoints are as they were.
    """
    setup = trainer.setup
    options, processes, last = setup.options, setup.processes, setup.schedule.num_steps
    tenth = max(1, round(last / 10))
    save_every, eval_every = options.checkpoints.save_every or tenth, options.held_out.every or tenth
    request = StopRequest(stop, out, processes)
    deadline = out.started + 60 * (options.checkpoints.max_minutes or math.inf)

    def is_due(step: int) -> bool:
        return setup.held_out is not None and (step % eval_every == 0 or step == last)

    def evaluation(step: int) -> dict[str, float] | None:
        """Held-out metrics where they are due; None where they were cut short."""
        if not is_due(step):
            return {}
        with monitor.stats.timing("evaluation"), _naming_last_finite(trainer):
            return trainer.held_out(request)

    def stopped(step: int) -> PreemptedError:
        saved = "with a checkpoint" if step else "before the first"
        return PreemptedError(
            f"Stopped on request after step {step} of {last}, {saved}. Rerun the same command to resume."
        )

    out.metrics.truncate_after(done or -1)
    if processes.is_first and (
        text := lost_rows_warning(out.metrics.path, out.metrics.rows(), done, trainer.rows_before, options)
    ):
        monitor.warn(text)
    row = _row_without_evaluation(out, done, setup.schedule.steps_per_epoch)
    monitor.resume([known for known in out.metrics.rows() if not (row and is_due(done)) or known["step"] != done])
    # One process reads the file, and all follow it.
    if is_due(done) and processes.any(processes.is_first and row is not None):
        if (evaluated := evaluation(done)) is None:
            raise stopped(done)
        out.metrics.truncate_after(done - 1)
        monitor.log((row or {}) | evaluated)
    selection = ModelSelection(options, out.metrics.rows(), processes, done)
    if selection.has_stalled():
        last = done
    with monitor.progress():
        for step in range(done + 1, last + 1):
            with monitor.stats.timing("training"), _naming_last_finite(trainer):
                outcome = trainer.step(step)
            row = {"step": step, "epoch": step / setup.schedule.steps_per_epoch} | outcome.metrics
            evaluated = evaluation(step)
            if evaluated:
                selection.add(row | evaluated)
            ends = step == last or (bool(evaluated) and selection.has_stalled())
            if step % options.logging.log_every == 0 or ends or evaluated != {}:
                monitor.log(row | (evaluated or {}))
            monitor.show(outcome)
            out.update(step=step)
            # The time is looked at after a step, so that every start makes one, however short its time is.
            stopping = request.agreed() or processes.any(time.monotonic() >= deadline)
            if ends or step % save_every == 0 or stopping or selection.is_best_at(step):
                # Rows first: what decides (which step was the best, when to stop) must be there with the checkpoint.
                out.metrics.sync()
                with monitor.saving():
                    trainer.save(step, out.metrics.num_rows, monitor.stats.to_json())
                selection.saved(step)
                monitor.draw()
            if stopping and (not ends or evaluated is None):
                raise stopped(step)
            if ends:
                return step
    return done


@contextmanager
def _naming_last_finite(trainer: Trainer) -> Iterator[None]:
    """Add to an error of bad numbers which checkpoint is still good."""
    try:
        yield
    except NumericsError as error:
        good = trainer.last_finite_checkpoint()
        raise NumericsError(f"{error} The last good checkpoint: {good or 'there is none'}.") from error


def _row_without_evaluation(out: RunDirectory, done: int, steps_per_epoch: int) -> dict[str, float] | None:
    """The row of the last step that is done, where its held-out evaluation was cut short.

    Before the first step that is a row of nothing but its number: the policy is measured before it is trained. So is it
    where the row is missing, as after a kill between its removal and its return with the evaluation.
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
    """What to say where rows are missing; None where all are there.

    It is a warning and no error: the weights are whole, nobody may be at the terminal, and only repeating the steps would
    bring the rows back. What --keep-best needs most is in `best.json` too, and is taken from there.

    Args:
        path: of `metrics.jsonl`.
        rows: of it, up to the step `done`.
        done: the step that the run resumes from.
        expected: how many there were when the checkpoint was written; None where it does not say.
        options: of the run.
    """
    if expected is None or len(rows) >= expected:
        return None
    there, apart = {row.get("step") for row in rows}, options.logging.log_every
    missing = [step for step in range(apart, done + 1, apart) if step not in there]
    which = f" (steps {_ranges(missing, apart)})" if missing else ""
    deciding = {"--keep-best": options.held_out.keep_best, "--early-stopping": options.held_out.early_stopping}
    needing = " and ".join(flag for flag, value in deciding.items() if value)
    lost = (
        f" Held-out evaluations in them are lost for {needing}: only the remaining ones, and the one that "
        "checkpoints/best.json names, are compared with later ones."
        if needing
        else ""
    )
    return (
        f"{path}: {expected - len(rows):,} of the {expected:,} rows up to step {done} are missing{which}, so that the curves "
        f"and the summary have a gap. The weights are whole, and the run continues.{lost} If there is a copy of the file, stop "
        "the run, put the copy back and rerun the same command."
    )


def _ranges(steps: Sequence[int], apart: int) -> str:
    """Ascending numbers as ranges: 1 to 4, 7."""
    runs: list[tuple[int, int]] = []
    for step in steps:
        if runs and runs[-1][1] == step - apart:
            runs[-1] = (runs[-1][0], step)
        else:
            runs.append((step, step))
    shown = ", ".join(f"{first} to {last}" if last > first else str(first) for first, last in runs[:5])
    return shown + (", …" if len(runs) > 5 else "")
