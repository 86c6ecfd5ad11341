"""Accuracy by slice, as a plot."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpocli.artifacts.plot_style import BLUE, GRAY, blank_figure, is_number, make_quiet, with_titles
from dpocli.artifacts.visible_text import one_line

MOST_SLICES = 40
"""Lines of the plot; the table has all of them."""


def draw_slices(slices: Mapping[str, Sequence[Mapping[str, Any]]], overall: float | None) -> Figure | None:
    """Accuracy of every slice with its interval, group by group."""
    lines: list[tuple[str, Mapping[str, Any] | None]] = []
    for group, entries in slices.items():
        known = [entry for entry in entries if is_number(entry.get("accuracy"))]
        if len(known) > 1:
            lines += [(one_line(group.replace("_", " "), 34), None), *((str(entry["name"]), entry) for entry in known)]
    lines = lines[:MOST_SLICES]
    if not lines:
        return None
    figure = blank_figure(6.6, 0.7 + 0.24 * len(lines))
    area = figure.subplots()
    make_quiet(area, grid="x")
    for place, (_, entry) in enumerate(lines):
        if entry is not None:
            _draw_slice(area, -place, entry)
    area.axvline(0.5, color=GRAY, linewidth=0.9, linestyle=(0, (4, 3)), zorder=1)
    if is_number(overall):
        area.axvline(float(overall or 0), color=BLUE, linewidth=1.0, alpha=0.6, zorder=1)
    # Names come from the data: a dollar sign in one is no formula.
    labels = [one_line(name, 34) if entry else name for name, entry in lines]
    area.set_yticks([-place for place in range(len(lines))], labels=labels, parse_math=False)
    for label, (_, entry) in zip(area.get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if entry else "bold")
    area.set_ylim(-len(lines) + 0.4, 0.6)
    bounds = [bound for _, entry in lines if entry for bound in _bounds(entry)]
    area.set_xlim(max(0.0, min(0.45, *bounds) - 0.03), min(1.0, max(0.55, *bounds) + 0.03))
    area.spines["left"].set_visible(False)
    with_titles(area, "Accuracy by slice", "95% intervals")
    return figure


def _draw_slice(area: Axes, height: int, entry: Mapping[str, Any]) -> None:
    color = GRAY if entry.get("too_small") else BLUE
    bounds = _bounds(entry)
    area.plot([min(bounds), max(bounds)], [height, height], color=color, linewidth=1.4, zorder=2, clip_on=False)
    face = "none" if entry.get("too_small") else color
    area.plot(
        entry["accuracy"], height, "o", color=color, markerfacecolor=face, markersize=4.5, zorder=3, clip_on=False
    )


def _bounds(entry: Mapping[str, Any]) -> list[float]:
    """Of the interval, where there is one; the accuracy lies within."""
    interval = [bound for bound in entry.get("interval") or [] if is_number(bound)]
    return [*interval, float(entry["accuracy"])]
