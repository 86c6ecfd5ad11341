"""What a report says in words: the result, what a reader may conclude from it, and what not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpocli.config.loss_choice import LossChoice

Report = Mapping[str, Any]

ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"
FEW_PROMPTS = 100
"""Below which an interval is too wide, and too rough itself, to carry a decision."""
MOST_COMPARISONS = 3
"""That the headline tells, the last ones; the table has all."""
NOT_TOLD_APART = "not told apart"
MANY_TIES = 0.5
"""Share of pairs from which on accuracy, to which a tie is not right, says nothing."""
MUCH_NOISE = 0.05
"""Share of pairs within the noise of the dtype from which on they are worth a word."""


@dataclass(frozen=True, slots=True)
class Headline:
    """What stands at the top of a report."""

    accuracy: str
    interval: str
    """Empty where none was computed."""
    verdict: str
    """"better", "worse" or "open": against tossing a coin."""
    sentence: str
    may: list[str]
    may_not: list[str]


def headline(report: Report) -> Headline:
    """The result in words, with the bounds of what it means."""
    verdict = _verdict(report)
    return Headline(
        accuracy=percent(report.get(ACCURACY)),
        interval=between(report.get(f"{ACCURACY}_interval"), percent),
        verdict=verdict,
        sentence=_sentence(report),
        may=[
            _against_chance(report, verdict),
            *_against_length(report),
            *_against_each_other(report),
            *_displacement(report),
        ],
        may_not=_limits(report),
    )


def _sentence(report: Report) -> str:
    prefers = (
        "leans more to the chosen answer than its reference does"
        if rewards_compare(report)
        else "finds the chosen answer more likely than the rejected one"
    )
    prompts = report.get("prompts")
    of_prompts = f" on {prompts:,} prompts" if prompts and prompts != report["pairs"] else ""
    return f"The model {prefers} in {percent(report.get(ACCURACY))} of {report['pairs']:,} pairs{of_prompts}."


def _verdict(report: Report) -> str:
    bounds = report.get(f"{ACCURACY}_interval")
    if not bounds or None in bounds or ties_throughout(report):
        return "open"
    return "better" if bounds[0] > 0.5 else "worse" if bounds[1] < 0.5 else "open"


def _against_chance(report: Report, verdict: str) -> str:
    if ties_throughout(report):
        return (
            f"Most margins are exactly 0 ({percent(report['rewards/ties'])} ties, which count as not right): the model is its reference, or "
            "nearly so, and there is nothing to conclude yet."
        )
    bounds = between(report.get(f"{ACCURACY}_interval"), percent)
    if not bounds:
        return "No interval was computed, so nothing can be said about how sure the figure is."
    if verdict == "better":
        return f"It ranks such pairs better than a coin would: the whole interval, {bounds}, lies above 50%."
    if verdict == "worse":
        return f"It ranks such pairs worse than a coin would: the whole interval, {bounds}, lies below 50%."
    return f"It cannot be told from tossing a coin: 50% lies within the interval, {bounds}."


def _against_length(report: Report) -> list[str]:
    if ties_throughout(report):
        return []
    longer = _value(report, "pick_the_longer")
    bounds = report.get(f"{ACCURACY}_interval")
    if longer is None or not bounds or None in bounds:
        return []
    best = max(longer, 1 - longer)
    rule = "longer" if longer >= 0.5 else "shorter"
    if bounds[0] > best:
        return [f"Length alone does not explain it: always picking the {rule} answer is right in {percent(best)}."]
    if bounds[1] < best:
        return [
            f"Always picking the {rule} answer does better, with {percent(best)}: as a judge of such pairs the model is no use."
        ]
    return [
        f"Length alone is not ruled out as the reason: always picking the {rule} answer is right in {percent(best)}, which the "
        "interval holds."
    ]


def _against_each_other(report: Report) -> list[str]:
    comparisons = report.get("comparisons") or []
    if comparisons and ties_throughout(report):
        return [
            f"Against {comparisons[0]['against']} the others cannot be held: as the reference itself it ties on its pairs, "
            "which counts as not right. Hold their accuracies against 50%."
        ]
    told = []
    for entry in comparisons[-MOST_COMPARISONS:]:
        bounds, difference = entry.get("accuracy_interval"), entry.get("accuracy_difference")
        if difference is None or ties_throughout(_model(report, entry["model"])):
            continue
        verdict, interval = verdict_on(bounds), between(bounds, points)
        by = f"{points(difference)} points on the same {entry['pairs']:,} pairs, 95% interval {interval}"
        told.append(
            f"{entry['model']} cannot be told from {entry['against']}: {by}."
            if verdict == NOT_TOLD_APART
            else f"{entry['model']} ranks {'more' if verdict == 'better' else 'fewer'} pairs right than {entry['against']}: {by}."
        )
    return told


def _displacement(report: Report) -> list[str]:
    displaced = report.get("displacement")
    if displaced is None or displaced <= 0.5:
        return []
    return [
        f"Chosen answers have become less likely in {percent(displaced)} of the pairs (likelihood displacement): rejected "
        "ones fell further, which is what the margin sees."
    ]


def _limits(report: Report) -> list[str]:
    limits = [
        "How good the answers are that the model writes itself: nothing was generated here. It ranked answers that others wrote.",
        "How it does on pairs of another kind: the interval is about other pairs drawn like these, and no others.",
    ]
    units, what = (report["prompts"], "prompts") if report.get("prompts") else (report["pairs"], "pairs")
    if units < FEW_PROMPTS:
        limits.append(f"Small differences: there are only {units:,} {what}, so even the interval is a rough one.")
    noise = report.get("rewards/within_noise")
    if noise is not None and noise >= MUCH_NOISE:
        limits.append(
            f"How {percent(noise)} of the pairs are ranked: their margins lie within the rounding of {report.get('dtype') or 'the dtype'}."
        )
    if report.get("logratios/chosen") is not None:
        limits.append(
            "How far the model is from its reference as a KL divergence: the log-ratios are means over given answers, "
            "which are not samples of the model."
        )
    return limits


def ties_throughout(figures: Report) -> bool:
    """Whether a model is its reference, or nearly so: it ranks no pair right then, and is no worse for it."""
    return (figures.get("rewards/ties") or 0) > MANY_TIES


def _model(report: Report, name: str) -> Report:
    models: Sequence[Report] = report.get("models") or []
    return next((model for model in models if model.get("name") == name), {})


def rewards_compare(report: Report) -> bool:
    """Whether rewards are taken against the reference; else they are the policy's own log-probs."""
    choice = report.get("loss_choice")
    if not choice:
        return bool(report.get("reference"))
    return LossChoice.model_validate(choice).ranked_by.spec.reward.log_ratio


def reward_in_words(report: Report) -> str:
    """What the reward of the loss is, with the loss and its numbers."""
    choice = LossChoice.model_validate(report["loss_choice"])
    return f"{choice.ranked_by.spec.reward}; loss {choice}"


def verdict_on(bounds: Sequence[float | None] | None) -> str:
    """Of a paired difference with this interval."""
    if not bounds or bounds[0] is None or bounds[1] is None:
        return NOT_TOLD_APART
    return "better" if bounds[0] > 0 else "worse" if bounds[1] < 0 else NOT_TOLD_APART


def _value(report: Report, name: str) -> float | None:
    entry = (report.get("accuracies") or {}).get(name) or {}
    value = entry.get("value")
    return None if value is None else float(value)


def percent(value: float | None, digits: int = 1) -> str:
    """`0.6721` → `67.2%`; a dash where there is no figure."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%"


def points(value: float | None) -> str:
    """A difference of accuracies: `+2.1`, in percentage points."""
    return "–" if value is None or value != value else f"{100 * value:+.1f}"


def number(value: float | None) -> str:
    """Three digits that count."""
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}".replace("-", "−")


def between(bounds: Sequence[float | None] | None, spelled: Any = number) -> str:
    """An interval: `64.1% to 70.0%`; empty where there is none."""
    if not bounds or any(bound is None or bound != bound for bound in bounds):
        return ""
    return f"{spelled(bounds[0])} to {spelled(bounds[1])}"
