"""The run of steps: held-out evaluations, log lines and checkpoints between them, and a stop where one is asked for."""

import math
import time
from collections.abc import Mapping
from pathlib import Path

from dpocli.artifacts.run_dir import RunDirectory
from dpocli.engine.passes import PairView
from dpocli.engine.stop import StopFlag
from dpocli.engine.trackers import Trackers
from dpocli.engine.trainer import StepOutcome, Trainer
from dpocli.errors import PreemptedError
from dpocli.progress import Progress
from dpocli.terminal import Terminal


def run_steps(
    trainer: Trainer,
    first: int,
    held_out: PairView | None,
    checkpoints: Path,
    out: RunDirectory,
    stop: StopFlag,
    trackers: Trackers,
    terminal: Terminal,
) -> None:
    """Runs step `first` to the last.

    Raises:
        PreemptedError: asked to stop; a checkpoint is written.
        NumericsError: a loss or a gradient is not finite; the checkpoints are as they were.
    """
    options, last = trainer.options, trainer.schedule.num_steps
    tenth = max(1, round(last / 10))
    save_every, eval_every = options.save_every or tenth, options.eval_every or tenth

    def log(row: Mapping[str, float]) -> None:
        out.metrics.append(row)
        trackers.log(row)

    deadline = out.started + 60 * (options.max_minutes or math.inf)
    slowest_save = 0.0

    def asked_to_stop() -> bool:
        return trainer.processes.any(bool(stop) or out.stop_requested())

    def time_is_up() -> bool:
        # Asked after a step, so that every turn makes one, however short its time is.
        return trainer.processes.any(time.monotonic() >= deadline)

    def save(step: int) -> None:
        nonlocal slowest_save
        began = time.monotonic()
        trainer.save(checkpoints, step)
        seconds = time.monotonic() - began
        if seconds > 2 * slowest_save:
            slowest_save = seconds
            terminal.say(f"Saving a checkpoint took {seconds:.1f} s.")
            if seconds > options.grace_seconds:
                terminal.warn(
                    f"That is longer than the {options.grace_seconds:g} s between a stop signal and the kill (--grace-seconds): "
                    "a run that is preempted then loses the steps since its last checkpoint. Raise the launcher's limit "
                    "(torchrun --shutdown-timeout, SLURM's --signal=B:USR1@SECONDS) or save more often with --save-every."
                )

    def is_due(step: int) -> bool:
        return held_out is not None and (step % eval_every == 0 or step == last)

    def evaluation(step: int) -> dict[str, float] | None:
        """Held-out metrics where they are due; None where they were cut short."""
        return trainer.held_out(held_out, asked_to_stop) if held_out is not None and is_due(step) else {}

    def stopped(step: int) -> PreemptedError:
        saved = "with a checkpoint" if step else "before the first"
        return PreemptedError(
            f"Stopped on request after step {step} of {last}, {saved}. The same command line goes on."
        )

    done = first - 1
    out.metrics.truncate_after(done or -1)
    row = _row_without_evaluation(out, done)
    # One process looks at the file, and all go by it.
    if is_due(done) and trainer.processes.any(trainer.processes.is_first and row is not None):
        if (evaluated := evaluation(done)) is None:
            raise stopped(done)
        out.metrics.truncate_after(done - 1)
        log((row or {}) | evaluated)
    with terminal.progress(last, "train", unit="steps", initial=done) as progress:
        for step in range(first, last + 1):
            outcome = trainer.step(step)
            row = {"step": step, "epoch": step / trainer.schedule.steps_per_epoch} | outcome.metrics
            evaluated = evaluation(step)
            if step % options.log_every == 0 or step == last or evaluated != {}:
                log(row | (evaluated or {}))
            _show(progress, outcome)
            out.update(step=step)
            stopping = asked_to_stop() or time_is_up()
            if step == last or step % save_every == 0 or stopping:
                save(step)
            if stopping and (step < last or evaluated is None):
                raise stopped(step)


def _row_without_evaluation(out: RunDirectory, done: int) -> dict[str, float] | None:
    """The row of the last step that is done, where its held-out evaluation was cut short.

    Before the first step that is a row of nothing but its number: the policy is measured before it is trained.
    """
    if not done:
        return {"step": 0}
    rows = out.metrics.rows()
    is_cut_short = bool(rows) and rows[-1]["step"] == done and not any(name.startswith("eval/") for name in rows[-1])
    return rows[-1] if is_cut_short else None


def _show(progress: Progress, outcome: StepOutcome) -> None:
    progress.update(
        pairs=outcome.num_pairs,
        tokens=outcome.num_tokens,
        loss=outcome.metrics["loss"],
        accuracy=outcome.metrics["rewards/accuracies"],
        margin=outcome.metrics["rewards/margins"],
    )
