"""The figures of a report, each described once: for the terminal, `report.html`, `--require` and the docs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Report = Mapping[str, Any]

Format = Literal["share", "points", "number"]
"""How `report.html` prints a value: as a percentage, as a difference in percentage points, or as it is."""

Need = Literal["reference", "second reference", "rewards against the second reference", "second model"]
"""What a figure cannot be computed without."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a report."""

    name: str
    """Name in `--require`."""
    path: str
    """Keys in `metrics.json`, separated by spaces."""
    format: Format
    has_interval: bool
    need: Need | None
    label: str
    note: str
    """What it is, in a few words for the terminal."""
    meaning: str
    """The same in a sentence; the report fills in `{rule}`, `{reward}` and `{second}`."""

    def value(self, report: Report) -> float | None:
        """The value in a report; None where it is missing or undefined."""
        found = _at(report, self.path)
        return None if found is None else float(found)

    def interval(self, report: Report) -> tuple[float, float] | None:
        """The 95% interval in a report; None where it is missing or undefined."""
        if not self.has_interval:
            return None
        path = f"{self.path}_interval"
        for end in (" value", "_difference"):
            if self.path.endswith(end):
                path = f"{self.path.removesuffix(end)}{end[0]}interval"
        found = _at(report, path)
        return (float(found[0]), float(found[1])) if found and None not in found else None

    def gate_values(self, report: Report) -> Iterator[tuple[str, float | None]]:
        """What `--require` can name: the value, and both ends of the interval."""
        yield self.name, self.value(report)
        if self.has_interval:
            low, high = self.interval(report) or (None, None)
            yield f"{self.name}_low", low
            yield f"{self.name}_high", high


def _at(report: Any, path: str) -> Any:
    for key in path.split():
        if isinstance(report, Mapping):
            report = report.get(key)
        elif isinstance(report, list):
            report = report[int(key)] if int(key) < len(report) else None
    return report


def gate_values(report: Report) -> dict[str, float | None]:
    """Every name that `--require` knows, with its value in a report; None where that is missing or undefined."""
    return dict(entry for figure in (*FIGURES, *DIFFERENCES) for entry in figure.gate_values(report))


# fmt: off
FIGURES = (
    Figure("reward_accuracy", "rewards/accuracies", "share", True, None, "Reward accuracy", "",
           "Pairs whose chosen answer has the strictly higher reward. A tie is not right."),
    Figure("reward_accuracy_ties_half", "rewards/accuracies_ties_half", "share", True, None, "With ties as half", "",
           "The same, but a tie counts as half right."),
    Figure("length_normalised_accuracy", "accuracies length_normalised value", "share", True, None, "Accuracy per token", "means, not sums",
           "Ranked by mean instead of summed log-ratios (log-probs without a reference), so that length counts for less."),
    Figure("policy_accuracy", "accuracies policy value", "share", True, None, "Accuracy of raw log-probs", "no reference",
           "The policy without the reference: which answer it finds more likely."),
    Figure("reference_accuracy", "accuracies reference value", "share", True, "reference", "Accuracy of the reference", "raw log-probs",
           "Which answer the reference of the cache finds more likely itself."),
    Figure("pick_the_longer_accuracy", "accuracies pick_the_longer value", "share", True, None, "Picking the longer", "baseline; equal lengths count half",
           "A baseline without a model: right where the chosen answer has more tokens."),
    Figure("over_length", "over_length value", "points", True, None, "Over length alone", "more than by length alone",
           "Points more than always picking the {rule} answer, pair by pair."),
    Figure("second_reference_reward_accuracy", "second_reference rewards/accuracies", "share", True, "rewards against the second reference",
           "Against the second reference", "reward accuracy", "Reward accuracy against {second}."),
    Figure("second_reference_reward_margin", "second_reference rewards/margins", "number", True, "rewards against the second reference",
           "Margin against the second reference", "mean", "Mean reward margin against {second}."),
    Figure("second_reference_accuracy", "second_reference accuracy value", "share", True, "second reference",
           "Accuracy of the second reference", "raw log-probs", "Which answer it finds more likely itself: {second}."),
    Figure("ties", "rewards/ties", "share", False, None, "Ties", "", "Pairs whose rewards are equal to the last digit."),
    Figure("within_noise", "rewards/within_noise", "share", False, None, "Within noise", "margins that rounding alone may turn",
           "Pairs whose margin is smaller than the rounding error of this dtype."),
    Figure("reward_margin", "rewards/margins", "number", True, None, "Margin, mean", "chosen - rejected reward", "Chosen reward less rejected reward."),
    Figure("reward_margin_median", "rewards/margins_quantiles 0.5", "number", False, None, "Margin, median", "", "Half of the margins are below it."),
    Figure("reward_margin_q05", "rewards/margins_quantiles 0.05", "number", False, None, "Margin, 5% quantile", "", "One margin in twenty is below it."),
    Figure("reward_margin_q95", "rewards/margins_quantiles 0.95", "number", False, None, "Margin, 95% quantile", "", "One margin in twenty is above it."),
    Figure("reward_chosen", "rewards/chosen", "number", False, None, "Reward of chosen", "mean", "Mean. The reward is {reward}."),
    Figure("reward_rejected", "rewards/rejected", "number", False, None, "Reward of rejected", "mean", "Mean."),
    Figure("loss", "loss", "number", False, None, "Loss", "", "Mean over pairs, by their weights."),
    Figure("brier", "calibration brier", "number", False, None, "Brier score", "of sigma(margin); 0.25 knows nothing",
           "Mean squared error of sigma(margin) as a probability: 0 is perfect, 0.25 is what 50% for every pair gets."),
    Figure("logratio_chosen", "logratios/chosen", "number", False, "reference", "Log-ratio of chosen", "mean, nats; not a KL divergence",
           "Mean of log policy - log reference, nats. Not a KL divergence."),
    Figure("logratio_rejected", "logratios/rejected", "number", False, "reference", "Log-ratio of rejected", "", "The same of rejected answers."),
    Figure("displacement", "displacement", "share", False, "reference", "Displacement", "chosen answers that became less likely",
           "Pairs whose chosen answer is less likely than under the reference."),
    Figure("reward_length_correlation", "correlation/reward_length", "number", False, None, "Reward and length", "Pearson correlation",
           "Pearson correlation over both sides: near 0 is good."),
)
"""The figures of one model, in the order in which they are read."""

DIFFERENCES = (
    Figure("accuracy_difference", "comparisons 0 accuracy_difference", "points", True, "second model", "Accuracy, difference", "",
           "First model less second, pair by pair; a tie counts as half right."),
    Figure("margin_difference", "comparisons 0 margin_difference", "number", True, "second model", "Margin, difference", "",
           "First model less second, pair by pair."),
)
"""The first model against the second; the table of models has the others."""
# fmt: on
