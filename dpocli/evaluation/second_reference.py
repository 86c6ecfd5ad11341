"""Figures against a second reference over the same pairs."""

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.cache.join import join
from dpocli.cache.reader import PairStore
from dpocli.config.loss_expression import LossChoice
from dpocli.evaluation.metrics import rewards, share
from dpocli.evaluation.pair_table import PairTable, ScoredPairs, values_of
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import States


def add_second_reference(
    table: PairTable,
    second: PairStore,
    scored: ScoredPairs,
    loss: LossChoice,
    states: States | None,
    noise_per_token: float,
) -> dict[str, Any]:
    """Compute the figures over the pairs that both caches have, and add their columns to the table, NaN for other pairs.

    Rewards are by the model's first loss. They are left out where it looks at no reference, or at more of it than its
    sums (LD-DPO's tails).

    Args:
        table: made of `scored`.
        second: of `open_second`.
        scored: the pairs.
        loss: the first loss of the table.
        states: of its terms, from the training.
        noise_per_token: as for `PairTable.of`.
    """
    places = join(second, table.column("pair_id"))
    found = np.flatnonzero(places >= 0)

    def add(name: str, values: NDArray[np.float64]) -> None:
        table.columns[f"second_ref_{name}"] = column = np.full(len(table), np.nan)
        column[found] = values

    chosen, rejected = (
        column[places[found]] for column in (second.columns.reference_chosen, second.columns.reference_rejected)
    )
    add("chosen_logps", chosen)
    add("rejected_logps", rejected)
    clusters = table.clusters.where(found)
    figures: dict[str, Any] = {
        "cache": str(second.directory),
        "pairs": len(found),
        "accuracy": share(chosen > rejected, clusters),
    }
    if not loss.needs_reference or scored.columns.tails:
        return figures
    columns = {name: values[found] for name, values in scored.logps.columns().items()}
    reference = {"reference_chosen": torch.from_numpy(chosen), "reference_rejected": torch.from_numpy(rejected)}
    values = values_of(loss, PairLogps(**columns | reference), states, noise_per_token)
    add("margins", values["margins"])
    return figures | rewards(values["chosen_rewards"], values["rejected_rewards"], values["noise"], clusters)
