"""Which held-out evaluation was the best, and whether it is time to stop: functions of the rows of `metrics.jsonl`."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
