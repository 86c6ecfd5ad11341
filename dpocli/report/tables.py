"""The tables of a report: every figure with a line on what it is, slices, models, and how it was made."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from dpocli.cache.reader import PairStore
from dpocli.config.loss_expression import LossChoice
from dpocli.report.wording import (
    ACCURACY,
    MARGIN,
    Report,
    between,
    models_in_order,
    number,
    percent,
    points,
    points_beside_0,
    reward_in_words,
    rewards_compare,
    verdict_on,
)

_ACCURACIES = {
    "length_normalised": (
        "Accuracy per token",
        "Ranked by mean instead of summed log-ratios (log-probs without a reference), so that length counts for less.",
    ),
    "policy": ("Accuracy of raw log-probs", "The policy without the reference: which answer it finds more likely."),
    "reference": (
        "Accuracy of the reference",
        "Which answer the reference of the cache finds more likely itself.",
    ),
    "pick_the_longer": ("Picking the longer", "Needs no model: right where the chosen answer has more tokens."),
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A line of the table of figures."""

    name: str
    value: str
    interval: str
    meaning: str


def figure_lines(report: Report) -> list[Figure]:
    """Those that the report holds, the most important first."""
    return [line for line in _all_figures(report) if line.value != "–"]


def _all_figures(report: Report) -> Iterator[Figure]:
    def share(name: str, key: str, meaning: str) -> Figure:
        return Figure(name, percent(report.get(key)), between(report.get(f"{key}_interval"), percent), meaning)

    def value(name: str, key: str, meaning: str) -> Figure:
        return Figure(name, number(report.get(key)), between(report.get(f"{key}_interval")), meaning)

    yield share(
        "Reward accuracy", ACCURACY, "Pairs whose chosen answer has the strictly higher reward. A tie is not right."
    )
    if report.get("rewards/ties"):
        yield share("With ties as half", "rewards/accuracies_ties_half", "The same, but a tie is right by half.")
    for key, (name, meaning) in _ACCURACIES.items():
        entry = (report.get("accuracies") or {}).get(key) or {}
        yield Figure(name, percent(entry.get("value")), between(entry.get("interval"), percent), meaning)
    second = report.get("second_reference") or {}
    own, both = second.get("accuracy") or {}, f"over the {number(second.get('pairs'))} pairs that both caches hold"
    yield Figure(
        "Against the second reference",
        percent(second.get(ACCURACY)),
        between(second.get(f"{ACCURACY}_interval"), percent),
        f"Reward accuracy against {second.get('cache')}, {both}.",
    )
    yield Figure(
        "Accuracy of the second reference",
        percent(own.get("value")),
        between(own.get("interval"), percent),
        f"Which answer it finds more likely itself, {both}.",
    )
    over = report.get("over_length") or {}
    yield Figure(
        "Over length alone",
        points(over.get("value")),
        between(over.get("interval"), points),
        f"Points more than always picking the {over.get('rule')} answer, pair by pair.",
    )
    yield share("Ties", "rewards/ties", "Pairs whose rewards are equal to the last digit.")
    yield share(
        "Within noise", "rewards/within_noise", "Pairs whose margin is smaller than what rounding in this dtype can do."
    )
    yield value("Margin, mean", MARGIN, "Chosen less rejected reward.")
    quantiles = report.get("rewards/margins_quantiles") or {}
    middle = between([quantiles.get("0.05"), quantiles.get("0.95")])
    yield Figure("Margin, median", number(quantiles.get("0.5")), middle, "The interval here holds nine pairs of ten.")
    yield value("Reward of chosen", "rewards/chosen", f"Mean. The reward is {reward_in_words(report)}.")
    yield value("Reward of rejected", "rewards/rejected", "Mean.")
    yield value("Loss", "loss", "Mean over pairs, by their weights.")
    yield Figure(
        "Brier score",
        number((report.get("calibration") or {}).get("brier")),
        "",
        "Mean squared error of sigma(margin) as a probability: 0 is perfect, 0.25 is what 50% for every pair gets.",
    )
    yield value(
        "Log-ratio of chosen", "logratios/chosen", "Mean of log policy - log reference, nats. Not a KL divergence."
    )
    yield value("Log-ratio of rejected", "logratios/rejected", "The same of rejected answers.")
    yield share("Displacement", "displacement", "Pairs whose chosen answer is less likely than under the reference.")
    yield value(
        "Reward and length", "correlation/reward_length", "Pearson correlation over both sides: near 0 is good."
    )


def slice_tables(report: Report) -> dict[str, list[Mapping[str, Any]]]:
    """The slices by what they were cut; those of one piece say nothing new."""
    slices: Mapping[str, list[Mapping[str, Any]]] = report.get("slices") or {}
    return {name: list(entries) for name, entries in slices.items() if len(entries) > 1}


def model_lines(report: Report) -> list[dict[str, str]]:
    """Each of several models, with what the first has more than it."""
    models = models_in_order(report)
    return [_model_line(*each) for each in models] if len(models) > 1 else []


def _model_line(model: Report, against: Mapping[str, Any]) -> dict[str, str]:
    step = model.get("step")
    return {
        "name": str(model.get("name", "")),
        "step": "" if step is None else f"{step:,}",
        "accuracy": percent(model.get(ACCURACY)),
        "interval": between(model.get(f"{ACCURACY}_interval"), percent),
        "margin": number(model.get(MARGIN)),
        "difference": points(against["accuracy_difference"]) if against else "",
        "difference_interval": between(against.get("accuracy_interval"), points_beside_0),
        "margin_difference": number(against["margin_difference"])
        if against.get("margin_difference") is not None
        else "",
        "margin_interval": between(against.get("margin_interval")),
        "verdict": verdict_on(against["accuracy_interval"]) if against.get("accuracy_interval") else "",
        "why_no_margin": str(against.get("why_no_margin") or ""),
    }


def loss_lines(report: Report) -> list[dict[str, str]]:
    """Each of several losses."""
    return [
        {
            "name": str(LossChoice.model_validate(entry["loss_choice"])) if entry.get("loss_choice") else name,
            "accuracy": percent(entry.get(ACCURACY)),
            "interval": between(entry.get(f"{ACCURACY}_interval"), percent),
            "margin": number(entry.get(MARGIN)),
            "loss": number(entry.get("loss")),
        }
        for name, entry in (report.get("by_loss") or {}).items()
    ]


def gate_lines(report: Report) -> list[dict[str, Any]]:
    """What was required, and whether it holds."""
    return [
        {"require": entry["require"], "value": number(entry["value"]), "holds": entry["holds"]}
        for entry in report.get("requirements") or []
    ]


def made_lines(report: Report, settings: Mapping[str, Any]) -> list[tuple[str, list[tuple[str, str]]]]:
    """How the report was made: headings with names and values."""
    interval = report.get("interval") or {}
    what = {
        "model": report.get("model"),
        "reference": report.get("reference") or "none",
        "rewards": "against the reference" if rewards_compare(report) else "of the policy alone",
        "pairs": report["pairs"],
        "prompts": report.get("prompts"),
        "dtype": report.get("dtype"),
        "intervals": f"{interval.get('level', 0):.0%}, {interval.get('method')}, {interval.get('resamples'):,} resamples"
        if interval.get("resamples")
        else None,
        "format of metrics.json": report.get("format"),
    }
    groups = {
        "What": what,
        "What its training took": report.get("training") or {},
        "Versions and hardware": report.get("environment") or {},
        "Scoring": report.get("scoring") or {},
        **settings,
    }
    return [(heading, list(_facts(values))) for heading, values in groups.items() if values]


def facts_of_cache(store: PairStore) -> dict[str, Any]:
    """What decides the values that the pairs came with."""
    fingerprint = store.fingerprint
    return {
        "fingerprint": fingerprint.digest,
        "reference": fingerprint.reference_digest if store.has_reference else None,
        "dtype of the reference": fingerprint.dtype,
        "content": "; ".join(f"{part.name} ({part.num_rows:,} rows)" for part in fingerprint.content),
        "skipped rows": "; ".join(f"{count:,} {reason}" for reason, count in store.skipped.items()),
        **fingerprint.settings,
    }


def _facts(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _facts(value, f"{prefix}{name}.")
        elif value is not None and value != [] and value != "":
            yield f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else str(value)
