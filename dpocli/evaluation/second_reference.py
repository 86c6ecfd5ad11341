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
    """The figures, over the pairs that both caches have; and its columns into the table, NaN for the other pairs.

    The rewards are those of the model's first loss. They are left out where it looks at no reference, or at more of it than
    its sums (LD-DPO's tails).

    Args:
        table: made of `scored`.
        second: of `open_second`.
        scored: the pairs.
        loss: the first loss of the table.
        states: what it remembers from the training.
        noise_per_token: as for `PairTable.of`.
    """
    places = join(second, table.column("pair_id"))
    found = np.flatnonzero(places >= 0)
    sums = [column[places[found]] for column in (second.columns.reference_chosen, second.columns.reference_rejected)]
    table.columns["second_ref_chosen_logps"] = _filled(len(table), found, sums[0])
    table.columns["second_ref_rejected_logps"] = _filled(len(table), found, sums[1])
    clusters = table.clusters.where(found)
    figures: dict[str, Any] = {
        "cache": str(second.directory),
        "pairs": len(found),
        "accuracy": share(sums[0] > sums[1], clusters),
    }
    if not loss.needs_reference or scored.wanted.tails:
        return figures
    values = values_of(loss, _against(scored.logps, found, sums), states, noise_per_token)
    table.columns["second_ref_margins"] = _filled(len(table), found, values["margins"])
    return figures | rewards(values["chosen_rewards"], values["rejected_rewards"], values["noise"], clusters)


def _against(logps: PairLogps, found: NDArray[np.int64], sums: list[NDArray[np.float64]]) -> PairLogps:
    """Some of the pairs, beside another reference."""
    columns = {name: values[found] for name, values in logps.columns().items()}
    chosen, rejected = (torch.from_numpy(values) for values in sums)
    return PairLogps(**columns | {"reference_chosen": chosen, "reference_rejected": rejected})


def _filled(count: int, found: NDArray[np.int64], values: NDArray[np.float64]) -> NDArray[np.float64]:
    column = np.full(count, np.nan)
    column[found] = values
    return column
