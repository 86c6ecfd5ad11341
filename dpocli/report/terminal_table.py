"""The report on the terminal: what a reader wants first, in tables that fit a hundred columns."""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Printer
from dpocli.console.progress import format_value
from dpocli.report.sanitize import one_line, told_apart
from dpocli.report.wording import counted, models_in_order

LONGEST_NAME = 28

LONGEST_LOSS = 80
"""Its numbers are what tells it from others; a narrow window folds it."""

LONGEST_PATH = 240
"""In a sentence, which has no columns."""

MANY_TIES = 0.5
"""Share of pairs, beyond which accuracies mislead."""

Row = Sequence[object]


def render(printer: Printer, report: Mapping[str, Any]) -> None:
    """Prints the figures of the first model, the other losses and models, and the slices."""
    loss = LossChoice.model_validate(report["loss_choice"])
    several = f" of {counted(report['prompts'], 'prompt')}" if report["prompts"] < report["pairs"] else ""
    printer.say(f"{_in_words(report['model'])}: {counted(report['pairs'], 'pair')}{several}, rewards of {loss}")
    printer.table("", ["", "value", "95% interval", "what it is"], list(_figures(report)))
    if report["by_loss"]:
        _losses(printer, report["by_loss"])
    if len(report["models"]) > 1:
        _models(printer, report)
    if report["slices"]:
        _slices(printer, report["slices"])
    printer.say("Accuracy counts a pair as right when its chosen reward is strictly higher; a tie is not right.")
    for gate in report.get("requirements", []):
        printer.say(
            f"{gate['require']}: {'holds' if gate['holds'] else 'does NOT hold'} ({format_value(gate['value'])})"
        )


def _figures(report: Mapping[str, Any]) -> Iterator[Row]:
    quantiles = report["rewards/margins_quantiles"]
    yield "reward accuracy", report["rewards/accuracies"], _span(report["rewards/accuracies_interval"]), ""
    yield "ties", report["rewards/ties"], "", ""
    yield "within numeric noise", report["rewards/within_noise"], "", "margins that rounding alone may turn"
    yield "margin", report["rewards/margins"], _span(report["rewards/margins_interval"]), "chosen - rejected reward"
    spread = ", ".join(f"{q} {format_value(quantiles[p])}" for p, q in (("0.05", "5%"), ("0.95", "95%")))
    yield "  median", quantiles["0.5"], "", spread
    yield "loss", report["loss"], "", ""
    for name, meaning in _OTHER_ACCURACIES.items():
        if name in report["accuracies"]:
            entry = report["accuracies"][name]
            yield f"accuracy, {name.replace('_', ' ')}", entry["value"], _span(entry["interval"]), meaning
    yield "Brier score", report["calibration"]["brier"], "", "of σ(margin); 0.25 knows nothing"
    if "logratios/chosen" in report:
        yield "log-ratio, chosen", report["logratios/chosen"], "", "mean, nats; not a KL"
        yield "log-ratio, rejected", report["logratios/rejected"], "", ""
        yield "displacement", report["displacement"], "", "chosen answers that became less likely"
    yield "reward and length", report["correlation/reward_length"], "", "Pearson's correlation"
    if second := report.get("second_reference"):
        accuracy = second["accuracy"]
        yield "second reference", accuracy["value"], _span(accuracy["interval"]), f"accuracy, {second['pairs']:,} pairs"
        if "rewards/accuracies" in second:
            span = _span(second["rewards/accuracies_interval"])
            yield "  rewards against it", second["rewards/accuracies"], span, "accuracy"
            yield "", second["rewards/margins"], _span(second["rewards/margins_interval"]), "margin"


_OTHER_ACCURACIES = {
    "length_normalised": "per token",
    "policy": "raw log-probs, no reference",
    "reference": "the reference's own",
    "pick_the_longer": "baseline; equal lengths count half",
}


def _losses(printer: Printer, by_loss: Mapping[str, Mapping[str, Any]]) -> None:
    columns = ["", "accuracy", "95% interval", "ties", "margin", "median", "chosen", "rejected", "loss"]
    names = told_apart(by_loss, LONGEST_LOSS)
    rows = [
        [
            names[name],
            entry["rewards/accuracies"],
            _span(entry["rewards/accuracies_interval"]),
            entry["rewards/ties"],
            entry["rewards/margins"],
            entry["rewards/margins_quantiles"]["0.5"],
            entry["rewards/chosen"],
            entry["rewards/rejected"],
            entry["loss"],
        ]
        for name, entry in by_loss.items()
    ]
    printer.table("By loss", columns, rows)


def _models(printer: Printer, report: Mapping[str, Any]) -> None:
    """The first against each other, on the same pairs."""
    models = models_in_order(report)
    columns = ["model", "step", "accuracy", "95% interval", "difference", "95% interval", "margin diff."]
    within = _common_directory([entry["name"] for entry, _ in models])
    names = {entry["name"]: entry["name"].removeprefix(within) for entry, _ in models}
    shown = told_apart(names.values(), LONGEST_NAME - 4)
    rows = [
        [
            shown[names[entry["name"]]],
            entry["step"],
            entry["rewards/accuracies"],
            _span(entry["rewards/accuracies_interval"]),
            found.get("accuracy_difference"),
            _span(found.get("accuracy_interval")),
            found.get("margin_difference"),
        ]
        for entry, found in models
    ]
    printer.table("Models; differences: the first less each, pair by pair, a tie as half right", columns, rows)
    for entry in report["models"]:
        if entry["rewards/ties"] > MANY_TIES:
            printer.say(
                f"{_in_words(entry['name'])} ties on {entry['rewards/ties']:.0%} of the pairs, as the reference itself does: a tie is not"
                " right, so its accuracy says nothing."
            )
    for found in report["comparisons"]:
        if why := found.get("why_no_margin"):
            printer.say(f"{_in_words(found['against'])}: compared by accuracy only; {why}.")


def _slices(printer: Printer, slices: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    kinds = told_apart(slices, LONGEST_NAME)
    names = {kind: told_apart((entry["name"] for entry in entries), LONGEST_NAME) for kind, entries in slices.items()}
    rows = [
        [
            kinds[kind] if place == 0 else "",
            names[kind][entry["name"]],
            entry["pairs"],
            entry["accuracy"],
            _span(entry["interval"]),
            entry["margin"],
            "too uncertain to tell" if entry["too_small"] else "",
        ]
        for kind, entries in slices.items()
        for place, entry in enumerate(entries)
    ]
    if rows:
        printer.table("Slices", ["by", "", "pairs", "accuracy", "95% interval", "margin", ""], rows)


def _span(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else ""


def _common_directory(names: Sequence[str]) -> str:
    """What all absolute paths among them begin with, where there are several: it tells none from another."""
    absolute = [os.path.dirname(name) for name in names if os.path.isabs(name)]
    return os.path.join(os.path.commonpath(absolute), "") if len(absolute) > 1 else ""


def _in_words(name: str) -> str:
    return one_line(name, LONGEST_PATH)
