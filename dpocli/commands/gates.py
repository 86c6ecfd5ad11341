"""The gates of `evaluate`: checked before anything is scored, judged when everything is."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpocli.cache.reader import PairStore
from dpocli.commands.models import Candidate
from dpocli.config.gates import Gate, check_names, outcomes, scalars
from dpocli.errors import GateError, UsageError
from dpocli.evaluation.pair_table import PairTable, ScoredPairs
from dpocli.evaluation.report import Evaluated, report_of
from dpocli.evaluation.second_reference import add_second_reference
from dpocli.objective.logps import LogpColumns


def check_gates(
    gates: Sequence[Gate], models: Sequence[Candidate], stores: Sequence[PairStore], second: PairStore | None
) -> None:
    """Raises UsageError where a gate names a figure that this evaluation will not have.

    Which ones it will have depends on the losses, the reference and the models; so a report is made of two pairs whose
    log-probs nobody computed, and its names are looked at. What only the pairs can tell (a margin's difference where
    tokenizers turn out to differ) is undefined then, and does not hold.
    """
    if gates:
        pretended = [_pretended(model, store, second) for model, store in zip(models, stores, strict=True)]
        report = report_of(pretended)
        check_names([gate for gate in gates if not _of_margins(gate, report)], scalars(report))


def _of_margins(gate: Gate, report: Mapping[str, Any]) -> bool:
    """Whether a gate is about a difference of margins, with or without its interval.

    Raises:
        UsageError: the two models' margins cannot be compared.
    """
    if not gate.name.startswith("margin_difference") or not report["comparisons"]:
        return False
    if why := report["comparisons"][0].get("why_no_margin"):
        raise UsageError(f"--require {gate.text}: there is no such difference; {why}.")
    return gate.name.removesuffix("_low").removesuffix("_high") == "margin_difference"


def judge_gates(gates: Sequence[Gate], report: dict[str, Any]) -> GateError | None:
    """Puts the outcomes into the report; the error to end with, if any failed."""
    if not gates:
        return None
    report["requirements"] = outcomes(gates, report)
    failed = [outcome for outcome in report["requirements"] if not outcome["holds"]]
    return GateError(f"{'; '.join(map(_told, failed))}. The report is written.") if failed else None


def _told(outcome: Mapping[str, Any]) -> str:
    value = "it is undefined here" if outcome["value"] is None else f"it is {outcome['value']:.6g}"
    return f"--require {outcome['require']}: {value}"


def _pretended(model: Candidate, store: PairStore, second: PairStore | None) -> Evaluated:
    needs = {need for loss in model.losses.values() for need in loss.needs}
    wanted = LogpColumns.by(needs, has_reference=store.has_reference)
    about: dict[str, Any] = {
        name: np.ones(2, dtype=np.int64)
        for name in ("weight", "chosen_tokens", "rejected_tokens", "prompt_tokens", "num_turns")
    }
    rows = np.arange(2)
    about |= {
        "row": rows,
        "prompt_hash": rows,
        "pair_id": np.array(["", ""]),
        "source": np.array(["", ""], dtype=object),
    }
    values = np.arange(1.0, 1 + 2 * len(wanted.names)).reshape(2, -1)
    scored = ScoredPairs(
        rows, about, np.where([name.endswith("tokens") for name in wanted.names], 1.0, -values), wanted
    )
    table = PairTable.of(scored, model.losses, model.states)
    name = table.losses[0]
    extra: dict[str, Any] = {"training": model.training}
    if second is not None:
        about["pair_id"] = table.columns["pair_id"] = np.array([second.columns.pair_ids[0].tobytes().hex()] * 2)
        extra["second_reference"] = add_second_reference(
            table, second, scored, model.losses[name], model.states[name], 0.0
        )
    return Evaluated(model.name, table, model.losses, extra=extra)
