"""`--require "reward_accuracy>=0.65"`: a figure of `metrics.json` that must hold, else the command ends with exit 6."""

import difflib
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpocli.errors import UsageError

ALIASES: Mapping[str, str] = {
    "loss": "loss",
    "reward_accuracy": "rewards/accuracies",
    "reward_accuracy_ties_half": "rewards/accuracies_ties_half",
    "reward_margin": "rewards/margins",
    "reward_margin_median": "rewards/margins_quantiles/0.5",
    "reward_chosen": "rewards/chosen",
    "reward_rejected": "rewards/rejected",
    "ties": "rewards/ties",
    "within_noise": "rewards/within_noise",
    "length_normalised_accuracy": "accuracies/length_normalised/value",
    "policy_accuracy": "accuracies/policy/value",
    "reference_accuracy": "accuracies/reference/value",
    "pick_the_longer_accuracy": "accuracies/pick_the_longer/value",
    "over_length": "over_length/value",
    "brier": "calibration/brier",
    "logratio_chosen": "logratios/chosen",
    "logratio_rejected": "logratios/rejected",
    "displacement": "displacement",
    "reward_length_correlation": "correlation/reward_length",
    "accuracy_difference": "comparisons/0/accuracy_difference",
    "margin_difference": "comparisons/0/margin_difference",
}
"""Names that read well in a shell → paths in `metrics.json`. Those with an interval also have `_low` and `_high`."""

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_FORM = re.compile(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")

_OF_THE_DATA = ("slices", "bins", "by_source")

_MISSING: Mapping[str, str] = {
    **dict.fromkeys(
        ("accuracy_difference", "margin_difference"), "it takes a second --model to compare the first with"
    ),
    **dict.fromkeys(
        ("reference_accuracy", "logratio_chosen", "logratio_rejected", "displacement"), "it takes a reference"
    ),
    **dict.fromkeys(("slices", "by_source"), "slices cannot be named, since they depend on the pairs"),
}
"""Names, or how they begin, that people may well expect → why they are not there."""
"""Parts of `metrics.json` whose names depend on the pairs, so that no gate can name them beforehand."""


@dataclass(frozen=True, slots=True)
class Gate:
    """One requirement."""

    text: str
    name: str
    operator: str
    bound: float

    @classmethod
    def of(cls, text: str) -> "Gate":
        """Reads `NAME>=NUMBER`. Raises ValueError where it is something else."""
        match = _FORM.fullmatch(text)
        if not match:
            raise ValueError(
                f'{text!r} is no requirement; write a figure, >=, >, <= or <, and a number: "reward_accuracy>=0.65"'
            )
        return cls(text, match[1], match[2], float(match[3]))

    def holds(self, value: float | None) -> bool:
        """Whether a figure is as required. One that is undefined is not."""
        return value is not None and _OPERATORS[self.operator](value, self.bound)


def scalars(report: Mapping[str, Any]) -> dict[str, float | None]:
    """Every single figure of a report by the names that gates know it by: its path, and its aliases."""
    paths = dict(_scalars("", report))
    aliases = {}
    for alias, path in ALIASES.items():
        for end in ("", "_low", "_high"):
            if path + end in paths:
                aliases[alias + end] = paths[path + end]
    return paths | aliases


def check_names(gates: Sequence[Gate], known: Mapping[str, float | None]) -> None:
    """Raises UsageError where a gate names what `metrics.json` will not hold."""
    for gate in gates:
        if gate.name in known:
            continue
        figure = gate.name.removesuffix("_low").removesuffix("_high")
        if figure in known:
            hint = f"{figure} has no interval."
        elif (stem := figure.partition("/")[0]) in _MISSING:
            hint = f"{_MISSING[stem]}."
        else:
            near = difflib.get_close_matches(gate.name, known, n=1)
            names = ", ".join(name for name in ALIASES if name in known)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"there are {names}, and the other single figures of metrics.json by path."
            )
        raise UsageError(f"--require {gate.text}: there is no figure {gate.name} here; {hint}")


def outcomes(gates: Sequence[Gate], report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What `metrics.json` says of each gate."""
    figures = scalars(report)
    return [
        {"require": gate.text, "value": (value := figures.get(gate.name)), "holds": gate.holds(value)} for gate in gates
    ]


def _scalars(path: str, value: Any) -> Iterator[tuple[str, float | None]]:
    """Intervals, which are pairs of numbers, are told by their ends."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            if name not in _OF_THE_DATA:
                yield from _scalars(f"{path}/{name}" if path else name, item)
    elif isinstance(value, list) and len(value) == 2 and all(isinstance(end, float) for end in value):
        # `accuracies/policy/interval` stands beside `…/value`, and `rewards/margins_interval` beside `rewards/margins`.
        head, _, last = path.rpartition("/")
        stem = f"{head}/value" if last == "interval" else path.removesuffix("_interval")
        if path.startswith("comparisons/"):  # there, `accuracy_interval` is that of `accuracy_difference`
            stem += "_difference"
        yield from ((f"{stem}_low", value[0]), (f"{stem}_high", value[1]))
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _scalars(f"{path}/{index}", item)
    elif value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        yield path, value
