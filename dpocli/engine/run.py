"""The run of steps: held-out evaluations, log lines and checkpoints between them, and a stop where one is asked for."""

from collections.abc import Mapping
from pathlib import Path

from dpocli.artifacts.run_dir import RunDirectory
from dpocli.engine.loop import StepOutcome, Trainer
from dpocli.engine.passes import PairView
from dpocli.engine.stop import StopFlag
from dpocli.engine.trackers import Trackers
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

    # Started anew, even the row of step 0 is written again.
    out.metrics.truncate_after(first - 1 if first > 1 else -1)
    if held_out and first == 1:
        log({"step": 0} | trainer.held_out(held_out))
    with terminal.progress(last, "train", unit="steps", initial=first - 1) as progress:
        for step in range(first, last + 1):
            outcome = trainer.step(step)
            row: dict[str, float] = {"step": step, "epoch": step / trainer.schedule.steps_per_epoch} | outcome.metrics
            evaluated = trainer.held_out(held_out) if held_out and (step % eval_every == 0 or step == last) else {}
            if step % options.log_every == 0 or step == last or evaluated:
                log(row | evaluated)
            _show(progress, outcome)
            out.update(step=step)
            stopping = trainer.processes.any(bool(stop) or out.stop_requested())
            if step == last or step % save_every == 0 or stopping:
                trainer.save(checkpoints, step)
            if stopping and step < last:
                raise PreemptedError(
                    f"Stopped on request after step {step} of {last}, with a checkpoint. The same command line goes on."
                )


def _show(progress: Progress, outcome: StepOutcome) -> None:
    progress.update(
        pairs=outcome.num_pairs,
        tokens=outcome.num_tokens,
        loss=outcome.metrics["loss"],
        accuracy=outcome.metrics["rewards/accuracies"],
        margin=outcome.metrics["rewards/margins"],
    )
