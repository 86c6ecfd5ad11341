"""What `evaluate` finds: the figures made of per-pair values, as `metrics.json` holds them, and the files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, slots=True)
class Evaluated:
    """A model and what it makes of the pairs."""

    name: str
    """As given to --model."""
    table: PairTable
    losses: Mapping[str, LossChoice]
    """By name; the first is the one that models are compared by."""
    step: int | None = None
    """Of the training that made it."""
    run: str | None = None
    """Which training that was: the same for all checkpoints of one."""
    extra: Mapping[str, Any] | None = None
    """Further figures of this model."""

    @property
    def loss(self) -> LossChoice:
        return self.losses[self.table.losses[0]]


def report_of(models: Sequence[Evaluated]) -> dict[str, Any]:
    """What `metrics.json` holds: the figures of the first model at the top, then those of each, and the comparisons."""
    first = models[0]
    found = [_of_model(model) for model in models]
    sources = first.table.column("source")
    names = sorted(set(sources.tolist()))
    by_source = {
        name: _whole(first.table.where(sources == name), first.table.losses[0]) for name in names if len(names) > 1
    }
    return {
        "format": FORMAT_VERSION,
        **found[0],
        "by_source": by_source,
        "models": [
            {"name": model.name, "step": model.step, "run": model.run} | figures
            for model, figures in zip(models, found, strict=True)
        ],
        "comparisons": [compare(first, other) for other in models[1:]],
    }


def compare(model: Evaluated, against: Evaluated) -> dict[str, Any]:
    """A model less another on the same pairs: the interval is of the paired difference, since both know the same hard ones.

    A tie is right by half, so that the reference itself, which ties on every pair, stands at 50%. Margins of other losses, or numbers of them, have another scale, and those of other tokens are sums of something else.
    """
    mine, theirs = _on_the_same_rows(model.table, against.table)
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


def _on_the_same_rows(one: PairTable, other: PairTable) -> tuple[PairTable, PairTable]:
    """Both less the pairs that only one has: tokenizers differ in what is too long."""
    _, places, places_there = np.intersect1d(
        one.column("row"), other.column("row"), assume_unique=True, return_indices=True
    )
    return one.where(places), other.where(places_there)


def _of_model(model: Evaluated) -> dict[str, Any]:
    table, name = model.table, model.table.losses[0]
    right, margins = table.column("chosen_rewards") > table.column("rejected_rewards"), table.column("margins")
    return {
        "loss_choice": model.loss.model_dump(),
        **_whole(table, name),
        "slices": slices(table.columns, right, margins, table.clusters),
        "by_loss": {
            name: {"loss_choice": loss.model_dump()} | _rewards(table, name)
            for name, loss in model.losses.items()
            if len(model.losses) > 1
        },
        **(model.extra or {}),
    }


def _whole(table: PairTable, loss: str) -> dict[str, Any]:
    clusters = table.clusters
    tokens = table.column("chosen_tokens"), table.column("rejected_tokens")
    sides = table.column(table.name_of(loss, "chosen_rewards")), table.column(table.name_of(loss, "rejected_rewards"))
    return {
        "pairs": len(table),
        "prompts": clusters.count,
        "interval": clusters.describe(),
        **_rewards(table, loss),
        **log_ratios(table.columns),
        "accuracies": accuracies(table.columns, clusters),
        "over_length": over_length(table.column(table.name_of(loss, "margins")), *tokens, clusters),
        "calibration": calibration(table.column(table.name_of(loss, "margins")), clusters),
        "correlation/reward_length": reward_length_correlation(*sides, *tokens),
    }


def _rewards(table: PairTable, loss: str) -> dict[str, Any]:
    """What a loss and its rewards say of the pairs."""
    kinds = ("chosen_rewards", "rejected_rewards", "noise", "losses")
    chosen, rejected, noise, losses = (table.column(table.name_of(loss, kind)) for kind in kinds)
    weights = table.column("weight")
    return {
        "loss": float((weights * losses).sum() / weights.sum()) if weights.sum() else None,
        **rewards(chosen, rejected, noise, table.clusters),
    }


def write_report(directory: Path, report: dict[str, Any], models: Sequence[Evaluated]) -> None:
    """Writes `metrics.json` and `pairs.parquet`, each whole or not at all.

    The columns of the second model begin with `model-2/`, and so on; they are null where it has no such pair.
    """
    columns = {name: _arrow(values) for name, values in models[0].table.columns.items()}
    rows = models[0].table.column("row")
    for number, model in enumerate(models[1:], start=2):
        places = _places(rows, model.table.column("row"))
        for name, values in model.table.columns.items():
            if not (name in SHARED or name.startswith(KEPT)):
                columns[f"model-{number}/{name}"] = _arrow(values).take(pa.array(places, mask=places < 0))
    write_atomically(
        directory / "pairs.parquet", lambda file: pq.write_table(pa.table(columns), file, compression="zstd")
    )
    write_json(directory / "metrics.json", without_nan(report))


SHARED = (
    *("row", "source", "weight", "num_turns", "prompt_hash", "ref_chosen_logps", "ref_rejected_logps"),
    *("second_ref_chosen_logps", "second_ref_rejected_logps"),
)
"""Columns that say the same of a pair whatever the model."""


def _places(rows: NDArray[np.int64], among: NDArray[np.int64]) -> NDArray[np.int64]:
    """Of each row, where it stands in `among`, which is sorted; -1 where it does not. Shape of `rows`."""
    places = np.minimum(np.searchsorted(among, rows), len(among) - 1)
    return np.where(among[places] == rows, places, -1)


def _arrow(values: NDArray[Any]) -> pa.Array:
    if values.dtype != object:
        return pa.array(values.tolist() if values.dtype.kind == "U" else values, from_pandas=True)  # NaN: null
    items = values.tolist()
    if {type(item) for item in items if item is not None} <= {str} or len({type(item) for item in items}) == 1:
        try:
            found = pa.array(items)
            pq.write_table(
                pa.table({"": found.slice(0, 0)}), pa.BufferOutputStream()
            )  # which refuses structs of nothing
            return found
        except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError):
            pass
    return pa.array([None if item is None else json.dumps(item, ensure_ascii=False) for item in items])
