"""Whether `metrics.jsonl` still holds the rows that were there with the checkpoint that a run goes on from."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dpocli.config.models import TrainOptions


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
    gone = [step for step in range(options.log_every, done + 1, options.log_every) if step not in there]
    which = f" (those of steps {_ranges(gone, options.log_every)})" if gone else ""
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
    return [("--keep-best", options.keep_best), ("--early-stopping", options.early_stopping)]


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
