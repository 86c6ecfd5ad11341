"""What `evaluate` finds: the figures made of per-pair values, and the files and the table that show them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from dpocli.artifacts.files import write_atomically
from dpocli.artifacts.pair_table import PairTable
from dpocli.config.loss_choice import LossChoice
from dpocli.terminal import Printer

FORMAT_VERSION = 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def figures(table: PairTable, losses: Mapping[str, LossChoice]) -> dict[str, Any]:
    """What `metrics.json` holds: the whole, the same by `source` where there are several, and every loss by name.

    What is of no particular loss, and the first loss, stand at the top.
    """
    sources = table.column("source")
    names = sorted(set(sources.tolist()))
    first = table.losses[0]
    slices = {name: _figures(table.where(sources == name), first) for name in names} if len(names) > 1 else {}
    return {
        "format": FORMAT_VERSION,
        "loss_choice": losses[first].model_dump(),
        **_figures(table, first),
        "by_source": slices,
        "by_loss": {
            name: {"loss_choice": loss.model_dump()} | _rewards(table, name)
            for name, loss in losses.items()
            if len(losses) > 1
        },
    }


def _figures(table: PairTable, loss: str) -> dict[str, Any]:
    means = {
        "logps/chosen": table.column("policy_chosen_logps"),
        "logps/rejected": table.column("policy_rejected_logps"),
    }
    if "ref_chosen_logps" in table.columns:
        chosen = means["logps/chosen"] - table.column("ref_chosen_logps")
        rejected = means["logps/rejected"] - table.column("ref_rejected_logps")
        means |= {
            "logratios/chosen": chosen,
            "logratios/rejected": rejected,
            "logratios/margins": chosen - rejected,
            "logratios/accuracies": chosen > rejected,
        }
    return (
        {"pairs": len(table)} | _rewards(table, loss) | {name: float(column.mean()) for name, column in means.items()}
    )


def _rewards(table: PairTable, loss: str) -> dict[str, Any]:
    """What a loss and its rewards say of the pairs."""
    chosen, rejected, margins, losses = (
        table.column(table.name_of(loss, kind)) for kind in ("chosen_rewards", "rejected_rewards", "margins", "losses")
    )
    weights = table.column("weight")
    return {
        "loss": float((weights * losses).sum() / weights.sum()) if weights.sum() else None,
        "rewards/accuracies": float((chosen > rejected).mean()),
        "rewards/ties": float((chosen == rejected).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/margins_quantiles": {
            f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(margins, QUANTILES), strict=True)
        },
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
    }


def write_report(directory: Path, report: dict[str, Any], table: PairTable) -> None:
    """Writes `metrics.json` and `pairs.parquet`, each whole or not at all."""
    arrow = pa.table({name: pa.array(values.tolist()) for name, values in table.columns.items()})
    write_atomically(directory / "pairs.parquet", lambda file: pq.write_table(arrow, file, compression="zstd"))
    write_atomically(directory / "metrics.json", json.dumps(report, indent=2) + "\n")


def render(printer: Printer, report: dict[str, Any]) -> None:
    """The table on the terminal: a line for everything, then one per source, or one per loss."""
    lines = [("all", report), *report["by_source"].items()]
    title = f"{report['model']}: rewards of {LossChoice.model_validate(report['loss_choice'])}"
    if report["by_loss"]:
        _table(printer, f"{report['model']}: by loss", list(report["by_loss"].items()), report["pairs"])
    if len(lines) > 1 or not report["by_loss"]:
        _table(printer, title, lines)
    printer.say("Accuracy counts a pair as right when its chosen reward is strictly higher; a tie is not right.")


def _table(printer: Printer, title: str, lines: list[tuple[str, dict[str, Any]]], pairs: int | None = None) -> None:
    columns = ["", "pairs", "accuracy", "ties", "margin", "median", "5%", "95%", "chosen", "rejected", "loss"]
    rows = [
        [
            name or "(none)",
            entry.get("pairs", pairs),
            entry["rewards/accuracies"],
            entry["rewards/ties"],
            entry["rewards/margins"],
            *(entry["rewards/margins_quantiles"][q] for q in ("0.5", "0.05", "0.95")),
            entry["rewards/chosen"],
            entry["rewards/rejected"],
            entry["loss"],
        ]
        for name, entry in lines
    ]
    printer.table(title, columns, rows)
