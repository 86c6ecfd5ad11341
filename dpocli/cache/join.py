"""Another reference over the same pairs: how often it is right, and what the rewards are against it."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.cache.reader import PairStore
from dpocli.config.loss_expression import LossChoice
from dpocli.errors import CacheError
from dpocli.evaluation.metrics import rewards, share
from dpocli.evaluation.pair_table import PairTable, ScoredPairs, values_of
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import States


def open_second(directory: Path, first: PairStore) -> PairStore:
    """The second cache.

    Raises:
        CacheError: it has no log-probs, or none of the pairs: their tokens are hashed, so it takes the same data, tokenizer and
            lengths.
    """
    second = PairStore.open(directory)
    if not second.has_reference:
        raise CacheError(
            f"--second-reference {directory}: no reference has scored these pairs. Give what precompute wrote."
        )
    ids = {pair_id.tobytes() for pair_id in first.columns.pair_ids}
    if not any(pair_id.tobytes() in ids for pair_id in second.columns.pair_ids):
        raise CacheError(
            f"--second-reference {directory}: it has none of the pairs of {first.directory}. Make it of the same --data, with the "
            "same tokenizer, --max-length and --truncation."
        )
    return second


def join(second: PairStore, pair_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Where each pair, by its id as text, stands in the second cache; -1 where it does not. Shape (pairs,)."""
    places = {pair_id.tobytes().hex(): place for place, pair_id in enumerate(second.columns.pair_ids)}
    return np.array([places.get(pair_id, -1) for pair_id in pair_ids.tolist()], dtype=np.int64)


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
