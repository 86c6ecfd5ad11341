"""The words of a report: the result, what follows from it, what does not, and how numbers are printed."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpocli.config.loss_expression import LossChoice

Report = Mapping[str, Any]
Formatter = Callable[[float | None], str]

ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"

_TIES_HALF_INTERVAL = "rewards/accuracies_ties_half_interval"

FEW_PROMPTS = 100
"""Below which an interval is too wide, and too rough itself, to decide by."""

MOST_COMPARISONS = 3
"""Comparisons in the headline, the first ones; the table has all."""

NOT_DISTINGUISHABLE = "not distinguishable"

MOST = 0.5
"""Share of pairs beyond which ties, or margins within rounding, leave nothing to conclude."""

MUCH_NOISE = 0.05
"""Share of pairs within the noise of the dtype from which on the report mentions it."""


@dataclass(frozen=True, slots=True)
class Headline:
    """The top of a report."""

    accuracy: str
    interval: str
    """Empty where none was computed."""
    verdict: str
    """"better", "worse" or "open": against tossing a coin."""
    sentence: str
    may: list[str]
    """What may be concluded."""
    may_not: list[str]
    """What may not."""
    against_reference: bool
    """Whether the reward looks at the reference."""


def headline(report: Report) -> Headline:
    """State the result, what follows from it, and what does not."""
    verdict, ties = _verdict(report), ties_throughout(report)
    return Headline(
        accuracy="ties" if ties else percent(report.get(ACCURACY)),
        interval="" if ties else between(report.get(f"{ACCURACY}_interval"), percent),
        verdict=verdict,
        sentence=_sentence(report),
        may=[
            _against_chance(report, verdict),
            *_against_length(report, verdict),
            *_against_each_other(report),
            *_displacement(report),
        ],
        may_not=_limits(report),
        against_reference=rewards_compare(report),
    )


def _sentence(report: Report) -> str:
    prefers = (
        "The model leans more to the chosen answer than its reference does"
        if rewards_compare(report)
        else "The chosen answer has the higher reward, which looks at no reference,"
    )
    prompts = report["prompts"]
    of_prompts = f" of {counted(prompts, 'prompt')}" if prompts != report["pairs"] else ""
    return f"{prefers} in {percent(report.get(ACCURACY))} of {counted(report['pairs'], 'pair')}{of_prompts}."


def _verdict(report: Report) -> str:
    """Against a coin, by the accuracy in which a tie counts half: as wrong, a model that ties often would look worse."""
    verdict = verdict_on(report.get(_TIES_HALF_INTERVAL), level=0.5)
    return "open" if undecided(report) or verdict == NOT_DISTINGUISHABLE else verdict


def _against_chance(report: Report, verdict: str) -> str:
    if undecided(report):
        what = (
            f"Most margins are exactly 0 ({percent(report['rewards/ties'])} ties, which count as not right)"
            if ties_throughout(report)
            else f"{percent(report['rewards/within_noise'])} of the margins lie within the rounding of {_dtype(report)}"
        )
        same = (
            "the model is its reference, or nearly so"
            if rewards_compare(report)
            else "the model does not tell the answers apart"
        )
        return f"{what}: {same}, and there is nothing to conclude yet."
    interval = between(report.get(_TIES_HALF_INTERVAL), lambda bound: _percent_beside(bound or 0, 0.5))
    if not interval:
        return "No interval was computed, so nothing can be said about how sure the figure is."
    if report.get("rewards/ties"):
        interval += " with a tie as half right"
    if verdict == "open":
        return f"It cannot be distinguished from tossing a coin: 50% lies within the interval, {interval}."
    side = "above" if verdict == "better" else "below"
    return f"It ranks such pairs {verdict} than a coin would: the whole interval, {interval}, lies {side} 50%."


def _against_length(report: Report, verdict: str) -> list[str]:
    """Against the better of two rules, chosen by the same pairs: the model is compared with a rule that is rather too good."""
    found = report.get("over_length") or {}
    if undecided(report) or not found.get("interval"):
        return []
    rule = f"always picking the {found['rule']} answer, which is right in {percent(found['rule_accuracy'])}"
    by = f"{points(found['value'])} points, 95% interval {between(found['interval'], points_beside_0)}"
    if (than_rule := verdict_on(found["interval"])) != NOT_DISTINGUISHABLE:
        return [f"It does {than_rule} than {rule}: {by}."]
    if verdict == "better":
        return [f"Length alone is not ruled out as the reason: it cannot be distinguished from {rule}: {by}."]
    return []


def _against_each_other(report: Report) -> list[str]:
    return [_comparison(report, entry) for entry in report["comparisons"][:MOST_COMPARISONS]]


def _comparison(report: Report, entry: Report) -> str:
    bounds = entry["accuracy_interval"]
    other: Report = next((model for model in report["models"] if model["name"] == entry["against"]), {})
    against = f"{entry['against']}{', which ties as the reference itself does' if ties_throughout(other) else ''}"
    pairs, interval = counted(entry["pairs"], "pair"), between(bounds, points_beside_0)
    by = f"{points(entry['accuracy_difference'])} points on the same {pairs}, 95% interval {interval}"
    if (verdict := verdict_on(bounds)) == NOT_DISTINGUISHABLE:
        return f"{entry['model']} cannot be distinguished from {against}: {by}."
    return f"{entry['model']} ranks {'more' if verdict == 'better' else 'fewer'} pairs right than {against}: {by}."


def _displacement(report: Report) -> list[str]:
    displaced = report.get("displacement")
    if displaced is None or displaced <= MOST or undecided(report):
        return []
    further = rewards_compare(report) and report["logratios/rejected"] < min(report["logratios/chosen"], 0)
    return [
        f"Chosen answers have become less likely in {percent(displaced)} of the pairs (likelihood displacement)"
        + ("; rejected ones fell further, which is what the margin sees." if further else ".")
    ]


def _limits(report: Report) -> list[str]:
    limits = [
        "How good the answers are that the model writes itself: nothing was generated here. It ranked answers that others wrote.",
        "How it does on pairs of another kind: the interval is about other pairs drawn like these, and no others.",
    ]
    prompts = report["prompts"]
    if prompts < FEW_PROMPTS:
        what = "prompt" if prompts < report["pairs"] else "pair"
        limits.append(f"Small differences: of {counted(prompts, what)} even the interval is a rough one.")
    noise = report["rewards/within_noise"]
    if noise >= MUCH_NOISE and not undecided(report):
        limits.append(
            f"How {percent(noise)} of the pairs are ranked: their margins lie within the rounding of {_dtype(report)}."
        )
    if "logratios/chosen" in report:
        limits.append(
            "How far the model is from its reference as a KL divergence: the log-ratios are means over given answers, "
            "which are not samples of the model."
        )
    return limits


def _dtype(report: Report) -> str:
    return report.get("dtype") or "the dtype"


def models_in_order(report: Report) -> list[tuple[Report, Report]]:
    """The models, each with its comparison to the first: the first, then the others as given, but checkpoints of one run
    by step."""
    ordered = list(zip(report["models"], [{}, *report["comparisons"]], strict=True))
    runs: dict[str, list[int]] = {}
    for place, (model, _) in enumerate(ordered[1:], start=1):
        if model.get("run") and model.get("step") is not None:
            runs.setdefault(model["run"], []).append(place)
    for places in runs.values():
        members = sorted((ordered[place] for place in places), key=lambda member: int(member[0]["step"]))
        for place, member in zip(places, members, strict=True):
            ordered[place] = member
    return ordered


def ties_throughout(figures: Report) -> bool:
    """Whether a model is its reference, or nearly so: it ranks no pair right then, and is no worse for it."""
    return (figures.get("rewards/ties") or 0) > MOST


def undecided(figures: Report) -> bool:
    """Whether most margins are no larger than their rounding error (ties among them), and on neither side of 0.

    Rounding has no direction: where it could turn most margins one by one, it still does not make 80% of them positive.
    """
    on_a_side = verdict_on(figures.get(_TIES_HALF_INTERVAL), level=0.5) != NOT_DISTINGUISHABLE
    return ties_throughout(figures) or (figures["rewards/within_noise"] > MOST and not on_a_side)


def rewards_compare(report: Report) -> bool:
    """Whether rewards are taken against the reference; else they are the policy's own log-probs."""
    return LossChoice.model_validate(report["loss_choice"]).ranked_by.spec.reward.log_ratio


def describe_reward(report: Report) -> str:
    """The reward of the loss, with the loss and its numbers."""
    choice = LossChoice.model_validate(report["loss_choice"])
    return f"{choice.ranked_by.spec.reward}; loss {choice}"


def verdict_on(bounds: Sequence[float | None] | None, level: float = 0.0) -> str:
    """Which side of a level an interval is on: "better", "worse", or "not distinguishable"."""
    if not bounds or bounds[0] is None or bounds[1] is None or bounds[0] <= level <= bounds[1]:
        return NOT_DISTINGUISHABLE
    return "better" if bounds[0] > level else "worse"


def percent(value: float | None, digits: int = 1) -> str:
    """`0.6721` → `67.2%`; a dash where there is no figure."""
    return "–" if value is None or value != value else f"{100 * value:.{digits}f}%"


def _percent_beside(value: float, level: float) -> str:
    """With as many digits, up to four, as show on which side of `level` it lies."""
    digits = next((d for d in (1, 2, 3) if value == level or round(100 * value, d) != round(100 * level, d)), 4)
    return percent(value, digits)


def counted(count: int, what: str) -> str:
    """`1 pair`, `1,200 pairs`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def points(value: float | None, digits: int = 1) -> str:
    """A difference of accuracies: `+2.1`, in percentage points."""
    return "–" if value is None or value != value else f"{100 * value:+.{digits}f}"


def points_beside_0(value: float | None) -> str:
    """With as many digits, up to four, as show on which side of 0 it lies."""
    digits = (d for d in (1, 2, 3) if not value or round(100 * value, d) != 0)
    return points(value, next(digits, 4))


def number(value: float | None) -> str:
    """With three significant digits."""
    if value is None or value != value:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}".replace("-", "−")


def between(bounds: Sequence[float | None] | None, spelled: Formatter = number) -> str:
    """An interval: `64.1% to 70.0%`; empty where there is none."""
    if not bounds or any(bound is None or bound != bound for bound in bounds):
        return ""
    return f"{spelled(bounds[0])} to {spelled(bounds[1])}"
