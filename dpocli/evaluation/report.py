"""The report of an evaluation as `metrics.json` holds it, and its files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import without_nan
from dpocli.evaluation.bootstrap import mean_interval
from dpocli.evaluation.metrics import (
    accuracies,
    calibration,
    difference,
    half_of_ties,
    log_ratios,
    over_length,
    reward_length_correlation,
    rewards,
)
from dpocli.evaluation.pair_table import PairTable
from dpocli.evaluation.slices import KEPT, slices
from dpocli.run.files import write_atomically, write_json

FORMAT_VERSION = 2

SHARED = (
    *("row", "source", "weight", "num_turns", "prompt_hash", "ref_chosen_logps", "ref_rejected_logps"),
    *("second_ref_chosen_logps", "second_ref_rejected_logps"),
)
"""Columns that are the same for every model."""


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model with the values of its pairs."""

    name: str
    """As given to --model."""
    table: PairTable
    losses: Mapping[str, LossChoice]
    """By name; models are compared by the first."""
    step: int | None = None
    """Of the training that made it."""
    run: str | None = None
    """Names that training: the same for all checkpoints of one."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further figures of this model."""

    @property
    def loss(self) -> LossChoice:
        return self.losses[self.table.losses[0]]


def report_of(models: Sequence[Evaluated]) -> dict[str, Any]:
    """The figures of the first model, then the figures of each model, and the comparisons."""
    first = models[0]
    found = [_of_model(model) for model in models]
    sources = first.table.column("source")
    names = sorted(set(sources.tolist()))
    by_source = {
        name: _figures(first.table.where(sources == name), first.table.losses[0]) for name in names if len(names) > 1
    }
    return {
        "format": FORMAT_VERSION,
        **found[0],
        "by_source": by_source,
        "models": [
            {"name": model.name, "step": model.step, "run": model.run} | figures
            for model, figures in zip(models, found, strict=True)
        ],
        "comparisons": [compare_models(first, other) for other in models[1:]],
    }


def compare_models(model: Evaluated, against: Evaluated) -> dict[str, Any]:
    """A model less another on the same pairs, with intervals of the paired differences: both find the same pairs hard.

    A tie counts half, so that the reference itself, which ties on every pair, is at 50%. Margins are compared only between
    equal losses with equal numbers, which have one scale, and equal tokens.
    """
    rows, rows_there = model.table.column("row"), against.table.column("row")  # tokenizers differ in what is too long
    _, places, places_there = np.intersect1d(rows, rows_there, assume_unique=True, return_indices=True)
    mine, theirs = model.table.where(places), against.table.where(places_there)
    clusters = theirs.clusters
    right, right_there = (half_of_ties(table.column("margins")) for table in (mine, theirs))
    accuracy = difference(right - right_there, clusters)
    found: dict[str, Any] = {
        "model": model.name,
        "against": against.name,
        "pairs": len(mine),
        "accuracy_difference": accuracy["value"],
        "accuracy_interval": accuracy["interval"],
        "margin_difference": None,
        "margin_interval": None,
    }
    if model.loss != against.loss:
        return found | {"why_no_margin": f"the losses differ: {model.loss} and {against.loss}"}
    if (mine.column("pair_id") != theirs.column("pair_id")).any():
        return found | {"why_no_margin": "the tokenizers differ"}
    change = mine.column("margins") - theirs.column("margins")
    interval = mean_interval(change, clusters)
    return found | {
        "margin_difference": float(change.mean()),
        "margin_interval": list(interval) if interval else None,
    }


def _of_model(model: Evaluated) -> dict[str, Any]:
    table, name = model.table, model.table.losses[0]
    right, margins = table.column("chosen_rewards") > table.column("rejected_rewards"), table.column("margins")
    return {
        "loss_choice": model.loss.model_dump(),
        **_figures(table, name),
        "slices": slices(table.columns, right, margins, table.clusters),
        "by_loss": {
            name: {"loss_choice": loss.model_dump()} | _of_loss(table, name)
            for name, loss in model.losses.items()
            if len(model.losses) > 1
        },
        **model.extra,
    }


def _figures(table: PairTable, loss: str) -> dict[str, Any]:
    clusters = table.clusters
    tokens = table.column("chosen_tokens"), table.column("rejected_tokens")
    chosen, rejected, margins = (
        table.column(table.name_of(loss, kind)) for kind in ("chosen_rewards", "rejected_rewards", "margins")
    )
    return {
        "pairs": len(table),
        "prompts": clusters.count,
        "interval": clusters.describe(),
        **_of_loss(table, loss),
        **log_ratios(table.columns),
        "accuracies": accuracies(table.columns, clusters),
        "over_length": over_length(margins, *tokens, clusters),
        "calibration": calibration(margins, clusters),
        "correlation/reward_length": reward_length_correlation(chosen, rejected, *tokens),
    }


def _of_loss(table: PairTable, loss: str) -> dict[str, Any]:
    kinds = ("chosen_rewards", "rejected_rewards", "noise", "losses")
    chosen, rejected, noise, losses = (table.column(table.name_of(loss, kind)) for kind in kinds)
    weights = table.column("weight")
    return {
        "loss": float((weights * losses).sum() / weights.sum()) if weights.sum() else None,
        **rewards(chosen, rejected, noise, table.clusters),
    }


def write_report(directory: Path, report: dict[str, Any], models: Sequence[Evaluated]) -> None:
    """Write `metrics.json` and `pairs.parquet`.

    The columns of the second model begin with `model-2/`, and so on; they are null where it has no such pair.
    """
    columns = {name: _arrow(values) for name, values in models[0].table.columns.items()}
    rows = models[0].table.column("row")
    for number, model in enumerate(models[1:], start=2):
        among = model.table.column("row")
        places = np.minimum(np.searchsorted(among, rows), len(among) - 1)
        places = pa.array(places, mask=among[places] != rows)
        for name, values in model.table.columns.items():
            if not (name in SHARED or name.startswith(KEPT)):
                columns[f"model-{number}/{name}"] = _arrow(values).take(places)
    write_atomically(
        directory / "pairs.parquet", lambda file: pq.write_table(pa.table(columns), file, compression="zstd")
    )
    write_json(directory / "metrics.json", without_nan(report))


def _arrow(values: NDArray[Any]) -> pa.Array:
    """A column of numbers, texts or equal types as it is, NaN as null; any other as JSON."""
    if values.dtype != object:
        return pa.array(values.tolist() if values.dtype.kind == "U" else values, from_pandas=True)
    items = values.tolist()
    if {type(item) for item in items if item is not None} <= {str} or len({type(item) for item in items}) == 1:
        try:
            found = pa.array(items)
            # Refuses structs without fields.
            pq.write_table(pa.table({"": found.slice(0, 0)}), pa.BufferOutputStream())
            return found
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            pass
    return pa.array([None if item is None else json.dumps(item, ensure_ascii=False) for item in items])
