"""`curves.png`: the metrics of a training run over its steps."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullLocator

from dpocli.report.plot_style import (
    BLUE,
    DASHED,
    GRAY,
    RED,
    blank_figure,
    make_quiet,
    plain_number,
    whole_steps,
    with_titles,
)
from dpocli.run.files import write_atomically

MetricRows = Sequence[Mapping[str, Any]]

HELD_OUT = "eval/"

SMOOTHING = 0.05
"""Share of the run that the thick line averages over."""

CROWDED = 1000
"""Steps from which on the thin line is paler, so that it does not hide the thick one."""


@dataclass(frozen=True, slots=True)
class _Curve:
    key: str
    label: str = ""
    color: str = BLUE


@dataclass(frozen=True, slots=True)
class _Panel:
    title: str
    unit: str
    curves: tuple[_Curve, ...]
    reference: float | None = None
    """A horizontal line between good and bad."""
    limits: tuple[float, float] | None = None
    log: bool = False


# fmt: off
PANELS = (
    _Panel("Loss", "", (_Curve("loss"),)),
    _Panel("Reward accuracy", "ties count half", (_Curve("rewards/accuracies"),), reference=0.5, limits=(-0.02, 1.02)),
    _Panel("Reward margin", "chosen - rejected", (_Curve("rewards/margins"),), reference=0.0),
    _Panel("Rewards", "", (_Curve("rewards/chosen", "chosen", BLUE), _Curve("rewards/rejected", "rejected", RED)), reference=0.0),
    _Panel("Log-probs of the sides", "nats", (_Curve("logps/chosen", "chosen", BLUE), _Curve("logps/rejected", "rejected", RED))),
    _Panel("Gradient norm before clipping", "", (_Curve("grad_norm"),), log=True),
)
# fmt: on


def draw_curves(metrics: MetricRows, path: Path) -> None:
    """Draw the rows of `metrics.jsonl` as a PNG file.

    Training is a thin line with its running mean, held-out figures (`eval/…`) are markers. Missing metrics are left out.

    Args:
        metrics: rows in the order of their steps, each with `step`.
        path: the file to write.
    """
    figure = blank_figure(13.5, 7.2)
    axes = figure.subplots(2, 3, sharex=True).flat
    for panel, area in zip(PANELS, axes, strict=True):
        _draw_panel(area, panel, metrics)
    _draw_learning_rate(figure.axes[len(PANELS) - 1], metrics)
    for area in figure.axes[3:6]:
        area.set_xlabel("step", color=GRAY)
    _set_steps(figure.axes[0], metrics)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    write_atomically(path, content.getvalue())


def _draw_panel(area: Axes, panel: _Panel, metrics: MetricRows) -> None:
    make_quiet(area)
    whole_steps(area)
    with_titles(area, panel.title, panel.unit)
    several = len(panel.curves) > 1
    for curve in panel.curves:
        _draw_training(area, curve, metrics, curve.label if several else "training")
        _draw_held_out(area, curve, metrics, f"{curve.label}, held out" if several else "held out")
    if not area.lines:
        area.text(0.5, 0.5, "not recorded", transform=area.transAxes, ha="center", va="center", color=GRAY)
        area.set_yticks([])
        return
    if panel.reference is not None:
        area.axhline(panel.reference, color=GRAY, linewidth=0.8, linestyle=DASHED, zorder=1)
    if panel.limits:
        area.set_ylim(*panel.limits)
    if panel.log and _spans_a_decade(area):
        area.set_yscale("log")
        area.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        area.yaxis.set_major_formatter(plain_number)
        area.yaxis.set_minor_locator(NullLocator())
    area.legend(fontsize=8.5, frameon=False)


def _spans_a_decade(area: Axes) -> bool:
    """Whether a logarithmic axis shows more than a linear one (and can show everything)."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=np.float64) for line in area.lines])
    return bool(values.min() > 0 and values.max() >= 10 * values.min())


def _draw_training(area: Axes, curve: _Curve, metrics: MetricRows, label: str) -> None:
    steps, values = _series(metrics, curve.key)
    if len(values) < 3:
        if len(values):
            area.plot(steps, values, "o-", color=curve.color, markersize=3, label=label)
        return
    faint = 0.35 if len(values) < CROWDED else 0.18
    area.plot(steps, values, color=curve.color, linewidth=0.7, alpha=faint, zorder=2)
    area.plot(steps, _running_mean(values), color=curve.color, linewidth=1.9, label=label, zorder=3)


def _draw_held_out(area: Axes, curve: _Curve, metrics: MetricRows, label: str) -> None:
    steps, values = _series(metrics, HELD_OUT + curve.key)
    if len(values):
        (line,) = area.plot(steps, values, "o:", color=curve.color, linewidth=1.0, label=label, zorder=4)
        line.set(markersize=6, markerfacecolor="white", markeredgewidth=1.6)


def _draw_learning_rate(area: Axes, metrics: MetricRows) -> None:
    steps, values = _series(metrics, "learning_rate")
    if not len(values):
        return
    right = area.twinx()
    style = "o--" if len(values) < 3 else "--"
    right.plot(steps, values, style, color=GRAY, linewidth=1.2, markersize=3, label="learning rate (right)")
    right.set_ylim(0, float(values.max()) * 1.15 or 1.0)
    right.yaxis.set_major_formatter(plain_number)
    right.tick_params(colors=GRAY, labelsize=9, length=0)
    for spine in right.spines.values():
        spine.set_visible(False)
    lines = [line for line in (*area.lines, *right.lines) if not str(line.get_label()).startswith("_")]
    right.legend(lines, [str(line.get_label()) for line in lines], fontsize=8.5, frameon=False)
    if legend := area.get_legend():
        legend.remove()


def _set_steps(area: Axes, metrics: MetricRows) -> None:
    """Give all panels the same whole steps, with room around a single one."""
    steps = [row["step"] for row in metrics if "step" in row] or [0]
    margin = max(0.5, 0.03 * (max(steps) - min(steps)))
    area.set_xlim(min(steps) - margin, max(steps) + margin)


def _series(metrics: MetricRows, key: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Steps and values of one metric, without the rows that lack it (NaN is null in `metrics.jsonl`).

    In accuracies a tie counts half here, so that the untrained policy, which ties on every pair, is at chance.
    """
    ties = key.replace("accuracies", "ties") if key.endswith("accuracies") else None
    points = [
        (row["step"], row[key] + 0.5 * (row.get(ties) or 0 if ties else 0))
        for row in metrics
        if row.get(key) is not None and "step" in row
    ]
    finite = [(step, value) for step, value in points if np.isfinite(value)]
    table = np.array(finite, dtype=np.float64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _running_mean(values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Mean over a centred window, which is cut at both ends."""
    half = max(1, round(len(values) * SMOOTHING / 2))
    total = np.concatenate(([0.0], np.cumsum(values)))
    index = np.arange(len(values))
    first, last = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return np.asarray((total[last] - total[first]) / (last - first))
