"""Log-probs of pairs: what the scorer gives per token, and what the losses take per pair."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpocli.config.hyperparameters import Need
from dpocli.data.batches import Lengths, PairBatch, transfer
from dpocli.data.preference import EncodedPair


class TokenLogps(NamedTuple):
    """What the scorer gives for a batch, in the order of the batch's ragged tokens. Nats.

    A tuple of tensors rather than a dataclass, because distributed wrappers look for the tensors in a module's output.
    """

    chosen: Tensor
    """Shape (chosen tokens of all pairs,), float32."""
    rejected: Tensor
    """Shape (rejected tokens of all pairs,), float32."""
    chosen_collision: Tensor | None = None
    """log Σ_v p(v)² at each token, where asked for. Shape (chosen tokens of all pairs,), float32, no gradient."""
    rejected_collision: Tensor | None = None
    """The same for the rejected side."""
    router_loss: Tensor | None = None
    """The load-balancing loss of a mixture-of-experts router, where asked for. A scalar."""


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Per pair, summed over the tokens that count: everything a loss may look at. Shapes (pairs,), nats, float64."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    """The reference's sums; None for reference-free losses."""
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    """Counts of the tokens that count."""
    policy_chosen_collision: Tensor | None = None
    policy_rejected_collision: Tensor | None = None
    """Sums of log Σ_v p(v)² over the same tokens, for WPO. No gradient."""
    policy_chosen_tail: Tensor | None = None
    policy_rejected_tail: Tensor | None = None
    reference_chosen_tail: Tensor | None = None
    reference_rejected_tail: Tensor | None = None
    """Sums over the tokens beyond as many as the shorter side has, for LD-DPO; 0 on the shorter side."""

    def __len__(self) -> int:
        return len(self.policy_chosen)

    def columns(self) -> dict[str, Tensor]:
        """Those that are there, by name, each of shape (pairs,)."""
        present = ((column.name, getattr(self, column.name)) for column in fields(self))
        return {name: values for name, values in present if values is not None}

    @classmethod
    def from_matrix(cls, wanted: "Wanted", matrix: Tensor) -> "PairLogps":
        """The inverse of `matrix`. Shape of the argument: (pairs, columns)."""
        columns = dict(zip(wanted.names, matrix.unbind(1), strict=True))
        return cls(**{column.name: columns.get(column.name) for column in fields(cls)})  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """All columns side by side, without gradient. Shape (pairs, columns), float64."""
        return torch.stack([column.detach().double() for column in self.columns().values()], dim=1)


@dataclass(frozen=True, slots=True)
class Wanted:
    """Which of the optional columns of `PairLogps` there are to be."""

    reference: bool = False
    collision: bool = False
    tails: bool = False

    @classmethod
    def by(cls, needs: Collection[Need], *, has_reference: bool) -> "Wanted":
        """What losses with these needs look at; the reference also where it is only there to be reported."""
        return cls(has_reference, Need.COLLISION in needs, Need.TAILS in needs)

    @property
    def names(self) -> tuple[str, ...]:
        """The columns, in the order of `PairLogps`."""
        unwanted = set()
        for name in (column.name for column in fields(PairLogps)):
            for kind, wanted in (("reference", self.reference), ("collision", self.collision), ("tail", self.tails)):
                if kind in name and not wanted:
                    unwanted.add(name)
        return tuple(column.name for column in fields(PairLogps) if column.name not in unwanted)


def segment_sums(values: Tensor, mask: Tensor, lengths: Lengths) -> Tensor:
    """Sums the counted values of each segment in float64, because float32 sums cost 3e-3 nats a sequence.

    Args:
        values: shape (tokens,).
        mask: shape (tokens,), bool.
        lengths: tokens of each segment, adding up to (tokens,).

    Returns:
        Shape (segments,), float64.
    """
    # A masked value is replaced, not multiplied: a masked -inf or NaN must not reach the sum.
    counted = torch.where(mask, values.double(), 0.0)
    sizes = transfer(torch.tensor(lengths), values.device)
    return torch.segment_reduce(counted, "sum", lengths=sizes, unsafe=True, initial=0.0)


def pair_logps(tokens: TokenLogps, batch: PairBatch, pairs: Sequence[EncodedPair], wanted: Wanted) -> PairLogps:
    """Sums the policy's token log-probs per side and puts the cached reference beside them.

    Args:
        tokens: the scorer's output for `batch`.
        batch: the batch made of `pairs`, on the CPU.
        pairs: their reference log-probs are used where they are wanted.
        wanted: the optional columns.
    """
    device = tokens.chosen.device
    chosen_mask = transfer(batch.chosen_mask, device)
    rejected_mask = transfer(batch.rejected_mask, device)
    chosen_tokens = transfer(torch.tensor([pair.num_chosen_tokens for pair in pairs]), device)
    rejected_tokens = transfer(torch.tensor([pair.num_rejected_tokens for pair in pairs]), device)
    columns = {
        "policy_chosen": segment_sums(tokens.chosen, chosen_mask, batch.chosen_lengths),
        "policy_rejected": segment_sums(tokens.rejected, rejected_mask, batch.rejected_lengths),
    }
    if wanted.reference:
        sums = transfer(torch.tensor([pair.reference_sums for pair in pairs], dtype=torch.float64), device)
        columns |= {"reference_chosen": sums[:, 0], "reference_rejected": sums[:, 1]}
    if wanted.collision:
        assert tokens.chosen_collision is not None
        assert tokens.rejected_collision is not None
        columns |= {
            "policy_chosen_collision": segment_sums(tokens.chosen_collision, chosen_mask, batch.chosen_lengths),
            "policy_rejected_collision": segment_sums(tokens.rejected_collision, rejected_mask, batch.rejected_lengths),
        }
    if wanted.tails:
        shared = torch.minimum(chosen_tokens, rejected_tokens)
        sides = (
            ("chosen", tokens.chosen, tail_mask(chosen_mask, batch.chosen_lengths, shared), batch.chosen_lengths),
            (
                "rejected",
                tokens.rejected,
                tail_mask(rejected_mask, batch.rejected_lengths, shared),
                batch.rejected_lengths,
            ),
        )
        for side, values, mask, lengths in sides:
            columns[f"policy_{side}_tail"] = segment_sums(values, mask, lengths)
            if wanted.reference:
                cached = transfer(
                    torch.from_numpy(np.concatenate([getattr(pair.reference, side) for pair in pairs])), device
                )
                columns[f"reference_{side}_tail"] = segment_sums(cached, mask, lengths)
    return PairLogps(
        **{"reference_chosen": None, "reference_rejected": None}
        | columns
        | {"chosen_tokens": chosen_tokens, "rejected_tokens": rejected_tokens}  # type: ignore[arg-type]
    )


def tail_mask(mask: Tensor, lengths: Lengths, kept: Tensor) -> Tensor:
    """Which of the tokens that count come after the first `kept` such tokens of their segment.

    Args:
        mask: shape (tokens,), bool: which tokens count.
        lengths: tokens of each segment, none of them 0, adding up to (tokens,).
        kept: shape (segments,).

    Returns:
        Shape (tokens,), bool.
    """
    sizes = transfer(torch.tensor(lengths), mask.device)
    counted = mask.cumsum(0)
    at_ends = counted[sizes.cumsum(0) - 1]
    before = torch.cat([at_ends.new_zeros(1), at_ends[:-1]])
    position = counted - before.repeat_interleave(sizes)
    return mask & (position > kept.repeat_interleave(sizes))
