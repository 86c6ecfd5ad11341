"""Points with their intervals, one to a line: accuracy by slice, and accuracy and margin by checkpoint."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes

from dpocli.report.plot_style import BLUE, DASHED, GRAY, Plot, blank_figure, is_number, make_quiet, with_titles
from dpocli.report.sanitize import distinct_labels
from dpocli.report.wording import ACCURACY, MARGIN, Report

MOST_LINES = 40
"""Of the plot of slices, headings included; the table has all."""

FEWEST_SLICES = 2
"""Of a heading: fewer compare nothing."""

LONGEST_NAME = 34

Groups = Mapping[str, Sequence[Report]]
"""Slices by kind, or the checkpoints of a run by its name."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One area of a plot, and where its numbers are in an entry."""

    key: str
    interval: str
    level: float
    """A dashed line between good and bad."""
    title: str
    unit: str
    overall: float | None = None
    """The value of all pairs, a solid line."""
    is_joined: bool = False
    """Whether the points of a heading are steps of one curve."""


def draw_slices(slices: Groups, overall: float | None) -> Plot | None:
    """Accuracy by slice: of all where they fit, else of the largest, of each heading as many as there is room for."""
    known = {kind: [entry for entry in entries if is_number(entry["accuracy"])] for kind, entries in slices.items()}
    known = {kind: entries for kind, entries in known.items() if len(entries) >= FEWEST_SLICES}
    if not known:
        return None
    shown = _fitting(known)
    left_out = sum(map(len, known.values())) - sum(map(len, shown.values()))
    caption = (
        f"Accuracy of {'the largest slices' if left_out else 'each slice'} with its interval. The solid line is all pairs; "
        "hollow points are too uncertain to tell."
    )
    if left_out:
        caption += f" There is no room for {left_out:,} more slice{'' if left_out == 1 else 's'}; the table has all."
    panel = Panel("accuracy", "interval", 0.5, "Accuracy by slice", "95% intervals", overall)
    return _draw("slices", caption, [panel], {kind.replace("_", " "): entries for kind, entries in shown.items()})


def draw_checkpoints(models: Sequence[Report]) -> Plot | None:
    """Accuracy and margin of the checkpoints of each run, by step; none for models that are not checkpoints of a run."""
    runs = runs_of(models)
    if not runs:
        return None
    caption = "Accuracy and mean margin of the checkpoints of each run, by step, with their intervals."
    losses = [model.get("loss_choice") for points in runs.values() for model in points]
    if any(loss != losses[0] for loss in losses):
        caption += " Losses differ, and so do the scales of their margins: only margins of the first loss are drawn."
    accuracy = Panel(ACCURACY, f"{ACCURACY}_interval", 0.5, "Accuracy", "share of pairs", is_joined=True)
    margin = Panel(MARGIN, f"{MARGIN}_interval", 0.0, "Margin", "chosen - rejected", is_joined=True)
    entries = {
        name: [
            {**model, "name": f"step {model['step']:,}"}
            | ({} if model.get("loss_choice") == losses[0] else {MARGIN: None})
            for model in points
        ]
        for name, points in runs.items()
    }
    return _draw("checkpoints", caption, [accuracy, margin], entries)


def runs_of(models: Sequence[Report]) -> dict[str, list[Report]]:
    """The runs with several checkpoints among the models, by name; their checkpoints by step."""
    found: defaultdict[str, list[Report]] = defaultdict(list)
    for model in models:
        if model.get("run") is not None and model.get("step") is not None:
            found[str(model["run"])].append(model)
    groups = [points for points in found.values() if len({point["step"] for point in points}) > 1]
    directories = [_directory([str(point["name"]) for point in points]) for points in groups]
    times = Counter(directories)
    names = [name if name and times[name] == 1 else f"run {place}" for place, name in enumerate(directories, start=1)]
    ordered = (sorted(points, key=lambda point: int(point["step"])) for points in groups)
    return dict(zip(names, ordered, strict=True))


def _directory(names: Sequence[str]) -> str:
    """The directory that holds the checkpoints of a run; empty where they have none in common."""
    try:
        common = os.path.commonpath(names)
    except ValueError:  # some are absolute
        return ""
    return os.path.dirname(common) if os.path.basename(common) == "checkpoints" else common


def _fitting(known: Groups) -> Groups:
    chosen = dict(list(known.items())[: MOST_LINES // (1 + FEWEST_SLICES)])
    room = MOST_LINES - len(chosen)
    counts = {}
    for place, kind in enumerate(sorted(chosen, key=lambda kind: len(chosen[kind]))):  # small ones leave room to others
        counts[kind] = min(len(chosen[kind]), room // (len(chosen) - place))
        room -= counts[kind]
    return {kind: _largest(entries, counts[kind]) for kind, entries in chosen.items()}


def _largest(entries: Sequence[Report], count: int) -> list[Report]:
    """The slices with most pairs, in their order."""
    places = sorted(range(len(entries)), key=lambda place: (-entries[place]["pairs"], place))
    return [entries[place] for place in sorted(places[:count])]


def _draw(name: str, caption: str, panels: Sequence[Panel], groups: Groups) -> Plot:
    """Draw a line for each heading and each entry, and a panel for each kind of value."""
    headings = distinct_labels(groups, LONGEST_NAME)
    labels: list[str] = []
    curves: dict[int, list[Report]] = {}
    for group, entries in groups.items():
        names = distinct_labels((str(entry["name"]) for entry in entries), LONGEST_NAME)
        curves[len(labels)] = list(entries)
        labels += [headings[group], *(names[str(entry["name"])] for entry in entries)]
    figure = blank_figure(4.2 + 2.4 * len(panels), 0.7 + 0.24 * len(labels))
    areas = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for area, panel in zip(areas, panels, strict=True):
        make_quiet(area, grid="x")
        area.axvline(panel.level, color=GRAY, linewidth=0.9, linestyle=DASHED, zorder=1)
        if panel.overall is not None:
            area.axvline(panel.overall, color=BLUE, linewidth=1.0, alpha=0.6, zorder=1)
        for heading, curve in curves.items():
            _draw_points(area, panel, {-heading - place: entry for place, entry in enumerate(curve, start=1)})
        area.spines["left"].set_visible(False)
        with_titles(area, panel.title, panel.unit)
    # Names come from the data: a dollar sign in one begins no formula.
    areas[0].set_yticks([-place for place in range(len(labels))], labels=labels, parse_math=False)
    areas[0].set_ylim(-len(labels) + 0.4, 0.6)
    for place, tick in enumerate(areas[0].get_yticklabels()):
        tick.set_fontweight("bold" if place in curves else "normal")
    return Plot(name, caption, figure)


def _draw_points(area: Axes, panel: Panel, entries: Mapping[int, Report]) -> None:
    """The entries of a heading, by their height."""
    points = {height: entry for height, entry in entries.items() if is_number(entry.get(panel.key))}
    if panel.is_joined:
        values = [entry[panel.key] for entry in points.values()]
        area.plot(values, [*points], color=BLUE, linewidth=0.8, alpha=0.35, zorder=2)
    for height, entry in points.items():
        is_uncertain = bool(entry.get("too_small"))
        color = GRAY if is_uncertain else BLUE
        if interval := entry.get(panel.interval):
            area.plot(interval, [height, height], color=color, linewidth=1.4, zorder=2)
        face = "none" if is_uncertain else color
        area.plot(entry[panel.key], height, "o", color=color, markerfacecolor=face, markersize=4.5, zorder=3)
