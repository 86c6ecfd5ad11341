"""Where a run stands by its held-out pairs: whether a step is the best so far, and whether to end early.

Decided from the rows of `metrics.jsonl` and the checkpoints that are there, so that a run that was killed decides as if
it had not been.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from dpocli.config.models import TrainOptions
from dpocli.engine.best import BestCheckpoint, best_step
from dpocli.engine.checkpoint_directory import remove_old
from dpocli.engine.evaluations import evaluations, has_stalled
from dpocli.engine.mesh import Processes


class Course:
    """The evaluations of a run. The first process knows them and decides; the others go by it.

    Args:
        options: --keep-best and --early-stopping.
        checkpoints: the directory of all checkpoints.
        rows: of `metrics.jsonl`, up to the step that the run goes on from.
        processes: all of them make the same calls.
        done: the step that the run goes on from.
    """

    def __init__(
        self,
        options: TrainOptions,
        checkpoints: Path,
        rows: Iterable[Mapping[str, Any]],
        processes: Processes,
        done: int = 0,
    ) -> None:
        self._patience, self._processes = options.early_stopping, processes
        self._checkpoints, self._keep_last = checkpoints, options.keep_last
        self._found = evaluations(rows) if processes.is_first else []
        self._best = None
        if options.keep_best and processes.is_first:
            self._best = BestCheckpoint(checkpoints, options.keep_best, self._found, done)
        self._keeps_best = options.keep_best is not None
        self._best_at: int | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Takes in a row with held-out metrics."""
        (evaluation,) = evaluations([row])
        self._found.append(evaluation)
        if self._keeps_best:
            better = self._best is not None and self._best.is_beaten_by(evaluation)
            self._best_at = evaluation.step if self._processes.any(better) else None

    def is_best_at(self, step: int) -> bool:
        """Whether the policy after this step, the last one, is the best so far, and a checkpoint of it is wanted."""
        return self._best_at == step

    def saved(self, step: int) -> None:
        """There is a checkpoint of this step now."""
        if self._best and self.is_best_at(step):
            self._best.name(self._found[-1])
            remove_old(self._checkpoints, self._keep_last, step - 1)  # the best until now may go

    def has_stalled(self) -> bool:
        """Whether the run ends here, because the held-out loss has not improved for long enough."""
        if self._patience is None:
            return False
        return self._processes.any(self._processes.is_first and has_stalled(self._found, self._patience))


def agreed_best_step(checkpoints: Path, processes: Processes) -> int | None:
    """The step of the best checkpoint, as the first process reads it."""
    found = processes.gather([best_step(checkpoints)] if processes.is_first else [])
    return found[0]
