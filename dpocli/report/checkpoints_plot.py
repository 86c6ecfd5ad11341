"""Accuracy and margin over the checkpoints of runs, as a plot."""

import os
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dpocli.report.plot_style import (
    BLUE,
    GRAY,
    GREEN,
    PURPLE,
    RED,
    blank_figure,
    is_number,
    make_quiet,
    plain_number,
    whole_steps,
    with_titles,
)
from dpocli.report.sanitize import one_line, told_apart

Model = Mapping[str, Any]

FEW_STEPS = 6
"""Checkpoints of which each has its tick."""

LONGEST_NAME, LONGEST_IN_TITLE = 44, 18

NAMES_IN_A_ROW = 2

_COLORS, _MARKERS, _DASHES = (BLUE, PURPLE, GREEN, RED), "os^D", ("-", "--", ":")


@dataclass(frozen=True, slots=True)
class Run:
    """Checkpoints of one training, by step."""

    name: str
    points: Sequence[Model]


def runs_of(models: Sequence[Model]) -> list[Run]:
    """The runs of which several checkpoints are there, in the order in which they come."""
    found: defaultdict[str, list[Model]] = defaultdict(list)
    for model in models:
        if model.get("run") is not None and model.get("step") is not None:
            found[str(model["run"])].append(model)
    groups = [points for points in found.values() if len({point["step"] for point in points}) > 1]
    ordered = [sorted(points, key=lambda point: int(point["step"])) for points in groups]
    return [Run(name, points) for name, points in zip(_names(ordered), ordered, strict=True)]


def margins_compare(runs: Sequence[Run]) -> bool:
    """Whether all were trained, and so ranked, by one loss: margins of others are of another scale."""
    losses = [point.get("loss_choice") for run in runs for point in run.points]
    return all(loss == losses[0] for loss in losses)


def draw_checkpoints(models: Sequence[Model]) -> Figure | None:
    """A line for each run; none for a model that is of none."""
    runs = runs_of(models)
    if not runs:
        return None
    rows_of_names = -(-len(runs) // NAMES_IN_A_ROW) if len(runs) > 1 else 0
    figure = blank_figure(9.0, 3.4 + 0.2 * rows_of_names)
    accuracies, margins = figure.subplots(1, 2)
    _draw_panel(accuracies, runs, "rewards/accuracies", 0.5)
    with_titles(accuracies, "Accuracy over checkpoints", "share of pairs")
    if margins_compare(runs):
        _draw_panel(margins, runs, "rewards/margins", 0.0)
        title = "Margin over checkpoints"
    else:
        loss = runs[0].points[0].get("loss_choice")
        alike = [point for point in runs[0].points if point.get("loss_choice") == loss]
        _draw_panel(margins, [Run(runs[0].name, alike)], "rewards/margins", 0.0)
        title = f"Margin of “{one_line(runs[0].name, LONGEST_IN_TITLE)}” only"
    with_titles(margins, title, "chosen - rejected")
    if len(runs) > 1:
        _name_runs(figure, accuracies, runs)
    return figure


def _draw_panel(area: Axes, runs: Sequence[Run], key: str, level: float) -> None:
    make_quiet(area)
    whole_steps(area)
    area.yaxis.set_major_formatter(plain_number)
    area.set_xlabel("step", color=GRAY)
    for place, run in enumerate(runs):
        _draw_run(area, place, [point for point in run.points if is_number(point.get(key))], key)
    steps = {point["step"] for run in runs for point in run.points if is_number(point.get(key))}
    if not steps:
        area.text(0.5, 0.5, "not comparable", transform=area.transAxes, ha="center", va="center", color=GRAY)
        area.set_yticks([])
        return
    if len(steps) <= FEW_STEPS:
        area.set_xticks(sorted(steps))
    area.axhline(level, color=GRAY, linewidth=0.8, linestyle=(0, (4, 3)), zorder=1)


def _draw_run(area: Axes, place: int, points: Sequence[Model], key: str) -> None:
    color = _COLORS[place % len(_COLORS)]
    banded = [point for point in points if point.get(f"{key}_interval")]
    if len(banded) > 1:
        lows, highs = zip(*(point[f"{key}_interval"] for point in banded), strict=True)
        steps = [point["step"] for point in banded]
        area.fill_between(steps, lows, highs, color=color, alpha=0.16, linewidth=0, zorder=2)
    area.plot(
        [point["step"] for point in points],
        [point[key] for point in points],
        marker=_MARKERS[place % len(_MARKERS)],
        linestyle=_DASHES[place // len(_COLORS) % len(_DASHES)],
        color=color,
        linewidth=1.7,
        markersize=4.5,
        zorder=3,
        label=f"run {place}",
    )


def _name_runs(figure: Figure, area: Axes, runs: Sequence[Run]) -> None:
    handles, labels = area.get_legend_handles_labels()
    columns = min(len(runs), NAMES_IN_A_ROW)
    legend = figure.legend(handles, labels, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    shown = told_apart([run.name for run in runs], LONGEST_NAME)
    for text, run in zip(legend.get_texts(), runs, strict=True):  # set here, a name may begin with `_` and hold `$`
        text.set_parse_math(False)
        text.set_text(shown[run.name])


def _names(groups: Sequence[Sequence[Model]]) -> list[str]:
    """By the directory that holds a run's checkpoints; by number where that tells no run from another."""
    found = [_directory([str(point.get("name") or "") for point in points]) for points in groups]
    times = Counter(found)
    return [name if name and times[name] == 1 else f"run {place}" for place, name in enumerate(found, start=1)]


def _directory(names: Sequence[str]) -> str:
    """What the paths have in common, less the directory that every run has."""
    try:
        common = os.path.commonpath(names)
    except ValueError:  # some are absolute, or empty
        return ""
    return os.path.dirname(common) if os.path.basename(common) == "checkpoints" else common
