"""The tables of `report.html`: figures, losses, slices, models, gates, and how the report was made."""

from collections.abc import Iterator, Mapping
from typing import Any

from dpocli.cache.reader import PairStore
from dpocli.config.loss_expression import LossChoice
from dpocli.evaluation.figures import FIGURES, Figure, Format
from dpocli.report.wording import (
    ACCURACY,
    MARGIN,
    Formatter,
    Report,
    between,
    describe_reward,
    models_in_order,
    number,
    percent,
    points,
    points_beside_0,
    rewards_compare,
    verdict_on,
)

Line = dict[str, str]

_FORMATS: Mapping[Format, Formatter] = {"share": percent, "points": points, "number": number}


def figure_lines(report: Report) -> list[Line]:
    """The figures that the report has, the most important first."""
    second = report.get("second_reference") or {}
    details = {
        "rule": (report.get("over_length") or {}).get("rule"),
        "reward": describe_reward(report),
        "second": f"{second.get('cache')}, over the {number(second.get('pairs'))} pairs that both caches hold",
    }
    return [_figure_line(figure, report, details) for figure in FIGURES if figure.value(report) is not None]


def _figure_line(figure: Figure, report: Report, details: Mapping[str, Any]) -> Line:
    spelled = _FORMATS[figure.format]
    return {
        "name": figure.label,
        "value": spelled(figure.value(report)),
        "interval": between(figure.interval(report), spelled),
        "meaning": figure.meaning.format(**details),
    }


def loss_lines(report: Report) -> list[Line]:
    """Each loss, where there are several."""
    return [
        _accuracy_and_margin(entry)
        | {"name": str(LossChoice.model_validate(entry["loss_choice"])), "loss": number(entry["loss"])}
        for entry in (report.get("by_loss") or {}).values()
    ]


def model_lines(report: Report) -> list[Line]:
    """Each model, where there are several, with the difference of the first and it."""
    models = models_in_order(report)
    return [_model_line(*each) for each in models] if len(models) > 1 else []


def _model_line(model: Report, against: Report) -> Line:
    margin = against.get("margin_difference")
    return _accuracy_and_margin(model) | {
        "name": model["name"],
        "step": "" if model.get("step") is None else f"{model['step']:,}",
        "difference": points(against["accuracy_difference"]) if against else "",
        "difference_interval": between(against.get("accuracy_interval"), points_beside_0),
        "margin_difference": "" if margin is None else number(margin),
        "margin_interval": between(against.get("margin_interval")),
        "verdict": verdict_on(against["accuracy_interval"]) if against else "",
        "why_no_margin": against.get("why_no_margin") or "",
    }


def _accuracy_and_margin(figures: Report) -> Line:
    interval = between(figures.get(f"{ACCURACY}_interval"), percent)
    return {"accuracy": percent(figures.get(ACCURACY)), "interval": interval, "margin": number(figures.get(MARGIN))}


def gate_lines(report: Report) -> list[dict[str, Any]]:
    """Each gate with its value, and whether it holds."""
    return [entry | {"value": number(entry["value"])} for entry in report.get("requirements", [])]


def made_lines(report: Report, settings: Report) -> list[tuple[str, list[tuple[str, str]]]]:
    """How the report was made: headings with names and values."""
    interval = report["interval"]
    what = {
        "model": report["model"],
        "reference": report.get("reference") or "none",
        "rewards": "against the reference" if rewards_compare(report) else "of the policy alone",
        "pairs": report["pairs"],
        "prompts": report["prompts"],
        "dtype": report.get("dtype"),
        "intervals": f"{interval['level']:.0%}, {interval['method']}, {interval['resamples']:,} resamples",
        "format of metrics.json": report["format"],
    }
    groups = {
        "What": what,
        "What its training took": report.get("training"),
        "Versions and hardware": report.get("environment"),
        "Scoring": report.get("scoring"),
        **settings,
    }
    return [(heading, list(_flat(values))) for heading, values in groups.items() if values]


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


def _flat(values: Report, prefix: str = "") -> Iterator[tuple[str, str]]:
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        elif value is not None and value != [] and value != "":
            yield f"{prefix}{name}", f"{value:.6g}" if isinstance(value, float) else str(value)
