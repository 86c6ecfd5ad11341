"""Log-probs of pairs: what the scorer gives per token, and what the losses take per pair."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from dpocli.data.batch import PairBatch, transfer
from dpocli.data.packing import Lengths
from dpocli.data.preference import EncodedPair
from dpocli.objective.logps import LogpColumns, PairLogps


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


def pair_logps(tokens: TokenLogps, batch: PairBatch, pairs: Sequence[EncodedPair], wanted: LogpColumns) -> PairLogps:
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
