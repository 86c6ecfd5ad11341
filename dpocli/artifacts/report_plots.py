"""The plots of a report: each a figure of what is there, or nothing where it is not."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dpocli.artifacts.pair_table import PairTable
from dpocli.artifacts.plot_style import (
    BLUE,
    GRAY,
    RED,
    blank_figure,
    is_number,
    make_quiet,
    plain_number,
    whole_steps,
    with_titles,
)
from dpocli.artifacts.slices_plot import draw_slices

Report = Mapping[str, Any]
Values = NDArray[np.float64]

NAMES = frozenset({"margins", "reliability", "slices", "rewards", "checkpoints"})

FEWEST_BINS, MOST_BINS = 12, 48
TAIL = 0.005
"""Share of pairs at either end that a plot need not reach: one outlier would press all others into a line."""
MANY_POINTS = 1500
"""Points from which on they are drawn as pixels: as shapes they would be most of the report."""
MOST_POINTS = 20_000
FEW_STEPS = 6
"""Checkpoints of which each has its tick."""


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
    figures = {
        "margins": (draw_margins(margins), "How many pairs have which margin; to the left of 0 they are wrong."),
        "reliability": (
            draw_reliability(report.get("calibration") or {}),
            "What the model gives the answer that it prefers, sigma(|margin|), against how often that answer is the chosen "
            "one. On the dashed line it can be taken at its word; the larger a point, the more pairs.",
        ),
        "slices": (
            draw_slices(report.get("slices") or {}, report.get("rewards/accuracies")),
            "Accuracy of each slice with its interval. The solid line is all pairs; hollow points are of too few pairs to tell.",
        ),
        "rewards": (
            draw_rewards(chosen, rejected),
            "Each point is a pair. Above the dashed line the chosen answer has the higher reward.",
        ),
        "checkpoints": (
            draw_checkpoints(report.get("models") or []),
            "Accuracy and mean margin of the checkpoints of the run, with their intervals.",
        ),
    }
    return [Plot(name, caption, figure) for name, (figure, caption) in figures.items() if figure is not None]


def draw_margins(margins: Values) -> Figure | None:
    """Distribution of the margin; shape of the argument (pairs,)."""
    margins = margins[np.isfinite(margins)]
    if not len(margins):
        return None
    figure = blank_figure(6.6, 3.6)
    area = figure.subplots()
    make_quiet(area)
    low, high = _reach(margins)
    # An edge of the bins is 0, so that no bar is half right and half wrong.
    num_bins = int(np.clip(2 * np.sqrt(len(margins)), FEWEST_BINS, MOST_BINS))
    width = (high - low) / num_bins
    edges = width * np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    within = np.clip(margins, edges[0], edges[-1])
    counts, _ = np.histogram(within, edges)
    colors = [BLUE if edge >= -width / 2 else RED for edge in edges[:-1]]
    area.bar(edges[:-1], counts, width=0.9 * width, align="edge", color=colors, linewidth=0)
    area.axvline(0, color=GRAY, linewidth=0.8)
    median = float(np.median(margins))
    area.axvline(median, color=GRAY, linewidth=1.2, linestyle=(0, (4, 3)), label=f"median {median:.3g}")
    area.legend(fontsize=8.5, frameon=False)
    area.set_xlabel("margin: chosen - rejected reward" + ("; the ends hold what lies beyond" if _cut(margins) else ""))
    area.xaxis.label.set_color(GRAY)
    with_titles(area, "Reward margins", "pairs")
    return figure


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
    area.plot(probabilities, accuracies, color=BLUE, linewidth=1.2, zorder=2)
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
    area.set_ylim(min(start, *accuracies), 1)
    area.set_xlabel("probability, mean of the bin", color=GRAY)
    with_titles(area, "Reliability", "share of pairs ranked right")
    return figure


def draw_rewards(chosen: Values, rejected: Values) -> Figure | None:
    """Chosen against rejected rewards, each of shape (pairs,)."""
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    chosen, rejected = chosen[finite], rejected[finite]
    if not len(chosen):
        return None
    if len(chosen) > MOST_POINTS:  # evenly over the data set, the same at each call
        places = np.linspace(0, len(chosen) - 1, MOST_POINTS).astype(np.int64)
        chosen, rejected = chosen[places], rejected[places]
    figure = blank_figure(6.6, 3.6)
    area = figure.subplots()
    make_quiet(area, grid="both")
    (left, right), (bottom, top) = _reach(rejected), _reach(chosen)
    crowded = len(chosen) > MANY_POINTS
    for is_right, color in ((True, BLUE), (False, RED)):
        some = (chosen > rejected) == is_right
        area.plot(
            rejected[some],
            chosen[some],
            "o",
            color=color,
            markersize=3 if crowded else 4,
            markeredgewidth=0,
            alpha=0.3 if crowded else 0.6,
            rasterized=crowded,
            label=f"chosen {'higher' if is_right else 'not higher'}: {some.mean():.0%}",
        )
    area.axline((0, 0), slope=1, color=GRAY, linewidth=0.9, linestyle=(0, (4, 3)))
    area.set_xlim(left, right)
    area.set_ylim(bottom, top)
    legend = area.legend(fontsize=8.5, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    area.set_xlabel("reward of the rejected answer", color=GRAY)
    with_titles(area, "Chosen against rejected rewards", "reward of the chosen answer")
    return figure


def draw_checkpoints(models: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Accuracy and margin of the models that are checkpoints of a run, by step."""
    points = sorted((model for model in models if model.get("step") is not None), key=lambda model: int(model["step"]))
    if len(points) < 2:
        return None
    figure = blank_figure(9.0, 3.4)
    panels = (
        ("rewards/accuracies", "Accuracy over checkpoints", "share of pairs", 0.5),
        ("rewards/margins", "Margin over checkpoints", "chosen - rejected", 0.0),
    )
    for area, (key, title, unit, level) in zip(figure.subplots(1, 2), panels, strict=True):
        make_quiet(area)
        whole_steps(area)
        area.yaxis.set_major_formatter(plain_number)
        with_titles(area, title, unit)
        area.set_xlabel("step", color=GRAY)
        known = [point for point in points if is_number(point.get(key))]
        steps, values = [point["step"] for point in known], [point[key] for point in known]
        if not known:
            area.text(0.5, 0.5, "not comparable", transform=area.transAxes, ha="center", va="center", color=GRAY)
            area.set_yticks([])
            continue
        banded = [point for point in known if point.get(f"{key}_interval")]
        if len(banded) > 1:
            lows, highs = zip(*(point[f"{key}_interval"] for point in banded), strict=True)
            area.fill_between(
                [point["step"] for point in banded], lows, highs, color=BLUE, alpha=0.16, linewidth=0, zorder=2
            )
        area.plot(steps, values, "o-", color=BLUE, linewidth=1.7, markersize=4.5, zorder=3)
        if len(known) <= FEW_STEPS:
            area.set_xticks(steps)
        area.axhline(level, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)
    return figure


def _reach(values: Values) -> tuple[float, float]:
    """From where to where an axis goes."""
    low, high = (float(bound) for bound in np.quantile(values, [TAIL, 1 - TAIL]))
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _cut(values: Values) -> bool:
    low, high = _reach(values)
    return bool(values.min() < low or values.max() > high)
