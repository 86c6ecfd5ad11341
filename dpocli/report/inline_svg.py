"""A matplotlib figure as SVG inside a page: in the page's colours, light or dark, and asking nobody for anything."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from dpocli.report.plot_style import BLUE, GRAY, GREEN, GRID, PURPLE, RED, SPINE

_VARIABLES = {
    BLUE: "--up",
    RED: "--down",
    PURPLE: "--other",
    GREEN: "--fourth",
    GRAY: "--quiet",
    SPINE: "--line",
    GRID: "--grid",
}
"""Colour of a plot → the variable of the page that takes its place."""


def inline_svg(figure: Figure, name: str, description: str) -> Markup:
    """The figure as an `<svg>` element.

    Args:
        figure: with the colours of `plot_style`, and texts in black.
        name: unique in the page: ids of several figures would meet otherwise.
        description: what it shows, for those who cannot see it.
    """
    content = io.BytesIO()
    # As text, not as shapes: it can be searched and copied, is small, and takes the page's own font.
    with glyphs_may_miss(), rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(content, format="svg", facecolor="none", metadata={"Date": None})
    svg = content.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    # A `<style>` in a page is one for the whole page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # Everything below stands in tags; texts of the data have no quotes or brackets that could look like one.
    svg = re.sub(r"<[^>]+>", lambda tag: _page_colors(_own_ids(tag[0], name)), svg)
    head, _, rest = svg.partition(">")
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', head)[:2]
    label = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        width, height, description
    )
    return label + Markup(rest)


def _own_ids(tag: str, name: str) -> str:
    """Ids, and what refers to them, of this figure alone; no namespaces, which look like addresses."""
    tag = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", tag)
    tag = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return tag.replace("xlink:href", "href")


def _page_colors(tag: str) -> str:
    for color, variable in _VARIABLES.items():
        tag = tag.replace(color, f"var({variable})")
    return tag


@contextmanager
def glyphs_may_miss() -> Iterator[None]:
    """Names in the data may be in any script; where the font of a plot lacks it, boxes stand there, and no warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph.*missing")
        warnings.filterwarnings("ignore", message="(?s).*does not have a glyph")
        yield
