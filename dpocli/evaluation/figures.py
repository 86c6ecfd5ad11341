"""The figures of a report, each described once: for the terminal, `report.html`, `--require` and the docs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

Report = Mapping[str, Any]

Format = Literal["share", "number", "points"]
"""How `report.html` prints a value: as a percentage, as a number, as a difference in percentage points."""

Need = Literal["reference", "second reference", "rewards against the second reference", "second model"]
"""What a figure cannot be computed without."""


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure of a report."""

    name: str
    """Name in `--require`."""
    path: str
    """Keys in `metrics.json`, separated by spaces."""
    label: str
    meaning: str
    """One sentence; `{rule}`, `{reward}` and `{second}` are filled in by the report."""
    note: str = ""
    """The same in a few words, for the terminal."""
    format: Format = "number"
    interval: str = ""
    """Keys of its 95% interval; empty where there is none."""
    need: Need | None = None

    def value(self, report: Report) -> float | None:
        """The value in a report; None where it is missing or undefined."""
        found = _at(report, self.path)
        return None if found is None else float(found)

    def bounds(self, report: Report) -> tuple[float, float] | None:
        """The interval in a report; None where it is missing or undefined."""
        found = _at(report, self.interval) if self.interval else None
        return (float(found[0]), float(found[1])) if found and None not in found else None

    def gate_values(self, report: Report) -> Iterator[tuple[str, float | None]]:
        """What `--require` can name: the value, and both ends of the interval."""
        yield self.name, self.value(report)
        if self.interval:
            low, high = self.bounds(report) or (None, None)
            yield f"{self.name}_low", low
            yield f"{self.name}_high", high


def _at(report: Any, path: str) -> Any:
    for key in path.split():
        if isinstance(report, Mapping):
            report = report.get(key)
        elif isinstance(report, list):
            report = report[int(key)] if int(key) < len(report) else None
    return report


def _accuracy(name: str, key: str, label: str, meaning: str, note: str, need: Need | None = None) -> Figure:
    entry = f"accuracies {key}"
    return Figure(name, f"{entry} value", label, meaning, note, "share", f"{entry} interval", need)


ACCURACY = Figure(
    "reward_accuracy",
    "rewards/accuracies",
    "Reward accuracy",
    "Pairs whose chosen answer has the strictly higher reward. A tie is not right.",
    format="share",
    interval="rewards/accuracies_interval",
)

MARGIN = Figure(
    "reward_margin",
    "rewards/margins",
    "Margin, mean",
    "Chosen reward less rejected reward.",
    "chosen - rejected reward",
    interval="rewards/margins_interval",
)

FIGURES = (
    ACCURACY,
    Figure(
        "reward_accuracy_ties_half",
        "rewards/accuracies_ties_half",
        "With ties as half",
        "The same, but a tie counts as half right.",
        "reward accuracy",
        "share",
        "rewards/accuracies_ties_half_interval",
    ),
    _accuracy(
        "length_normalised_accuracy",
        "length_normalised",
        "Accuracy per token",
        "Ranked by mean instead of summed log-ratios (log-probs without a reference), so that length counts for less.",
        "means instead of sums",
    ),
    _accuracy(
        "policy_accuracy",
        "policy",
        "Accuracy of raw log-probs",
        "The policy without the reference: which answer it finds more likely.",
        "no reference",
    ),
    _accuracy(
        "reference_accuracy",
        "reference",
        "Accuracy of the reference",
        "Which answer the reference of the cache finds more likely itself.",
        "raw log-probs",
        "reference",
    ),
    _accuracy(
        "pick_the_longer_accuracy",
        "pick_the_longer",
        "Picking the longer",
        "A baseline without a model: right where the chosen answer has more tokens.",
        "baseline; equal lengths count half",
    ),
    Figure(
        "second_reference_reward_accuracy",
        "second_reference rewards/accuracies",
        "Against the second reference",
        "Reward accuracy against {second}.",
        "reward accuracy",
        "share",
        "second_reference rewards/accuracies_interval",
        "rewards against the second reference",
    ),
    Figure(
        "second_reference_reward_margin",
        "second_reference rewards/margins",
        "Margin against the second reference",
        "Mean reward margin against {second}.",
        "mean",
        interval="second_reference rewards/margins_interval",
        need="rewards against the second reference",
    ),
    Figure(
        "second_reference_accuracy",
        "second_reference accuracy value",
        "Accuracy of the second reference",
        "Which answer it finds more likely itself: {second}.",
        "raw log-probs",
        "share",
        "second_reference accuracy interval",
        "second reference",
    ),
    Figure(
        "over_length",
        "over_length value",
        "Over length alone",
        "Points more than always picking the {rule} answer, pair by pair.",
        "more than by length alone",
        "points",
        "over_length interval",
    ),
    Figure("ties", "rewards/ties", "Ties", "Pairs whose rewards are equal to the last digit.", format="share"),
    Figure(
        "within_noise",
        "rewards/within_noise",
        "Within noise",
        "Pairs whose margin is smaller than the rounding error of this dtype.",
        "margins that rounding alone may turn",
        "share",
    ),
    MARGIN,
    Figure(
        "reward_margin_median",
        "rewards/margins_quantiles 0.5",
        "Margin, median",
        "Half of the margins are below it.",
    ),
    Figure(
        "reward_margin_q05",
        "rewards/margins_quantiles 0.05",
        "Margin, 5% quantile",
        "One margin in twenty is below it.",
    ),
    Figure(
        "reward_margin_q95",
        "rewards/margins_quantiles 0.95",
        "Margin, 95% quantile",
        "One margin in twenty is above it.",
    ),
    Figure("reward_chosen", "rewards/chosen", "Reward of chosen", "Mean. The reward is {reward}.", "mean"),
    Figure("reward_rejected", "rewards/rejected", "Reward of rejected", "Mean.", "mean"),
    Figure("loss", "loss", "Loss", "Mean over pairs, by their weights."),
    Figure(
        "brier",
        "calibration brier",
        "Brier score",
        "Mean squared error of sigma(margin) as a probability: 0 is perfect, 0.25 is what 50% for every pair gets.",
        "of sigma(margin); 50% for every pair gets 0.25",
    ),
    Figure(
        "logratio_chosen",
        "logratios/chosen",
        "Log-ratio of chosen",
        "Mean of log policy - log reference, nats. Not a KL divergence.",
        "mean, nats; not a KL divergence",
        need="reference",
    ),
    Figure(
        "logratio_rejected",
        "logratios/rejected",
        "Log-ratio of rejected",
        "The same of rejected answers.",
        need="reference",
    ),
    Figure(
        "displacement",
        "displacement",
        "Displacement",
        "Pairs whose chosen answer is less likely than under the reference.",
        "chosen answers that became less likely",
        "share",
        need="reference",
    ),
    Figure(
        "reward_length_correlation",
        "correlation/reward_length",
        "Reward and length",
        "Pearson correlation over both sides: near 0 is good.",
        "Pearson correlation",
    ),
)
"""The figures of one model, in the order in which they are read."""

DIFFERENCES = (
    Figure(
        "accuracy_difference",
        "comparisons 0 accuracy_difference",
        "Accuracy, difference",
        "First model less second, pair by pair; a tie counts as half right.",
        format="points",
        interval="comparisons 0 accuracy_interval",
        need="second model",
    ),
    Figure(
        "margin_difference",
        "comparisons 0 margin_difference",
        "Margin, difference",
        "First model less second, pair by pair.",
        interval="comparisons 0 margin_interval",
        need="second model",
    ),
)
"""The first model against the second; the table of models has those against the others."""


def gate_values(report: Report) -> dict[str, float | None]:
    """Every name that `--require` knows, with its value in a report; None where that is missing or undefined."""
    return dict(entry for figure in (*FIGURES, *DIFFERENCES) for entry in figure.gate_values(report))
