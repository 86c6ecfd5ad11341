"""Which held-out evaluation was the best, and whether it is time to stop: functions of the rows of `metrics.jsonl`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from dpocli.checkpoint.retention import NAME, best_step, remove_old
from dpocli.config.commands import TrainOptions
from dpocli.distributed.processes import Processes
from dpocli.run.files import read_json, write_json

By = Literal["loss", "accuracy"]
"""The metric that is compared."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out metrics after a step; step 0 is the untrained policy."""

    step: int
    loss: float
    accuracy: float

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> "Evaluation | None":
        """None where the row has no held-out metrics, or they are no numbers."""
        loss, accuracy = row.get("eval/loss"), row.get("eval/rewards/accuracies")
        if loss is None or accuracy is None:
            return None
        return cls(int(row["step"]), float(loss), float(accuracy))

    def is_better_than(self, other: "Evaluation", by: By) -> bool:
        """Accuracies are shares of few pairs and often equal: then the loss decides. What is equal is not better."""
        if by == "accuracy" and self.accuracy != other.accuracy:
            return self.accuracy > other.accuracy
        return self.loss < other.loss


def evaluations(rows: Iterable[Mapping[str, Any]]) -> list[Evaluation]:
    """The evaluations among the rows of `metrics.jsonl`, in their order."""
    return [found for row in rows if (found := Evaluation.of(row))]


def best(found: Sequence[Evaluation], by: By) -> Evaluation | None:
    """The best of them, the earliest where several are equal; None where there are none."""
    top: Evaluation | None = None
    for evaluation in found:
        if top is None or evaluation.is_better_than(top, by):
            top = evaluation
    return top


def has_stalled(found: Sequence[Evaluation], patience: int) -> bool:
    """Whether the loss of the last `patience` evaluations was never below the lowest before them.

    The evaluation of the untrained policy counts: a run that never gets below it learns nothing that generalises.
    """
    lowest = best(found, "loss")
    return lowest is not None and len(found) - 1 - found.index(lowest) >= patience


class BestCheckpoint:
    """The best checkpoint so far, as `best.json` names it. For the first process, which alone writes.

    Args:
        directory: of all checkpoints.
        by: what is compared.
        found: the evaluations up to the step that a run resumes from. Only those with a checkpoint count: one that was
            removed by hand shall not keep a later one from being the best.
        done: that step. What `best.json` says of a step up to it counts too, should its row be lost.
    """

    def __init__(self, directory: Path, by: By, found: Sequence[Evaluation], done: int = 0) -> None:
        self._directory, self._by = directory, by
        for leftover in directory.glob(f".{NAME}~*.tmp"):  # of a killed writer: there is only one at a time
            leftover.unlink(missing_ok=True)
        known = {one.step: one for one in [*self._named_until(done), *found]}
        self._best = best([known[step] for step in sorted(known) if (directory / f"step-{step}").is_dir()], by)
        if self._best is None:
            (directory / NAME).unlink(missing_ok=True)
        else:
            self.name(self._best)

    def _named_until(self, done: int) -> list[Evaluation]:
        """What `best.json` says, where it compares the same; a step later than `done` will be repeated."""
        value = read_json(self._directory / NAME)
        if not isinstance(value, dict) or value.pop("by", None) != self._by:
            return []
        try:
            named = Evaluation(int(value["step"]), float(value["loss"]), float(value["accuracy"]))
        except (KeyError, TypeError, ValueError):
            return []
        return [named] if named.step <= done else []

    def is_beaten_by(self, evaluation: Evaluation) -> bool:
        return self._best is None or evaluation.is_better_than(self._best, self._by)

    def name(self, evaluation: Evaluation) -> None:
        """Name the checkpoint of this evaluation, which is there, in `best.json`."""
        assert (self._directory / f"step-{evaluation.step}").is_dir()
        self._best = evaluation
        value = {"by": self._by} | asdict(evaluation)
        if read_json(self._directory / NAME) != value:
            write_json(self._directory / NAME, value)


class ModelSelection:
    """The evaluations of a run, and what follows from them. The first process decides, and the others follow.

    Args:
        options: of the run.
        rows: of `metrics.jsonl`, up to the step that the run resumes from.
        processes: all of them make the same calls.
        done: the step that the run resumes from.
    """

    def __init__(
        self, options: TrainOptions, rows: Iterable[Mapping[str, Any]], processes: Processes, done: int = 0
    ) -> None:
        self._options, self._processes, self._checkpoints = options, processes, options.out / "checkpoints"
        self._found = evaluations(rows) if processes.is_first else []
        self._best = None
        if options.held_out.keep_best and processes.is_first:
            self._best = BestCheckpoint(self._checkpoints, options.held_out.keep_best, self._found, done)
        self._best_at: int | None = None

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row with held-out metrics."""
        (evaluation,) = evaluations([row])
        self._found.append(evaluation)
        if self._options.held_out.keep_best:
            better = self._best is not None and self._best.is_beaten_by(evaluation)
            self._best_at = evaluation.step if self._processes.any(better) else None

    def is_best_at(self, step: int) -> bool:
        """Whether the policy after this step, the last one, is the best so far, and a checkpoint of it is wanted."""
        return self._best_at == step

    def saved(self, step: int) -> None:
        """Record that there is a checkpoint of this step."""
        if self._best and self.is_best_at(step):
            self._best.name(self._found[-1])
            remove_old(self._checkpoints, self._options.checkpoints.keep_last, step - 1)  # the former best may go

    def has_stalled(self) -> bool:
        """Whether the run ends here, because the held-out loss has not improved for long enough."""
        patience = self._options.held_out.early_stopping
        if patience is None:
            return False
        return self._processes.any(self._processes.is_first and has_stalled(self._found, patience))


def agreed_best_step(checkpoints: Path, processes: Processes) -> int | None:
    """The step of the best checkpoint, as the first process reads it."""
    return processes.from_first(best_step(checkpoints) if processes.is_first else None)
