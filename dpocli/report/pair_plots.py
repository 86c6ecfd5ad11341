"""The plots of a report about single pairs: margins, rewards of both sides, and how far margins can be trusted."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from numpy.typing import NDArray

from dpocli.evaluation.pair_table import PairTable
from dpocli.report.interval_plots import draw_checkpoints, draw_slices
from dpocli.report.plot_style import BLUE, DASHED, GRAY, RED, Plot, blank_figure, make_quiet, with_titles
from dpocli.report.wording import ACCURACY, Report

Values = NDArray[np.float64]

WIDTH, HEIGHT = 6.6, 3.6

FEWEST_BINS, MOST_BINS = 12, 48

TAIL = 0.005
"""Share of pairs at either end that an axis need not reach: one outlier would press all others into a line."""

FEW_PAIRS = 200
"""Below which an axis reaches all of them: each is a good part of the data."""

MANY_POINTS = 1500
"""Points from which on they are drawn as pixels: as shapes they would be most of the report."""

MOST_POINTS = 20_000


def report_plots(report: Report, table: PairTable) -> list[Plot]:
    """All plots for which the report has data, in the order in which they are read."""
    plots = (
        draw_margins(table.column("margins").astype(np.float64)),
        draw_reliability(report["calibration"]),
        draw_slices(report["slices"], report[ACCURACY]),
        draw_rewards(*(table.column(f"{side}_rewards").astype(np.float64) for side in ("chosen", "rejected"))),
        draw_checkpoints(report["models"]),
    )
    return [plot for plot in plots if plot is not None]


def draw_margins(margins: Values) -> Plot | None:
    """Distribution of the margin; shape of the argument (pairs,). Ties are neither right nor wrong: they have a bar at 0."""
    margins = margins[np.isfinite(margins)]
    if not len(margins):
        return None
    figure = blank_figure(WIDTH, HEIGHT)
    area = figure.subplots()
    make_quiet(area)
    others = margins[margins != 0]
    ties = len(margins) - len(others)
    label = f"{ties:,} {'tie' if ties == 1 else 'ties'}"
    is_cut = False
    if len(others):
        is_cut = _draw_bars(area, others, ties, label)
        median = float(np.median(margins))
        area.axvline(median, color=GRAY, linewidth=1.2, linestyle=DASHED, label=f"median {median:.3g}")
    else:
        area.bar(0, ties, width=0.1, color=GRAY, linewidth=0, label=f"{label}: all pairs")
        area.set_xlim(-1, 1)
    area.axvline(0, color=GRAY, linewidth=0.8)
    area.legend(fontsize=8.5, frameon=False)
    area.set_xlabel(
        "margin: chosen - rejected reward" + ("; the ends hold what lies beyond" if is_cut else ""), color=GRAY
    )
    with_titles(area, "Reward margins", "pairs")
    caption = "How many pairs have which margin; to the left of 0 they are wrong."
    return Plot("margins", f"{caption} The gray bar at 0 holds the ties." if ties else caption, figure)


def _draw_bars(area: Axes, margins: Values, ties: int, label: str) -> bool:
    """Margins other than 0; whether some lie beyond the axis. 0 is an edge of the bins, so no bar is right and wrong."""
    low, high = _reach(margins)
    is_cut = bool(margins.min() < low or margins.max() > high)
    if ties:
        low, high = min(low, 0.0), max(high, 0.0)
    num_bins = int(np.clip(2 * np.sqrt(len(margins)), FEWEST_BINS, MOST_BINS))
    width = (high - low) / num_bins
    places = np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    within = np.clip(margins, width * places[0], width * places[-1])
    counts, _ = np.histogram(within, width * places)
    lefts, rights = places[:-1] + 0.05, places[1:] - 0.05
    if ties:  # the bars beside 0 make room
        lefts, rights = np.where(places[:-1] == 0, 0.3, lefts), np.where(places[1:] == 0, -0.3, rights)
        area.bar(0, ties, width=0.4 * width, color=GRAY, linewidth=0, label=label)
    colors = [BLUE if place >= 0 else RED for place in places[:-1]]
    area.bar(width * lefts, counts, width=width * (rights - lefts), align="edge", color=colors, linewidth=0)
    return is_cut


def draw_rewards(chosen: Values, rejected: Values) -> Plot | None:
    """Chosen against rejected rewards, each of shape (pairs,)."""
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    chosen, rejected = chosen[finite], rejected[finite]
    if not len(chosen):
        return None
    figure = blank_figure(WIDTH, HEIGHT)
    area = figure.subplots()
    make_quiet(area, grid="both")
    (left, right), (bottom, top) = _reach(rejected), _reach(chosen)
    drawn = np.linspace(0, len(chosen) - 1, min(len(chosen), MOST_POINTS)).astype(np.int64)
    crowded = len(drawn) > MANY_POINTS
    for label, is_so, color in (
        ("chosen higher", chosen > rejected, BLUE),
        ("chosen lower", chosen < rejected, RED),
        ("equal", chosen == rejected, GRAY),
    ):
        if not is_so.any():
            continue
        some = drawn[is_so[drawn]]
        area.plot(
            rejected[some],
            chosen[some],
            "o",
            color=color,
            markersize=3 if crowded else 4,
            markeredgewidth=0,
            alpha=0.3 if crowded else 0.6,
            rasterized=crowded,
            label=f"{label}: {is_so.mean():.0%}",
        )
    area.axline((0, 0), slope=1, color=GRAY, linewidth=0.9, linestyle=DASHED)
    area.set_xlim(left, right)
    area.set_ylim(bottom, top)
    for handle in area.legend(fontsize=8.5, frameon=False).legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    beyond = int(((rejected < left) | (rejected > right) | (chosen < bottom) | (chosen > top)).sum())
    note = f"; {beyond:,} {'pair lies' if beyond == 1 else 'pairs lie'} beyond the axes" if beyond else ""
    area.set_xlabel(f"reward of the rejected answer{note}", color=GRAY)
    with_titles(area, "Chosen against rejected rewards", "reward of the chosen answer")
    some_of = f", {MOST_POINTS:,} of {len(chosen):,}" if len(chosen) > MOST_POINTS else ""
    caption = f"Each point is a pair{some_of}. Above the dashed line the chosen answer has the higher reward."
    return Plot("rewards", caption, figure)


def draw_reliability(calibration: Mapping[str, Any]) -> Plot | None:
    """Mean probability against accuracy, of each bin that holds pairs."""
    bins = calibration["bins"]
    if not bins:
        return None
    figure = blank_figure(WIDTH, HEIGHT)
    area = figure.subplots()
    make_quiet(area, grid="both")
    area.plot([0, 1], [0, 1], color=GRAY, linewidth=0.9, linestyle=DASHED, zorder=1)
    names = ("mean_probability", "accuracy", "accuracy_interval", "pairs")
    probabilities, accuracies, intervals, counts = ([bin_[name] for bin_ in bins] for name in names)
    area.plot(probabilities, accuracies, color=BLUE, linewidth=0.8, alpha=0.35, zorder=2)
    for probability, interval in zip(probabilities, intervals, strict=True):
        area.plot([probability] * 2, interval, color=BLUE, linewidth=1.1, alpha=0.6, zorder=2, clip_on=False)
    sizes = [14 + 150 * count / max(counts) for count in counts]
    area.scatter(probabilities, accuracies, s=sizes, color=BLUE, alpha=0.75, linewidths=0, zorder=3, clip_on=False)
    area.set_xlim(0.5, 1)  # each pair is seen from the side that the model prefers
    area.set_ylim(min(0.5, *(low for low, _ in intervals)), 1)
    area.set_xlabel("probability, mean of the bin", color=GRAY)
    with_titles(area, "Reliability", "share of pairs ranked right")
    caption = (
        "The probability that the model gives to the answer that it prefers, sigma(|margin|), against how often that answer "
        "is the chosen one, with its interval. On the dashed line the two agree; the larger a point, the more pairs."
    )
    return Plot("reliability", caption, figure)


def _reach(values: Values) -> tuple[float, float]:
    """The ends of an axis."""
    tail = TAIL if len(values) >= FEW_PAIRS else 0.0
    low, high = (float(bound) for bound in np.quantile(values, [tail, 1 - tail]))
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room
