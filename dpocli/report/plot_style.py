"""The style of all plots."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, RED, GRAY = "#0072b2", "#d55e00", "#5f5f5f"  # distinguishable for the colour-blind

SPINE, GRID = "#c8c8c8", "#ececec"

DASHED = (0, (4, 3))


@dataclass(frozen=True, slots=True)
class Plot:
    """A figure with its caption."""

    name: str
    """Of its file, without `.png`."""
    caption: str
    figure: Figure


def blank_figure(width: float, height: float) -> Figure:
    """A figure of this size in inches, without a window or any other state of the library."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def make_quiet(area: Axes, grid: str = "y") -> None:
    """Remove the frame and make lines faint, so that the data stand out."""
    for side in ("top", "right"):
        area.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        area.spines[side].set_color(SPINE)
    area.tick_params(colors=GRAY, labelsize=9, length=0, labelbottom=True)
    area.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    area.set_axisbelow(True)
    area.set_facecolor("none")  # the page behind a plot may be dark


def with_titles(area: Axes, title: str, unit: str) -> None:
    """Write what is drawn on the left, in which unit on the right."""
    area.set_title(title, loc="left", fontsize=11, fontweight="bold")
    area.set_title(unit, loc="right", fontsize=9, color=GRAY)


def whole_steps(area: Axes) -> None:
    """Put ticks at whole numbers along the bottom."""
    area.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def plain_number(value: float, _: float) -> str:
    """A tick label without powers of ten."""
    return f"{value:g}"


def is_number(value: object) -> bool:
    """Whether a value is finite."""
    return isinstance(value, int | float) and bool(np.isfinite(value))
