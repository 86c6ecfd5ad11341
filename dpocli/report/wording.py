"""What a report says in words: the result, what a reader may conclude from it, and what not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dpocli.config.loss_expression import LossChoice

Report = Mapping[str, Any]

ACCURACY, MARGIN = "rewards/accuracies", "rewards/margins"

_TIES_HALF_INTERVAL = "rewards/accuracies_ties_half_interval"

FEW_PROMPTS = 100
"""Below which an interval is too wide, and too rough itself, to carry a decision."""

MOST_COMPARISONS = 3
"""That the headline tells, the first ones; the table has all."""

NOT_TOLD_APART = "not told apart"

MOST = 0.5
"""Share of pairs beyond which ties, or margins within rounding, leave nothing to conclude."""

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
    against_reference: bool
    """Whether the reward looks at the reference."""


def headline(report: Report) -> Headline:
    """The result in words, with the bounds of what it means."""
    verdict = _verdict(report)
    return Headline(
        accuracy="ties" if ties_throughout(report) else percent(report.get(ACCURACY)),
        interval="" if ties_throughout(report) else between(report.get(f"{ACCURACY}_interval"), percent),
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
    prompts = report.get("prompts")
    of_prompts = f" of {counted(prompts, 'prompt')}" if prompts and prompts != report["pairs"] else ""
    return f"{prefers} in {percent(report.get(ACCURACY))} of {counted(report['pairs'], 'pair')}{of_prompts}."


def _verdict(report: Report) -> str:
    """By the accuracy in which a tie is right by half: with a tie as wrong, a model that ties often would look worse than a
    coin."""
    bounds = report.get(_TIES_HALF_INTERVAL)
    if not bounds or None in bounds or undecided(report):
        return "open"
    return "better" if bounds[0] > 0.5 else "worse" if bounds[1] < 0.5 else "open"


def _against_chance(report: Report, verdict: str) -> str:
    if ties_throughout(report):
        return (
            f"Most margins are exactly 0 ({percent(report['rewards/ties'])} ties, which count as not right): "
            f"{_SAME[rewards_compare(report)]}, and there is nothing to conclude yet."
        )
    if undecided(report):
        return (
            f"{percent(report['rewards/within_noise'])} of the margins lie within the rounding of "
            f"{report.get('dtype') or 'the dtype'}: {_SAME[rewards_compare(report)]}, and there is nothing to conclude yet."
        )
    bounds = report.get(_TIES_HALF_INTERVAL)
    told = between(bounds, lambda bound: percent_beside(bound, 0.5))
    if not told:
        return "No interval was computed, so nothing can be said about how sure the figure is."
    if report.get("rewards/ties"):
        told += " with a tie as right by half"
    if verdict == "better":
        return f"It ranks such pairs better than a coin would: the whole interval, {told}, lies above 50%."
    if verdict == "worse":
        return f"It ranks such pairs worse than a coin would: the whole interval, {told}, lies below 50%."
    return f"It cannot be told from tossing a coin: 50% lies within the interval, {told}."


_SAME = {True: "the model is its reference, or nearly so", False: "the model does not tell the answers apart"}


def _against_length(report: Report, verdict: str) -> list[str]:
    """Against the better of two rules, which is chosen by the same pairs: so it is held up to the model rather too high."""
    found = report.get("over_length") or {}
    bounds = found.get("interval")
    if undecided(report) or not bounds:
        return []
    rule = f"always picking the {found['rule']} answer, which is right in {percent(found['rule_accuracy'])}"
    by = f"{points(found['value'])} points, 95% interval {between(bounds, points_beside_0)}"
    if bounds[0] > 0:
        return [f"It does better than {rule}: {by}."]
    if bounds[1] < 0:
        return [f"It does worse than {rule}: {by}."]
    if verdict == "better":
        return [f"Length alone is not ruled out as the reason: it cannot be told from {rule}: {by}."]
    return []


def _against_each_other(report: Report) -> list[str]:
    told = []
    for entry in (report.get("comparisons") or [])[:MOST_COMPARISONS]:
        bounds, difference = entry.get("accuracy_interval"), entry.get("accuracy_difference")
        if difference is None:
            continue
        other = _model(report, entry["against"])
        against = f"{entry['against']}{', which ties as the reference itself does' if ties_throughout(other) else ''}"
        verdict = verdict_on(bounds)
        by = f"{points(difference)} points on the same {counted(entry['pairs'], 'pair')}, 95% interval {between(bounds, points_beside_0)}"
        told.append(
            f"{entry['model']} cannot be told from {against}: {by}."
            if verdict == NOT_TOLD_APART
            else f"{entry['model']} ranks {'more' if verdict == 'better' else 'fewer'} pairs right than {against}: {by}."
        )
    return told


def _displacement(report: Report) -> list[str]:
    displaced = report.get("displacement")
    if displaced is None or displaced <= 0.5 or undecided(report):
        return []
    chosen, rejected = report.get("logratios/chosen"), report.get("logratios/rejected")
    further = rewards_compare(report) and chosen is not None and rejected is not None and rejected < min(chosen, 0)
    return [
        f"Chosen answers have become less likely in {percent(displaced)} of the pairs (likelihood displacement)"
        + ("; rejected ones fell further, which is what the margin sees." if further else ".")
    ]


def _limits(report: Report) -> list[str]:
    limits = [
        "How good the answers are that the model writes itself: nothing was generated here. It ranked answers that others wrote.",
        "How it does on pairs of another kind: the interval is about other pairs drawn like these, and no others.",
    ]
    units = report.get("prompts") or report["pairs"]
    if units < FEW_PROMPTS:
        what = "prompt" if units < report["pairs"] else "pair"
        limits.append(f"Small differences: of {counted(units, what)} even the interval is a rough one.")
    noise = report.get("rewards/within_noise")
    if noise is not None and noise >= MUCH_NOISE and not undecided(report):
        limits.append(
            f"How {percent(noise)} of the pairs are ranked: their margins lie within the rounding of {report.get('dtype') or 'the dtype'}."
        )
    if report.get("logratios/chosen") is not None:
        limits.append(
            "How far the model is from its reference as a KL divergence: the log-ratios are means over given answers, "
            "which are not samples of the model."
        )
    return limits


def models_in_order(report: Report) -> list[tuple[Report, Report]]:
    """The first model, then the others as they were given, but those of one run in order of their step; each with its
    comparison to the first."""
    models, comparisons = report.get("models") or [], report.get("comparisons") or []
    padded = [{}, *comparisons, *({} for _ in models)]
    given: list[tuple[Report, Report]] = list(zip(models, padded, strict=False))
    ordered = list(given)
    runs: dict[str, list[int]] = {}
    for place, (model, _) in enumerate(given[1:], start=1):
        if model.get("run") and model.get("step") is not None:
            runs.setdefault(model["run"], []).append(place)
    for places in runs.values():
        members = sorted((given[place] for place in places), key=lambda member: int(member[0]["step"]))
        for place, member in zip(places, members, strict=True):
            ordered[place] = member
    return ordered


def ties_throughout(figures: Report) -> bool:
    """Whether a model is its reference, or nearly so: it ranks no pair right then, and is no worse for it."""
    return (figures.get("rewards/ties") or 0) > MOST


def undecided(figures: Report) -> bool:
    """Whether most margins are no larger than what rounding does to them (ties among them), and are not on one side either.

    Rounding has no direction: where it could turn most margins one by one, it still does not make 80% of them positive.
    """
    bounds = figures.get(_TIES_HALF_INTERVAL)
    on_a_side = bounds and None not in bounds and not bounds[0] <= 0.5 <= bounds[1]
    return ties_throughout(figures) or ((figures.get("rewards/within_noise") or 0) > MOST and not on_a_side)


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


def percent_beside(value: float, level: float) -> str:
    """With as many digits, up to four, as it takes to see on which side of `level` it lies."""
    digits = next((d for d in (1, 2, 3) if value == level or round(100 * value, d) != round(100 * level, d)), 4)
    return percent(value, digits)


def counted(count: int, what: str) -> str:
    """`1 pair`, `1,200 pairs`."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def points(value: float | None) -> str:
    """A difference of accuracies: `+2.1`, in percentage points."""
    return "–" if value is None or value != value else f"{100 * value:+.1f}"


def points_beside_0(value: float) -> str:
    """With as many digits, up to four, as it takes to see on which side of 0 it lies."""
    digits = next((d for d in (1, 2, 3) if value == 0 or round(100 * value, d) != 0), 4)
    return f"{100 * value:+.{digits}f}"


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
