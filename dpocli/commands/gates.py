"""The gates of `evaluate`: checked before anything is scored, judged by the report."""

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from dpocli.cache.reader import PairStore
from dpocli.commands.models import EvaluatedModel
from dpocli.config.gates import Gate
from dpocli.errors import GateError, UsageError
from dpocli.evaluation.figures import DIFFERENCES, FIGURES, Need, gate_values
from dpocli.objective.logps import LogpColumns

NEAREST = 3

_MISSING: Mapping[Need, str] = {
    "reference": "it takes a reference",
    "second reference": "it takes --second-reference",
    "rewards against the second reference": "it takes --second-reference, and a loss that compares with a reference by sums",
    "second model": "it takes a second --model to compare the first with",
}

_NEEDS = {name: figure.need for figure in (*FIGURES, *DIFFERENCES) for name, _ in figure.gate_values({})}
"""What each name needs."""


def check_gates(gates: Sequence[Gate], models: Sequence[EvaluatedModel], available: Collection[Need]) -> None:
    """Raise UsageError where a gate names a figure that the report of these models cannot have.

    What only the pairs can show (a margin's difference where tokenizers differ) is undefined in the report.
    """
    losses = [next(iter(model.losses.values())) for model in models[:2]]
    for gate in gates:
        if gate.name not in _NEEDS:
            names = [figure.name for figure in (*FIGURES, *DIFFERENCES)]
            near = difflib.get_close_matches(gate.name, names, n=NEAREST)
            hint = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}."
            raise UsageError(f"--require {gate.text}: there is no figure {gate.name}; {hint}")
        need = _NEEDS[gate.name]
        if need and need not in available:
            raise UsageError(f"--require {gate.text}: there is no figure {gate.name} here; {_MISSING[need]}.")
        if gate.name.startswith("margin_difference") and losses[0] != losses[1]:
            raise UsageError(
                f"--require {gate.text}: there is no such difference; the losses differ: {losses[0]} and {losses[1]}."
            )


def available_in(report: Mapping[str, Any]) -> set[Need]:
    """Which kinds of figures a report has."""
    second = report.get("second_reference", {})
    there: dict[Need, bool] = {
        "reference": "displacement" in report,
        "second reference": bool(second),
        "rewards against the second reference": "rewards/accuracies" in second,
        "second model": bool(report["comparisons"]),
    }
    return {need for need, is_there in there.items() if is_there}


def available_for(models: Sequence[EvaluatedModel], pairs: PairStore, second: PairStore | None) -> set[Need]:
    """Which kinds of figures the report of these models and pairs will have."""
    losses = models[0].losses.values()
    columns = LogpColumns.by({need for loss in losses for need in loss.needs}, has_reference=pairs.has_reference)
    compares = next(iter(losses)).needs_reference and not columns.tails
    there: dict[Need, bool] = {
        "reference": columns.reference,
        "second reference": second is not None,
        "rewards against the second reference": second is not None and compares,
        "second model": len(models) > 1,
    }
    return {need for need, is_there in there.items() if is_there}


def judge_gates(gates: Sequence[Gate], report: dict[str, Any]) -> GateError | None:
    """Put the outcomes into the report; the error to end with, if any failed."""
    if not gates:
        return None
    values = gate_values(report)
    report["requirements"] = [
        {"require": gate.text, "value": values[gate.name], "holds": gate.holds(values[gate.name])} for gate in gates
    ]
    failed = [outcome for outcome in report["requirements"] if not outcome["holds"]]
    return GateError(f"{'; '.join(map(_describe, failed))}. The report is written.") if failed else None


def _describe(outcome: Mapping[str, Any]) -> str:
    value = "it is undefined here" if outcome["value"] is None else f"it is {outcome['value']:.6g}"
    return f"--require {outcome['require']}: {value}"
