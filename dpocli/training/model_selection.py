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
"""What the best evaluation is the best in."""


@dataclass(frozen=True, slots=True)
class Evaluation:
    """What the held-out pairs said after a step; 0: of the untrained policy."""

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
    standing: Evaluation | None = None
    for evaluation in found:
        if standing is None or evaluation.is_better_than(standing, by):
            standing = evaluation
    return standing


def has_stalled(found: Sequence[Evaluation], patience: int) -> bool:
    """Whether the loss of the last `patience` evaluations was never below the lowest before them.

    The evaluation of the untrained policy counts: a run that never gets below it learns nothing that generalises.
    """
    lowest = best(found, "loss")
    return lowest is not None and len(found) - 1 - found.index(lowest) >= patience


class BestCheckpoint:
    """The best checkpoint so far; for the first process, which alone writes.

    Args:
        directory: of all checkpoints.
        by: what is compared.
        found: the evaluations up to the step that a run goes on from. Of these only such count as have a checkpoint: one
            that is lost (removed by hand) shall not keep a later one from being the best.
        done: that step. What `best.json` says of a step up to it counts too, should its row be lost.
    """

    def __init__(self, directory: Path, by: By, found: Sequence[Evaluation], done: int = 0) -> None:
        self._directory, self._by = directory, by
        for leftover in directory.glob(f".{NAME}~*.tmp"):  # of a killed writer: there is only one at a time
            leftover.unlink(missing_ok=True)
        known = {one.step: one for one in [*self._named_until(done), *found]}
        self.standing = best([known[step] for step in sorted(known) if (directory / f"step-{step}").is_dir()], by)
        if self.standing is None:
            (directory / NAME).unlink(missing_ok=True)
        else:
            self.name(self.standing)

    def _named_until(self, done: int) -> list[Evaluation]:
        """What `best.json` says, where it was compared as now; a later step than `done` is made again."""
        value = read_json(self._directory / NAME)
        if not isinstance(value, dict) or value.pop("by", None) != self._by:
            return []
        try:
            named = Evaluation(int(value["step"]), float(value["loss"]), float(value["accuracy"]))
        except (KeyError, TypeError, ValueError):
            return []
        return [named] if named.step <= done else []

    def is_beaten_by(self, evaluation: Evaluation) -> bool:
        return self.standing is None or evaluation.is_better_than(self.standing, self._by)

    def name(self, evaluation: Evaluation) -> None:
        """Writes down that the checkpoint of this evaluation, which is there, is the best."""
        assert (self._directory / f"step-{evaluation.step}").is_dir()
        self.standing = evaluation
        value = {"by": self._by} | asdict(evaluation)
        if read_json(self._directory / NAME) != value:
            write_json(self._directory / NAME, value)


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
        self._patience, self._processes = options.held_out.early_stopping, processes
        self._checkpoints, self._keep_last = checkpoints, options.checkpoints.keep_last
        self._found = evaluations(rows) if processes.is_first else []
        self._best = None
        if options.held_out.keep_best and processes.is_first:
            self._best = BestCheckpoint(checkpoints, options.held_out.keep_best, self._found, done)
        self._keeps_best = options.held_out.keep_best is not None
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
