"""The report on the terminal: tables that fit a hundred columns."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Printer
from dpocli.console.progress import format_value
from dpocli.evaluation.figures import FIGURES
from dpocli.report.sanitize import distinct_labels, one_line
from dpocli.report.wording import ACCURACY, MARGIN, Report, counted, models_in_order, ties_throughout

LONGEST_NAME = 28

LONGEST_LOSS = 80
"""Losses may differ only in their numbers; a narrow window folds them."""

LONGEST_PATH = 240
"""In a sentence, which has no columns."""

INTERVAL = "95% interval"


def render(printer: Printer, report: Report) -> None:
    """Print the figures of the first model, the other losses and models, the slices and the gates."""
    loss = LossChoice.model_validate(report["loss_choice"])
    several = f" of {counted(report['prompts'], 'prompt')}" if report["prompts"] < report["pairs"] else ""
    model = one_line(report["model"], LONGEST_PATH)
    printer.say(f"{model}: {counted(report['pairs'], 'pair')}{several}, rewards of {loss}")
    rows = [
        [figure.label, value, _span(figure.interval(report)), figure.note]
        for figure in FIGURES
        if (value := figure.value(report)) is not None
    ]
    printer.table("", ["", "value", INTERVAL, "what it is"], rows)
    if report["by_loss"]:
        _losses(printer, report["by_loss"])
    if len(report["models"]) > 1:
        _models(printer, report)
    if report["slices"]:
        _slices(printer, report["slices"])
    printer.say("Accuracy counts a pair as right when its chosen reward is strictly higher; a tie is not right.")
    for gate in report.get("requirements", []):
        outcome = "holds" if gate["holds"] else "does NOT hold"
        printer.say(f"{gate['require']}: {outcome} ({format_value(gate['value'])})")


def _losses(printer: Printer, by_loss: Mapping[str, Report]) -> None:
    columns = ["", "accuracy", INTERVAL, "ties", "margin", "median", "chosen", "rejected", "loss"]
    names = distinct_labels(by_loss, LONGEST_LOSS)
    rows = [
        [
            *(names[name], *_accuracy(entry), entry["rewards/ties"], entry[MARGIN]),
            *(entry["rewards/margins_quantiles"]["0.5"], entry["rewards/chosen"], entry["rewards/rejected"]),
            entry["loss"],
        ]
        for name, entry in by_loss.items()
    ]
    printer.table("By loss", columns, rows)


def _models(printer: Printer, report: Report) -> None:
    models = models_in_order(report)
    within = _common_directory([entry["name"] for entry, _ in models])
    names = distinct_labels((entry["name"].removeprefix(within) for entry, _ in models), LONGEST_NAME - 4)
    rows = [
        [
            *(names[entry["name"].removeprefix(within)], entry["step"], *_accuracy(entry)),
            *(found.get("accuracy_difference"), _span(found.get("accuracy_interval")), found.get("margin_difference")),
        ]
        for entry, found in models
    ]
    columns = ["model", "step", "accuracy", INTERVAL, "difference", INTERVAL, "margin diff."]
    printer.table("Models; differences: the first less each, pair by pair, a tie as half right", columns, rows)
    for entry in filter(ties_throughout, report["models"]):
        printer.say(
            f"{one_line(entry['name'], LONGEST_PATH)} ties on {entry['rewards/ties']:.0%} of the pairs, as the reference "
            "itself does: a tie is not right, so its accuracy says nothing."
        )
    for found in report["comparisons"]:
        if why := found.get("why_no_margin"):
            printer.say(f"{one_line(found['against'], LONGEST_PATH)}: compared by accuracy only; {why}.")


def _slices(printer: Printer, slices: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    kinds = distinct_labels(slices, LONGEST_NAME)
    rows = []
    for kind, entries in slices.items():
        names = distinct_labels((entry["name"] for entry in entries), LONGEST_NAME)
        for place, entry in enumerate(entries):
            uncertain = "too uncertain to tell" if entry["too_small"] else ""
            figures = (entry["pairs"], entry["accuracy"], _span(entry["interval"]), entry["margin"], uncertain)
            rows.append(["" if place else kinds[kind], names[entry["name"]], *figures])
    printer.table("Slices", ["by", "", "pairs", "accuracy", INTERVAL, "margin", ""], rows)


def _accuracy(figures: Report) -> tuple[float, str]:
    return figures[ACCURACY], _span(figures[f"{ACCURACY}_interval"])


def _span(interval: Sequence[float] | None) -> str:
    return f"{interval[0]:.3g} to {interval[1]:.3g}" if interval else ""


def _common_directory(names: Sequence[str]) -> str:
    """The directory that holds all absolute paths, where there are several; names are shown without it."""
    absolute = [os.path.dirname(name) for name in names if os.path.isabs(name)]
    return os.path.join(os.path.commonpath(absolute), "") if len(absolute) > 1 else ""
