"""Log-probs of pairs: what the scorer gives per token, and what the losses take per pair."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dpocli.data.batches import Lengths, PairBatch
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
    """Sums of log Σ_v p(v)² over the same tokens, for WPO."""

    def __len__(self) -> int:
        return len(self.policy_chosen)


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
    sizes = torch.tensor(lengths, device=values.device)
    return torch.segment_reduce(counted, "sum", lengths=sizes, unsafe=True, initial=0.0)


def pair_logps(tokens: TokenLogps, batch: PairBatch, pairs: Sequence[EncodedPair], *, reference: bool) -> PairLogps:
    """Sums the policy's token log-probs per side and puts the cached reference beside them.

    Args:
        tokens: the scorer's output for `batch`.
        batch: the batch made of `pairs`.
        pairs: their reference log-probs are used where `reference` is true.
        reference: whether the loss needs the reference.
    """
    device = tokens.chosen.device
    sums = [pair.reference_sums for pair in pairs] if reference else []
    columns = torch.tensor(sums, dtype=torch.float64, device=device).reshape(-1, 2)

    def summed(values: Tensor | None, mask: Tensor, lengths: Lengths) -> Tensor | None:
        return None if values is None else segment_sums(values, mask, lengths)

    return PairLogps(
        policy_chosen=segment_sums(tokens.chosen, batch.chosen_mask, batch.chosen_lengths),
        policy_rejected=segment_sums(tokens.rejected, batch.rejected_mask, batch.rejected_lengths),
        reference_chosen=columns[:, 0] if reference else None,
        reference_rejected=columns[:, 1] if reference else None,
        chosen_tokens=torch.tensor([pair.num_chosen_tokens for pair in pairs], device=device),
        rejected_tokens=torch.tensor([pair.num_rejected_tokens for pair in pairs], device=device),
        policy_chosen_collision=summed(tokens.chosen_collision, batch.chosen_mask, batch.chosen_lengths),
        policy_rejected_collision=summed(tokens.rejected_collision, batch.rejected_mask, batch.rejected_lengths),
    )
