"""What `evaluate` finds: per-pair values, the figures made of them, and the files and the table that show them."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpocli.artifacts.files import write_atomically
from dpocli.data.preference import EncodedPair
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LossOutput
from dpocli.terminal import Printer

FORMAT_VERSION = 1
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True, slots=True)
class PairTable:
    """Per-pair values: the columns of `pairs.parquet`. Log-probs in nats."""

    columns: dict[str, NDArray[Any]]

    @classmethod
    def of(
        cls, positions: NDArray[np.int64], pairs: Sequence[EncodedPair], logps: PairLogps, output: LossOutput
    ) -> "PairTable":
        """The values of one micro-batch; `positions` say where its pairs stand in the cache."""
        values = {
            "policy_chosen_logps": logps.policy_chosen,
            "policy_rejected_logps": logps.policy_rejected,
            "ref_chosen_logps": logps.reference_chosen,
            "ref_rejected_logps": logps.reference_rejected,
            "chosen_rewards": output.chosen_rewards,
            "rejected_rewards": output.rejected_rewards,
            "margins": output.chosen_rewards - output.rejected_rewards,
            "losses": output.losses,
        }
        return cls(
            {
                "position": positions,
                "row": np.array([pair.row for pair in pairs], dtype=np.int64),
                "pair_id": np.array([pair.pair_id for pair in pairs]),
                "source": np.array([pair.source for pair in pairs], dtype=object),
                "weight": np.array([pair.weight for pair in pairs], dtype=np.float64),
                "chosen_tokens": np.array([pair.num_chosen_tokens for pair in pairs], dtype=np.int64),
                "rejected_tokens": np.array([pair.num_rejected_tokens for pair in pairs], dtype=np.int64),
            }
            | {name: column.cpu().numpy() for name, column in values.items() if column is not None}
        )

    @classmethod
    def joined(cls, parts: Sequence["PairTable"]) -> "PairTable":
        """All parts, in the order of the cache, whoever scored them."""
        columns = {name: np.concatenate([part.columns[name] for part in parts]) for name in parts[0].columns}
        order = np.argsort(columns["position"], kind="stable")
        return cls({name: values[order] for name, values in columns.items() if name != "position"})

    def column(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def where(self, mask: NDArray[np.bool_]) -> "PairTable":
        """The pairs for which `mask`, shape (pairs,), is true."""
        return PairTable({name: values[mask] for name, values in self.columns.items()})

    def __len__(self) -> int:
        return len(self.columns["row"])


def figures(table: PairTable) -> dict[str, Any]:
    """What `metrics.json` holds: the whole, and the same by `source` where there are several."""
    sources = table.column("source")
    names = sorted(set(sources.tolist()))
    slices = {name: _figures(table.where(sources == name)) for name in names} if len(names) > 1 else {}
    return {"format": FORMAT_VERSION} | _figures(table) | {"by_source": slices}


def _figures(table: PairTable) -> dict[str, Any]:
    chosen, rejected, margins = (table.column(name) for name in ("chosen_rewards", "rejected_rewards", "margins"))
    weights = table.column("weight")
    weighted = (weights * table.column("losses")).sum() / weights.sum() if weights.sum() else None
    return {
        "pairs": len(table),
        "loss": None if weighted is None else float(weighted),
        "rewards/accuracies": float((chosen > rejected).mean()),
        "rewards/ties": float((chosen == rejected).mean()),
        "rewards/margins": float(margins.mean()),
        "rewards/margins_quantiles": {
            f"{q:g}": float(v) for q, v in zip(QUANTILES, np.quantile(margins, QUANTILES), strict=True)
        },
        "rewards/chosen": float(chosen.mean()),
        "rewards/rejected": float(rejected.mean()),
        "logps/chosen": float(table.column("policy_chosen_logps").mean()),
        "logps/rejected": float(table.column("policy_rejected_logps").mean()),
    }


def write_report(directory: Path, report: dict[str, Any], table: PairTable) -> None:
    """Writes `metrics.json` and `pairs.parquet`, each whole or not at all."""
    arrow = pa.table({name: pa.array(values.tolist()) for name, values in table.columns.items()})
    write_atomically(directory / "pairs.parquet", lambda file: pq.write_table(arrow, file, compression="zstd"))
    write_atomically(directory / "metrics.json", json.dumps(report, indent=2) + "\n")


def render(printer: Printer, report: dict[str, Any]) -> None:
    """The table on the terminal: a line for everything, and one per source."""
    loss = report["loss_choice"]
    columns = ["", "pairs", "accuracy", "ties", "margin", "median", "5%", "95%", "chosen", "rejected", "loss"]
    lines = [("all", report), *report["by_source"].items()]
    rows = [
        [
            name or "(none)",
            entry["pairs"],
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
    printer.table(f"{report['model']}: rewards of {loss['name']}, beta {loss['beta']:g}", columns, rows)
    printer.say("Accuracy counts a pair as right when its chosen reward is strictly higher; a tie is not right.")
