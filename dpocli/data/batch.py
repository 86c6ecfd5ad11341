"""Encoded pairs as tensors on the CPU, and their transfer to a device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dpocli.data.packing import Lengths
from dpocli.data.preference import EncodedPair, TokenIds, TokenMask


@dataclass(frozen=True, slots=True)
class PairBatch:
    """Several pairs on the CPU, concatenated without padding. The scorer chooses the layout for the model."""

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

    @property
    def longer_lengths(self) -> list[int]:
        """Tokens of prompt + the longer side of each pair."""
        lengths = zip(self.prompt_lengths, self.chosen_lengths, self.rejected_lengths, strict=True)
        return [prompt + max(sides) for prompt, *sides in lengths]

    def largest_id(self) -> int:
        """The largest token id; cheap on the CPU, a synchronisation on a device."""
        return max(int(ids.max()) for ids in (self.prompt_ids, self.chosen_ids, self.rejected_ids))

    def __len__(self) -> int:
        return len(self.prompt_lengths)

    @property
    def num_tokens(self) -> int:
        """Distinct tokens: each prompt once, each side once."""
        return sum(self.prompt_lengths) + sum(self.chosen_lengths) + sum(self.rejected_lengths)


def transfer(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to `device`; through pinned memory, so that the copy does not wait for the device."""
    if device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _joined_ids(ids: Sequence[TokenIds]) -> Tensor:
    return torch.from_numpy(np.concatenate(ids).astype(np.int64))


def _joined_masks(sides: Sequence[tuple[TokenIds, TokenMask | None]]) -> Tensor:
    return torch.from_numpy(
        np.concatenate([np.ones(len(ids), dtype=np.bool_) if mask is None else mask for ids, mask in sides])
    )
