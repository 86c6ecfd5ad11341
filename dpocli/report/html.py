"""`report.html`, one file that needs nothing else, and its plots as PNG beside it.

Everything that comes from data goes through the template's variables, which are all escaped and cleaned of characters that
cannot be shown. The page's content security policy forbids scripts and requests.
"""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from dpocli.evaluation.pair_table import PairTable
from dpocli.report.inline_svg import glyphs_may_miss, inline_svg
from dpocli.report.pair_plots import report_plots
from dpocli.report.plot_style import Plot
from dpocli.report.sanitize import one_line, plain
from dpocli.report.tables import figure_lines, gate_lines, loss_lines, made_lines, model_lines
from dpocli.report.token_heatmap import (
    ExamplePair,
    ExamplePairs,
    ExampleToken,
    Palette,
    colored,
    folded,
    signed,
    strongest,
)
from dpocli.report.wording import between, headline, number, percent
from dpocli.run.files import make_directory, write_atomically

Report = Mapping[str, Any]

FILE_NAME, PLOTS = "report.html", "plots"

NO_PAIRS = ExamplePairs((), (), has_reference=True)


def write_html_report(
    directory: Path,
    report: Report,
    table: PairTable,
    examples: ExamplePairs = NO_PAIRS,
    settings: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Write `report.html` and `plots/*.png`.

    Args:
        directory: of the report.
        report: as in `metrics.json`.
        table: the pairs of the first model.
        examples: the pairs to show in full.
        settings: more about how the report was made: heading → name → value.
    """
    plots = report_plots(report, table)
    make_directory(directory / PLOTS)
    for plot in plots:
        content = io.BytesIO()
        with glyphs_may_miss():
            plot.figure.savefig(content, format="png", facecolor="white")
        write_atomically(directory / PLOTS / f"{plot.name}.png", content.getvalue())
    write_atomically(directory / FILE_NAME, html_report(report, plots, examples, settings or {}))


def html_report(
    report: Report, plots: list[Plot], examples: ExamplePairs, settings: Mapping[str, Mapping[str, Any]]
) -> str:
    """The page."""
    palette = Palette.of(examples)
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            report=report,
            headline=headline(report),
            gates=gate_lines(report),
            warnings=report.get("warnings") or [],
            figures=figure_lines(report),
            losses=loss_lines(report),
            slices={kind: entries for kind, entries in report["slices"].items() if len(entries) > 1},
            models=model_lines(report),
            made=made_lines(report, settings),
            plots={plot.name: (inline_svg(plot), plot.caption) for plot in plots},
            palette=palette,
            worst=[_in_page(pair, palette) for pair in examples.worst],
            best=[_in_page(pair, palette) for pair in examples.best],
        )
    )


def _in_page(pair: ExamplePair, palette: Palette) -> dict[str, Any]:
    sides = (
        ("chosen", pair.chosen, pair.chosen_reward),
        ("rejected", pair.rejected, pair.rejected_reward),
    )
    return {
        "pair": pair,
        "prompt": folded(pair.prompt),
        "sides": [
            {
                "name": name,
                "reward": reward,
                "tokens": colored(tokens, palette),
                "strongest": [_strong(token) for token in strongest(tokens)] if palette.has_reference else [],
            }
            for name, tokens, reward in sides
        ],
    }


def _strong(token: ExampleToken) -> tuple[str, str]:
    blank = token.text.translate({ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥"})
    return token.text.strip() or blank, signed(token.log_ratio)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("dpocli.report"),
        autoescape=True,
        finalize=_shown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "percent": percent,
        "number": number,
        "signed": signed,
        "between_shares": lambda bounds: between(bounds, percent),
        "one_line": one_line,
    }
    return environment


def _shown(value: object) -> object:
    """Clean a variable of the template before it is escaped."""
    if value is None or isinstance(value, Markup):
        return "" if value is None else value
    return plain(str(value))
