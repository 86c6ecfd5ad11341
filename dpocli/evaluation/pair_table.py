"""Per-pair values of an evaluation: log-probs, and the rewards, margins and losses that each loss gives."""

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
    """In the cache, shape (pairs,)."""
    about: dict[str, NDArray[Any]]
    """The columns of `pairs.parquet` that no model decides, each of shape (pairs,)."""
    matrix: NDArray[np.float64]
    """Their `PairLogps`, shape (pairs, columns)."""
    columns: LogpColumns
    """Of the matrix."""

    @classmethod
    def of(
        cls,
        positions: NDArray[np.int64],
        pairs: Sequence[EncodedPair],
        logps: PairLogps,
        columns: LogpColumns,
        kept: Sequence[str] = (),
    ) -> "ScoredPairs":
        """The pairs of one pass. `kept`: the columns of their data to carry along."""
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
        return cls(positions, about, logps.matrix().cpu().numpy(), columns)

    @classmethod
    def joined(cls, parts: Sequence["ScoredPairs"]) -> "ScoredPairs":
        """All parts, in the order of the cache."""
        positions = np.concatenate([part.positions for part in parts])
        order = np.argsort(positions, kind="stable")
        about = {name: np.concatenate([part.about[name] for part in parts])[order] for name in parts[0].about}
        return cls(positions[order], about, np.concatenate([part.matrix for part in parts])[order], parts[0].columns)

    @property
    def rows(self) -> NDArray[np.int64]:
        """Source rows, shape (pairs,)."""
        return self.about["row"]

    @property
    def logps(self) -> PairLogps:
        """On the CPU."""
        return PairLogps.from_matrix(self.columns, torch.from_numpy(self.matrix))


@dataclass(frozen=True, slots=True)
class PairTable:
    """The columns of `pairs.parquet`. Log-probs in nats."""

    columns: dict[str, NDArray[Any]]
    losses: tuple[str, ...]
    """Names of the losses. Columns of the first have plain names; columns of the others begin with the name of the loss."""

    @classmethod
    def of(
        cls,
        scored: ScoredPairs,
        losses: Mapping[str, LossChoice],
        states: Mapping[str, States],
        noise_per_token: float = 0.0,
    ) -> "PairTable":
        """Compute each loss on the pairs, as one batch.

        Args:
            scored: in the order of the cache.
            losses: by name.
            states: by name of the loss, the states of its terms from the training.
            noise_per_token: rounding error of the log-prob of one token, nats.
        """
        logps = scored.logps
        table = cls(dict(scored.about), tuple(losses))
        for column, name in _LOGPS.items():
            if column in scored.columns.names:
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
    """Rewards, margins, losses and noise of pairs, each of shape (pairs,).

    `noise` is the rounding error of a margin. The error of a token's log-prob is e = `noise_per_token`, up as often as down,
    so the error of a side of n tokens is e√n. Losses scale and normalise differently, so the error of a reward is measured
    by moving the side. The two sides are independent: √(chosen² + rejected²).
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
