"""Pairs of tokens as tensors, and how many pairs go through the model at once.

Batches are a matter of speed, never of meaning: nothing here may change a value beyond its last digits.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpocli.data.preference import EncodedPair, TokenIds, TokenMask

Lengths = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Several pairs, ragged: each field holds the tokens of all pairs one after the other, without padding.

    How they are laid out for the model (padded, packed, prompts shared) is the scorer's business.
    """

    prompt_ids: Tensor
    """Shape (prompt tokens of all pairs,), int64."""
    chosen_ids: Tensor
    """Shape (chosen tokens of all pairs,), int64."""
    rejected_ids: Tensor
    """Shape (rejected tokens of all pairs,), int64."""
    chosen_mask: Tensor
    """Shape (chosen tokens of all pairs,), bool: which tokens count."""
    rejected_mask: Tensor
    """Shape (rejected tokens of all pairs,), bool: which tokens count."""
    prompt_lengths: Lengths
    chosen_lengths: Lengths
    rejected_lengths: Lengths

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair]) -> "PairBatch":
        """Batch of `pairs`, in their order, on the CPU."""
        return cls(
            prompt_ids=_joined_ids([pair.prompt_ids for pair in pairs]),
            chosen_ids=_joined_ids([pair.chosen_ids for pair in pairs]),
            rejected_ids=_joined_ids([pair.rejected_ids for pair in pairs]),
            chosen_mask=_joined_masks([(pair.chosen_ids, pair.chosen_mask) for pair in pairs]),
            rejected_mask=_joined_masks([(pair.rejected_ids, pair.rejected_mask) for pair in pairs]),
            prompt_lengths=tuple(len(pair.prompt_ids) for pair in pairs),
            chosen_lengths=tuple(len(pair.chosen_ids) for pair in pairs),
            rejected_lengths=tuple(len(pair.rejected_ids) for pair in pairs),
        )

    def to(self, device: torch.device) -> "PairBatch":
        """The same batch on `device`; lengths stay on the host, where layouts are planned."""
        names = ("prompt_ids", "chosen_ids", "rejected_ids", "chosen_mask", "rejected_mask")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})

    def largest_id(self) -> int:
        """Of all tokens; cheap on the CPU, a synchronisation elsewhere."""
        return max(int(ids.max()) for ids in (self.prompt_ids, self.chosen_ids, self.rejected_ids))

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_tokens(self) -> int:
        """Distinct tokens: each prompt once, each side once."""
        return sum(self.prompt_lengths) + sum(self.chosen_lengths) + sum(self.rejected_lengths)


def _joined_ids(ids: Sequence[TokenIds]) -> Tensor:
    return torch.from_numpy(np.concatenate(ids).astype(np.int64))


def _joined_masks(sides: Sequence[tuple[TokenIds, TokenMask | None]]) -> Tensor:
    return torch.from_numpy(
        np.concatenate([np.ones(len(ids), dtype=np.bool_) if mask is None else mask for ids, mask in sides])
    )


def pack(pair_lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Cuts pairs into micro-batches whose padded size stays within a budget.

    Args:
        pair_lengths: per pair, tokens of prompt + the longer side.
        token_budget: padded tokens (two rows a pair) of one micro-batch; a pair beyond it goes alone.

    Returns:
        Micro-batches of indices into `pair_lengths`, longest first, so that a shortage of memory shows at once.
    """
    by_length = sorted(range(len(pair_lengths)), key=lambda index: (-pair_lengths[index], index))
    micro_batches: list[list[int]] = []
    longest = 0
    for index in by_length:
        if micro_batches and 2 * longest * (len(micro_batches[-1]) + 1) <= token_budget:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
            longest = pair_lengths[index]
    return micro_batches


def deal(pair_lengths: Sequence[int], ranks: int, token_budget: int) -> list[list[list[int]]]:
    """Spreads the pairs of one global batch over ranks, each with the same number of micro-batches.

    Every rank computes the whole plan from the lengths alone, so no communication is needed to agree on it. Pairs are
    dealt to and fro in order of length, which balances the ranks; a rank with too few micro-batches splits its own,
    and one with too few pairs gets empty ones (it must still take part in the collectives of each pass).

    Returns:
        Per rank, the micro-batches of indices into `pair_lengths`.
    """
    by_length = sorted(range(len(pair_lengths)), key=lambda index: (-pair_lengths[index], index))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for turn in range(0, len(by_length), ranks):
        round_ = by_length[turn : turn + ranks]
        order = range(ranks) if (turn // ranks) % 2 == 0 else range(ranks - 1, -1, -1)
        for rank, index in zip(order, round_, strict=False):
            hands[rank].append(index)
    plans = [
        [[hand[i] for i in batch] for batch in pack([pair_lengths[index] for index in hand], token_budget)]
        for hand in hands
    ]
    passes = max(len(plan) for plan in plans)
    for plan in plans:
        while len(plan) < passes:
            largest = max(plan, key=len, default=[])
            half = len(largest) // 2
            plan.append(largest[half:] if half else [])
            if half:
                del largest[half:]
    return plans
