"""The plots of a report: each a figure of what is there, or nothing where it is not."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from dpocli.evaluation.pair_table import PairTable
from dpocli.report.checkpoints_plot import draw_checkpoints, margins_compare, runs_of
from dpocli.report.plot_style import BLUE, GRAY, blank_figure, is_number, make_quiet, with_titles
from dpocli.report.reward_plots import MOST_POINTS, draw_margins, draw_rewards
from dpocli.report.slices_plot import draw_slices, shown_slices

Report = Mapping[str, Any]

NAMES = frozenset({"margins", "reliability", "slices", "rewards", "checkpoints"})


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure, and what it shows in words."""

    name: str
    """Of its file, without `.png`."""
    caption: str
    figure: Figure


def report_plots(report: Report, table: PairTable) -> list[Plot]:
    """All plots for which the report holds something, in the order in which they are read."""
    margins, chosen, rejected = (
        table.column(name).astype(np.float64) for name in ("margins", "chosen_rewards", "rejected_rewards")
    )
    calibration = report.get("calibration") or {}
    figures = {
        "margins": (draw_margins(margins), _about_margins(bool((margins == 0).any()))),
        "reliability": (draw_reliability(calibration), _about_reliability(calibration)),
        "slices": (draw_slices(report.get("slices") or {}, report.get("rewards/accuracies")), _about_slices(report)),
        "rewards": (draw_rewards(chosen, rejected), _about_rewards(len(table))),
        "checkpoints": (draw_checkpoints(report.get("models") or []), _about_checkpoints(report)),
    }
    return [Plot(name, caption, figure) for name, (figure, caption) in figures.items() if figure is not None]


def _about_margins(ties: bool) -> str:
    told = "How many pairs have which margin; to the left of 0 they are wrong."
    return f"{told} The gray bar at 0 holds the ties." if ties else told


def _about_reliability(calibration: Report) -> str:
    intervals = any(_interval(bin_) for bin_ in calibration.get("bins") or [])
    return (
        "What the model gives the answer that it prefers, sigma(|margin|), against how often that answer is the chosen one"
        f"{', with its interval' if intervals else ''}. On the dashed line it can be taken at its word; the larger a point, "
        "the more pairs."
    )


def _about_slices(report: Report) -> str:
    left_out = shown_slices(report.get("slices") or {}).left_out
    which = "each slice" if not left_out else "the largest slices"
    told = (
        f"Accuracy of {which} with its interval. The solid line is all pairs; hollow points are too uncertain to tell."
    )
    if not left_out:
        return told
    return f"{told} There is no room for {left_out:,} more slice{'' if left_out == 1 else 's'}; the table has all."


def _about_rewards(pairs: int) -> str:
    which = "Each point is a pair." if pairs <= MOST_POINTS else f"Each point is a pair, {MOST_POINTS:,} of {pairs:,}."
    return f"{which} Above the dashed line the chosen answer has the higher reward."


def _about_checkpoints(report: Report) -> str:
    runs = runs_of(report.get("models") or [])
    if len(runs) < 2:
        return "Accuracy and mean margin of the checkpoints of the run, with their intervals."
    told = "Accuracy and mean margin of the checkpoints, with their intervals: a line for each run."
    if margins_compare(runs):
        return told
    return f"{told} Losses differ, and so do the scales of their margins: only those of the first run are drawn."


def draw_reliability(calibration: Mapping[str, Any]) -> Figure | None:
    """Mean probability against accuracy, of each bin that holds pairs."""
    bins = [
        bin_
        for bin_ in calibration.get("bins") or []
        if bin_.get("pairs") and is_number(bin_.get("accuracy")) and is_number(bin_.get("mean_probability"))
    ]
    if not bins:
        return None
    figure = blank_figure(6.6, 3.6)
    area = figure.subplots()
    make_quiet(area, grid="both")
    area.plot([0, 1], [0, 1], color=GRAY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    probabilities, accuracies = ([bin_[name] for bin_ in bins] for name in ("mean_probability", "accuracy"))
    largest = max(bin_["pairs"] for bin_ in bins)
    area.plot(probabilities, accuracies, color=BLUE, linewidth=0.8, alpha=0.35, zorder=2)
    banded = [(bin_, _interval(bin_)) for bin_ in bins if _interval(bin_)]
    for bin_, bounds in banded:
        area.plot([bin_["mean_probability"]] * 2, bounds, color=BLUE, linewidth=1.1, alpha=0.6, zorder=2, clip_on=False)
    area.scatter(
        probabilities,
        accuracies,
        s=[14 + 150 * bin_["pairs"] / largest for bin_ in bins],
        color=BLUE,
        alpha=0.75,
        linewidths=0,
        zorder=3,
        clip_on=False,
    )
    # Bins begin at a half where each pair is seen from the side that the model prefers.
    start = 0.5 if min(probabilities) >= 0.5 else 0.0
    area.set_xlim(start, 1)
    area.set_ylim(min(start, *accuracies, *(min(bounds) for _, bounds in banded)), 1)
    area.set_xlabel("probability, mean of the bin", color=GRAY)
    with_titles(area, "Reliability", "share of pairs ranked right")
    return figure


def _interval(bin_: Mapping[str, Any]) -> list[float]:
    """Of the accuracy of a bin; empty where there is none."""
    bounds = bin_.get("accuracy_interval") or []
    return list(bounds) if len(bounds) == 2 and all(map(is_number, bounds)) else []
