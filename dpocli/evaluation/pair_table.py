"""What `evaluate` knows of each pair: the log-probs, and what each loss makes of them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.config.loss_expression import LossChoice
from dpocli.data.preference import EncodedPair
from dpocli.evaluation.bootstrap import Clusters
from dpocli.evaluation.slices import KEPT
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.objective.losses import States, compute

_LOGPS = {
    "policy_chosen": "policy_chosen_logps",
    "policy_rejected": "policy_rejected_logps",
    "reference_chosen": "ref_chosen_logps",
    "reference_rejected": "ref_rejected_logps",
}
"""Column of `PairLogps` → column of `pairs.parquet`."""


@dataclass(frozen=True, slots=True)
class ScoredPairs:
    """Pairs with their log-probs."""

    positions: NDArray[np.int64]
    """Where they stand in the cache, shape (pairs,)."""
    about: dict[str, NDArray[Any]]
    """What they are: columns of `pairs.parquet`, each of shape (pairs,)."""
    matrix: NDArray[np.float64]
    """Their `PairLogps`, shape (pairs, columns)."""
    wanted: LogpColumns
    """Which those columns are."""

    @classmethod
    def of(
        cls,
        positions: NDArray[np.int64],
        pairs: Sequence[EncodedPair],
        logps: PairLogps,
        wanted: LogpColumns,
        kept: Sequence[str] = (),
    ) -> "ScoredPairs":
        """The pairs of one micro-batch. `kept`: the columns of their data that are carried along."""
        about = {
            "row": np.array([pair.row for pair in pairs], dtype=np.int64),
            "pair_id": np.array([pair.pair_id for pair in pairs]),
            "source": np.array([pair.source for pair in pairs], dtype=object),
            "weight": np.array([pair.weight for pair in pairs], dtype=np.float64),
            "chosen_tokens": np.array([pair.num_chosen_tokens for pair in pairs], dtype=np.int64),
            "rejected_tokens": np.array([pair.num_rejected_tokens for pair in pairs], dtype=np.int64),
            "prompt_tokens": np.array([len(pair.prompt_ids) for pair in pairs], dtype=np.int64),
            "num_turns": np.array([pair.num_turns for pair in pairs], dtype=np.int64),
            "prompt_hash": np.array([pair.prompt_hash for pair in pairs], dtype=np.uint64),
        }
        for name in kept:
            values = about[KEPT + name] = np.empty(len(pairs), dtype=object)
            values[:] = [pair.kept.get(name) for pair in pairs]
        return cls(positions, about, logps.matrix().cpu().numpy(), wanted)

    @classmethod
    def joined(cls, parts: Sequence["ScoredPairs"]) -> "ScoredPairs":
        """All parts, in the order of the cache, whoever scored them."""
        positions = np.concatenate([part.positions for part in parts])
        order = np.argsort(positions, kind="stable")
        about = {name: np.concatenate([part.about[name] for part in parts])[order] for name in parts[0].about}
        return cls(positions[order], about, np.concatenate([part.matrix for part in parts])[order], parts[0].wanted)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Source rows, shape (pairs,)."""
        return self.about["row"]

    @property
    def logps(self) -> PairLogps:
        """On the CPU."""
        return PairLogps.from_matrix(self.wanted, torch.from_numpy(self.matrix))


@dataclass(frozen=True, slots=True)
class PairTable:
    """Per-pair values: the columns of `pairs.parquet`. Log-probs in nats."""

    columns: dict[str, NDArray[Any]]
    losses: tuple[str, ...]
    """Their names. The columns of the first have plain names; those of the others begin with the loss's."""

    @classmethod
    def of(
        cls,
        scored: ScoredPairs,
        losses: Mapping[str, LossChoice],
        states: Mapping[str, States],
        noise_per_token: float = 0.0,
    ) -> "PairTable":
        """What each loss makes of the pairs, which are one batch to a loss of the whole batch.

        Args:
            scored: in the order of the cache.
            losses: by name.
            states: by name of the loss, what it remembers from the training.
            noise_per_token: of the log-prob of one token by rounding, nats.
        """
        logps = scored.logps
        table = cls(dict(scored.about), tuple(losses))
        for column, name in _LOGPS.items():
            if column in scored.wanted.names:
                table.columns[name] = logps.columns()[column].numpy()
        for name, loss in losses.items():
            for kind, values in values_of(loss, logps, states.get(name), noise_per_token).items():
                table.columns[table.name_of(name, kind)] = values
        return table

    def name_of(self, loss: str, kind: str) -> str:
        """The column of a loss's `chosen_rewards`, `rejected_rewards`, `margins`, `losses` or `noise`."""
        return kind if loss == self.losses[0] else f"{loss}/{kind}"

    def column(self, name: str) -> NDArray[Any]:
        return self.columns[name]

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "PairTable":
        """Some of the pairs, by mask or by position."""
        return PairTable({name: values[chosen] for name, values in self.columns.items()}, self.losses)

    @property
    def clusters(self) -> Clusters:
        """The pairs by prompt."""
        return Clusters.of(self.columns["prompt_hash"])

    def __len__(self) -> int:
        return len(self.columns["row"])


def values_of(
    loss: LossChoice, logps: PairLogps, states: States | None, noise_per_token: float
) -> dict[str, NDArray[np.float64]]:
    """What a loss makes of pairs, by kind; each of shape (pairs,).

    `noise` is how far rounding may move a margin. The log-prob of a token is off by e = `noise_per_token`, up as often as
    down, so a side of n tokens by e√n; what the loss makes of that is found by moving the side and looking, since losses
    scale and normalise differently; the two sides are independent: √(chosen² + rejected²).
    """
    output = compute(loss, logps, states)
    moved = compute(
        loss,
        replace(
            logps,
            policy_chosen=logps.policy_chosen + noise_per_token * logps.chosen_tokens.sqrt(),
            policy_rejected=logps.policy_rejected + noise_per_token * logps.rejected_tokens.sqrt(),
        ),
        states,
    )
    shifts = moved.chosen_rewards - output.chosen_rewards, moved.rejected_rewards - output.rejected_rewards
    values = {
        "chosen_rewards": output.chosen_rewards,
        "rejected_rewards": output.rejected_rewards,
        "margins": output.chosen_rewards - output.rejected_rewards,
        "losses": output.losses,
        "noise": torch.hypot(*shifts),
    }
    return {kind: column.numpy() for kind, column in values.items()}
