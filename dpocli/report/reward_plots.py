"""What pairs get as rewards: their margins, and one side against the other."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from dpocli.report.plot_style import BLUE, GRAY, RED, blank_figure, make_quiet, with_titles

Values = NDArray[np.float64]

FEWEST_BINS, MOST_BINS = 12, 48

TAIL = 0.005
"""Share of pairs at either end that a plot need not reach: one outlier would press all others into a line."""

FEW_PAIRS = 200
"""Below which a plot reaches all of them: each is a good part of what there is."""

MANY_POINTS = 1500
"""Points from which on they are drawn as pixels: as shapes they would be most of the report."""

MOST_POINTS = 20_000


def draw_margins(margins: Values) -> Figure | None:
    """Distribution of the margin; shape of the argument (pairs,). Ties are neither right nor wrong, and have a bar at 0."""
    margins = margins[np.isfinite(margins)]
    if not len(margins):
        return None
    figure = blank_figure(6.6, 3.6)
    area = figure.subplots()
    make_quiet(area)
    others = margins[margins != 0]
    ties = len(margins) - len(others)
    if len(others):
        _draw_bars(area, others, ties)
        median = float(np.median(margins))
        area.axvline(median, color=GRAY, linewidth=1.2, linestyle=(0, (4, 3)), label=f"median {median:.3g}")
    else:
        area.bar(0, ties, width=0.1, color=GRAY, linewidth=0, label=f"{_ties(ties)}: all pairs")
        area.set_xlim(-1, 1)
    area.axvline(0, color=GRAY, linewidth=0.8)
    area.legend(fontsize=8.5, frameon=False)
    area.set_xlabel("margin: chosen - rejected reward" + ("; the ends hold what lies beyond" if _cut(others) else ""))
    area.xaxis.label.set_color(GRAY)
    with_titles(area, "Reward margins", "pairs")
    return figure


def _draw_bars(area: Axes, margins: Values, ties: int) -> None:
    """Margins other than 0. An edge of the bins is 0, so that no bar is half right and half wrong."""
    low, high = _reach(margins)
    if ties:
        low, high = min(low, 0.0), max(high, 0.0)
    num_bins = int(np.clip(2 * np.sqrt(len(margins)), FEWEST_BINS, MOST_BINS))
    width = (high - low) / num_bins
    places = np.arange(np.floor(low / width), np.ceil(high / width) + 1)
    within = np.clip(margins, width * places[0], width * places[-1])
    counts, _ = np.histogram(within, width * places)
    lefts, rights = places[:-1] + 0.05, places[1:] - 0.05
    if ties:  # those beside 0 make room
        lefts, rights = np.where(places[:-1] == 0, 0.3, lefts), np.where(places[1:] == 0, -0.3, rights)
        area.bar(0, ties, width=0.4 * width, color=GRAY, linewidth=0, label=_ties(ties))
    colors = [BLUE if place >= 0 else RED for place in places[:-1]]
    area.bar(width * lefts, counts, width=width * (rights - lefts), align="edge", color=colors, linewidth=0)


def draw_rewards(chosen: Values, rejected: Values) -> Figure | None:
    """Chosen against rejected rewards, each of shape (pairs,)."""
    finite = np.isfinite(chosen) & np.isfinite(rejected)
    chosen, rejected = chosen[finite], rejected[finite]
    if not len(chosen):
        return None
    figure = blank_figure(6.6, 3.6)
    area = figure.subplots()
    make_quiet(area, grid="both")
    (left, right), (bottom, top) = _reach(rejected), _reach(chosen)
    drawn = _evenly(len(chosen))
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
    area.axline((0, 0), slope=1, color=GRAY, linewidth=0.9, linestyle=(0, (4, 3)))
    area.set_xlim(left, right)
    area.set_ylim(bottom, top)
    legend = area.legend(fontsize=8.5, frameon=False)
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set_alpha(1)
    beyond = int(((rejected < left) | (rejected > right) | (chosen < bottom) | (chosen > top)).sum())
    told = f"; {beyond:,} {'pair lies' if beyond == 1 else 'pairs lie'} beyond the axes" if beyond else ""
    area.set_xlabel(f"reward of the rejected answer{told}", color=GRAY)
    with_titles(area, "Chosen against rejected rewards", "reward of the chosen answer")
    return figure


def _evenly(count: int) -> NDArray[np.int64]:
    """Places of the pairs to draw: spread over the data set, the same at each call."""
    return np.linspace(0, count - 1, min(count, MOST_POINTS)).astype(np.int64)


def _reach(values: Values) -> tuple[float, float]:
    """From where to where an axis goes."""
    tail = TAIL if len(values) >= FEW_PAIRS else 0.0
    low, high = (float(bound) for bound in np.quantile(values, [tail, 1 - tail]))
    room = 0.04 * (high - low) or 0.5
    return low - room, high + room


def _cut(values: Values) -> bool:
    if not len(values):
        return False
    low, high = _reach(values)
    return bool(values.min() < low or values.max() > high)


def _ties(count: int) -> str:
    return f"{count:,} {'tie' if count == 1 else 'ties'}"
