"""What all plots look like."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

BLUE, RED, GRAY = "#0072b2", "#d55e00", "#5f5f5f"  # two colours that the colour-blind tell apart

PURPLE, GREEN = "#7850aa", "#00805e"  # for lines beside these, where no colour means right or wrong

SPINE, GRID = "#c8c8c8", "#ececec"


def blank_figure(width: float, height: float) -> Figure:
    """In inches, without a window or any other state of the library."""
    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def make_quiet(area: Axes, grid: str = "y") -> None:
    """No frame, faint lines: the data are what is seen."""
    for side in ("top", "right"):
        area.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        area.spines[side].set_color(SPINE)
    area.tick_params(colors=GRAY, labelsize=9, length=0, labelbottom=True)
    area.grid(axis=grid, color=GRID, linewidth=0.8)  # type: ignore[arg-type]
    area.set_axisbelow(True)
    area.set_facecolor("none")  # what lies behind a plot may be dark


def with_titles(area: Axes, title: str, unit: str) -> None:
    """What is drawn, on the left; in which unit, on the right."""
    area.set_title(title, loc="left", fontsize=11, fontweight="bold")
    area.set_title(unit, loc="right", fontsize=9, color=GRAY)


def whole_steps(area: Axes) -> None:
    """Ticks at whole numbers along the bottom."""
    area.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6, min_n_ticks=1))


def plain_number(value: float, _: float) -> str:
    """As a tick label, without powers of ten."""
    return f"{value:g}"


def is_number(value: object) -> bool:
    """Whether there is something to draw."""
    return isinstance(value, int | float) and bool(np.isfinite(value))
