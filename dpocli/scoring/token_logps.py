"""From log-probs per token, the scorer's output, to sums per pair, the input of the losses."""

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
    """Log-probs of a batch, in the order of its ragged tokens. Nats.

    A tuple and not a dataclass, because distributed wrappers search a module's output for tensors.
    """

    chosen: Tensor
    """Shape (chosen tokens of all pairs,), float32."""
    rejected: Tensor
    """Shape (rejected tokens of all pairs,), float32."""
    chosen_collision: Tensor | None = None
    """log Σ_v p(v)² at each token, if requested. Shape (chosen tokens of all pairs,), float32, no gradient."""
    rejected_collision: Tensor | None = None
    """The same for the rejected side."""
    router_loss: Tensor | None = None
    """The load-balancing loss of a mixture-of-experts router, if requested. A scalar."""


def segment_sums(values: Tensor, mask: Tensor, lengths: Lengths) -> Tensor:
    """Sum the counted values of each segment in float64; float32 sums would err by 3e-3 nats per sequence.

    Args:
        values: shape (tokens,).
        mask: shape (tokens,), bool.
        lengths: tokens of each segment, adding up to (tokens,).

    Returns:
        Shape (segments,), float64.
    """
    # Replaced and not multiplied by 0: a masked -inf or NaN must not reach the sum.
    counted = torch.where(mask, values.double(), 0.0)
    sizes = transfer(torch.tensor(lengths), values.device)
    return torch.segment_reduce(counted, "sum", lengths=sizes, unsafe=True, initial=0.0)


def pair_logps(tokens: TokenLogps, batch: PairBatch, pairs: Sequence[EncodedPair], wanted: LogpColumns) -> PairLogps:
    """Sum the policy's token log-probs per side, and add the cached reference's sums.

    Args:
        tokens: the scorer's output for `batch`.
        batch: the batch made of `pairs`, on the CPU.
        pairs: their reference log-probs are used where `wanted` asks for them.
        wanted: the optional columns.

    Returns:
        Columns of shape (pairs,) on the device of `tokens`, nats, float64.
    """
    device = tokens.chosen.device
    chosen_tokens = transfer(torch.tensor([pair.num_chosen_tokens for pair in pairs]), device)
    rejected_tokens = transfer(torch.tensor([pair.num_rejected_tokens for pair in pairs]), device)
    columns: dict[str, Tensor | None] = {"reference_chosen": None, "reference_rejected": None}
    if wanted.reference:
        sums = transfer(torch.tensor([pair.reference_sums for pair in pairs], dtype=torch.float64), device)
        columns = {"reference_chosen": sums[:, 0], "reference_rejected": sums[:, 1]}
    sides = (
        ("chosen", tokens.chosen, tokens.chosen_collision, batch.chosen_mask, batch.chosen_lengths),
        ("rejected", tokens.rejected, tokens.rejected_collision, batch.rejected_mask, batch.rejected_lengths),
    )
    for side, logps, collision, mask_on_cpu, lengths in sides:
        mask = transfer(mask_on_cpu, device)
        columns[f"policy_{side}"] = segment_sums(logps, mask, lengths)
        if wanted.collision:
            assert collision is not None
            columns[f"policy_{side}_collision"] = segment_sums(collision, mask, lengths)
        if wanted.tails:
            tail = tail_mask(mask, lengths, torch.minimum(chosen_tokens, rejected_tokens))
            columns[f"policy_{side}_tail"] = segment_sums(logps, tail, lengths)
            if wanted.reference:
                reference = np.concatenate([getattr(pair.reference, side) for pair in pairs])
                columns[f"reference_{side}_tail"] = segment_sums(
                    transfer(torch.from_numpy(reference), device), tail, lengths
                )
    return PairLogps(**columns, chosen_tokens=chosen_tokens, rejected_tokens=rejected_tokens)  # type: ignore[arg-type]


def tail_mask(mask: Tensor, lengths: Lengths, kept: Tensor) -> Tensor:
    """Mask of the counted tokens after the first `kept` counted tokens of their segment.

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
    # Without `output_size`, the device would be asked for the sum of the sizes.
    position = counted - before.repeat_interleave(sizes, output_size=len(mask))
    return mask & (position > kept.repeat_interleave(sizes, output_size=len(mask)))
