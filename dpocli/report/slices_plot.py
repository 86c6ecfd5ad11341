"""Accuracy by slice, as a plot."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpocli.report.plot_style import BLUE, GRAY, blank_figure, is_number, make_quiet, with_titles
from dpocli.report.sanitize import told_apart

MOST_LINES = 40
"""Of the plot, headings among them; the table has all."""

FEWEST_SLICES = 2
"""Of a heading: fewer compare nothing."""

LONGEST_NAME = 34

Slice = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ShownSlices:
    """Those that the plot has room for."""

    groups: Mapping[str, Sequence[Slice]]
    left_out: int
    """Slices that have an accuracy and no line."""


def shown_slices(slices: Mapping[str, Sequence[Slice]]) -> ShownSlices:
    """Some slices of each heading: all where they fit, else the largest, as many of each heading as there is room for."""
    known = {
        group: [entry for entry in entries if is_number(entry.get("accuracy"))] for group, entries in slices.items()
    }
    known = {group: entries for group, entries in known.items() if len(entries) >= FEWEST_SLICES}
    chosen = dict(list(known.items())[: MOST_LINES // (1 + FEWEST_SLICES)])
    room = MOST_LINES - len(chosen)
    groups = {}
    for place, group in enumerate(
        sorted(chosen, key=lambda group: len(chosen[group]))
    ):  # what small ones leave is free
        count = min(len(chosen[group]), room // (len(chosen) - place))
        groups[group] = _largest(chosen[group], count)
        room -= count
    total = sum(len(entries) for entries in known.values())
    return ShownSlices(
        {group: groups[group] for group in chosen}, total - sum(len(entries) for entries in groups.values())
    )


def draw_slices(slices: Mapping[str, Sequence[Slice]], overall: float | None) -> Figure | None:
    """Accuracy of the slices with their intervals, group by group."""
    groups = shown_slices(slices).groups
    headings = told_apart([group.replace("_", " ") for group in groups], LONGEST_NAME)
    lines: list[tuple[str, Slice | None]] = []
    for group, entries in groups.items():
        names = told_apart([str(entry["name"]) for entry in entries], LONGEST_NAME)
        lines += [
            (headings[group.replace("_", " ")], None),
            *((names[str(entry["name"])], entry) for entry in entries),
        ]
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
    area.set_yticks([-place for place in range(len(lines))], labels=[name for name, _ in lines], parse_math=False)
    for label, (_, entry) in zip(area.get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if entry else "bold")
    area.set_ylim(-len(lines) + 0.4, 0.6)
    bounds = [bound for _, entry in lines if entry for bound in _bounds(entry)]
    area.set_xlim(max(0.0, min(0.45, *bounds) - 0.03), min(1.0, max(0.55, *bounds) + 0.03))
    area.spines["left"].set_visible(False)
    with_titles(area, "Accuracy by slice", "95% intervals")
    return figure


def _largest(entries: Sequence[Slice], count: int) -> list[Slice]:
    """In the order in which they stand."""
    places = sorted(range(len(entries)), key=lambda place: (-(entries[place].get("pairs") or 0), place))
    return [entries[place] for place in sorted(places[:count])]


def _draw_slice(area: Axes, height: int, entry: Slice) -> None:
    color = GRAY if entry.get("too_small") else BLUE
    bounds = _bounds(entry)
    area.plot([min(bounds), max(bounds)], [height, height], color=color, linewidth=1.4, zorder=2, clip_on=False)
    face = "none" if entry.get("too_small") else color
    area.plot(
        entry["accuracy"], height, "o", color=color, markerfacecolor=face, markersize=4.5, zorder=3, clip_on=False
    )


def _bounds(entry: Slice) -> list[float]:
    """Of the interval, where there is one; the accuracy lies within."""
    interval = [bound for bound in entry.get("interval") or [] if is_number(bound)]
    return [*interval, float(entry["accuracy"])]
