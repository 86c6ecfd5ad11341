"""A matplotlib figure as SVG inside a page, in the page's colours, light or dark, and without any request."""

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from markupsafe import Markup
from matplotlib import rc_context

from dpocli.report.plot_style import BLUE, GRAY, GRID, RED, SPINE, Plot

_VARIABLES = {BLUE: "--up", RED: "--down", GRAY: "--quiet", SPINE: "--line", GRID: "--grid"}
"""Colour of a plot → variable of the page that replaces it."""


def inline_svg(plot: Plot) -> Markup:
    """The figure as an `<svg>` element, with the caption as its description.

    Args:
        plot: with the colours of `plot_style`, texts in black, and a name that is unique in the page: ids are made of it.
    """
    content = io.BytesIO()
    # Text as text, not as shapes: it can be searched and copied, is small, and has the page's own font.
    with glyphs_may_miss(), rc_context({"svg.fonttype": "none", "svg.hashsalt": plot.name}):
        plot.figure.savefig(content, format="svg", facecolor="none", metadata={"Date": None})
    svg = content.getvalue().decode()
    svg = svg[svg.index("<svg") :]
    # A `<style>` element would apply to the whole page.
    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg, flags=re.DOTALL)
    # Only tags are changed; texts of the data have no quotes or brackets that could look like one.
    svg = re.sub(r"<[^>]+>", lambda tag: _page_colors(_own_ids(tag[0], plot.name)), svg)
    head, _, rest = svg.partition(">")
    width, height = re.findall(r'(?:width|height)="([\d.]+)pt"', head)[:2]
    label = Markup('<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(
        width, height, plot.caption
    )
    return label + Markup(rest)


def _own_ids(tag: str, name: str) -> str:
    """Make ids, and references to them, unique to a figure; drop namespaces, which look like addresses."""
    tag = re.sub(r'\s(?:xmlns(?::\w+)?|version)="[^"]*"', "", tag)
    tag = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    return tag.replace("xlink:href", "href")


def _page_colors(tag: str) -> str:
    for color, variable in _VARIABLES.items():
        tag = tag.replace(color, f"var({variable})")
    return tag


@contextmanager
def glyphs_may_miss() -> Iterator[None]:
    """Silence warnings of characters that the font of a plot lacks, which are drawn as boxes."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*[Gg]lyph.*missing")
        warnings.filterwarnings("ignore", message="(?s).*does not have a glyph")
        yield
