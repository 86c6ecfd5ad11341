"""FlexAttention block masks for one row of many segments: a document mask in which branches also see their trunk.

Built from the lengths of the segments, block by block, rather than by evaluating `mask_mod` on every pair of tokens as
`create_block_mask` does.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from dpocli.data.batch import transfer
from dpocli.scoring.layout import Segment

BLOCK = 128
"""Tokens along each side of a block; FlexAttention's default."""

TRUNK = -1
"""Branch number of the tokens of a trunk."""

NO_WINDOW = 2**30

MAX_KERNELS = 64
"""Compiled variants of the kernel. Beyond torch's default of 8, dynamo silently falls back to eager attention, which
materializes all scores."""


def try_kernel(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, *, backward: bool) -> None:
    """Compile and run FlexAttention on one small row with the model's head count and head size.

    Args:
        model: its configuration gives the shapes.
        device: a CUDA device.
        dtype: of query, key and value.
        backward: also run the backward pass.

    Raises:
        Exception: whatever a missing compiler, or a device without resources for the kernel, raises.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, MAX_KERNELS)
    limits.fail_on_recompile_limit_hit = True
    config = model.config.get_text_config()
    heads, key_heads = config.num_attention_heads, getattr(config, "num_key_value_heads", config.num_attention_heads)
    size = getattr(config, "head_dim", None) or config.hidden_size // heads
    segments = (Segment(BLOCK, (BLOCK, BLOCK // 2)), Segment(0, (BLOCK // 2,)))
    length = sum(segment.size for segment in segments)
    query, key, value = (
        torch.randn(1, count, length, size, device=device, dtype=dtype, requires_grad=backward)
        for count in (heads, key_heads, key_heads)
    )
    mask = BlockMasks(segments, device).of(None)
    output, _ = flex_attention_forward(model, query, key, value, mask)
    if backward:
        output.float().sum().backward()
    float(output.detach().float().sum())  # synchronizes: errors of CUDA kernels are asynchronous


class _Span(NamedTuple):
    """Consecutive tokens of the row that belong to one trunk or one branch."""

    start: int
    stop: int
    segment: int
    branch: int
    position: int
    """Position id of the first token."""

    def sees(self, other: "_Span") -> bool:
        return self.segment == other.segment and other.branch in (TRUNK, self.branch)

    @property
    def touched_blocks(self) -> slice:
        """Blocks with at least one token of the span."""
        return slice(self.start // BLOCK, (self.stop - 1) // BLOCK + 1)

    @property
    def whole_blocks(self) -> slice:
        """Blocks with no other token."""
        first = -(-self.start // BLOCK)
        return slice(first, max(first, self.stop // BLOCK))


def _spans(segments: tuple[Segment, ...]) -> Iterator[_Span]:
    start = 0
    for index, segment in enumerate(segments):
        lengths = [(TRUNK, segment.trunk, 0)] if segment.trunk else []
        lengths += [(branch, length, segment.trunk) for branch, length in enumerate(segment.branches) if length]
        for branch, length, position in lengths:
            yield _Span(start, start + length, index, branch, position)
            start += length


class BlockMasks:
    """The block masks of one row, one for each sliding window of the model's layers.

    Args:
        segments: of the row.
        device: where attention is computed.
    """

    def __init__(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        self._spans = list(_spans(segments))
        self._device = device
        lengths = torch.tensor([span.stop - span.start for span in self._spans])

        def per_token(values: list[int]) -> Tensor:
            return transfer(torch.tensor(values, dtype=torch.int32).repeat_interleave(lengths), device)

        self._segment = per_token([span.segment for span in self._spans])
        self._branch = per_token([span.branch for span in self._spans])
        offsets = per_token([span.start - span.position for span in self._spans])
        self._position = torch.arange(len(offsets), dtype=torch.int32, device=device) - offsets
        self._masks: dict[int | None, BlockMask] = {}

    def of(self, window: int | None) -> BlockMask:
        """Mask of layers with this sliding window (tokens; None: unlimited), built on first use."""
        if window not in self._masks:
            self._masks[window] = self._build(window)
        return self._masks[window]

    def mask_mod(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """FlexAttention's `mask_mod` (batch, head, query, key) → bool, for the tokens of partial blocks."""
        segment, branch, position = self._segment, self._branch, self._position
        # A tensor, so that the kernel is compiled once for all windows and none.
        reach = transfer(torch.tensor(NO_WINDOW if window is None else window, dtype=torch.int32), self._device)

        def sees(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = position[query] - position[key]
            same_sequence = (branch[key] == TRUNK) | (branch[key] == branch[query])
            return (segment[query] == segment[key]) & same_sequence & (distance >= 0) & (distance < reach)

        return sees

    def _build(self, window: int | None) -> BlockMask:
        length = self._spans[-1].stop
        visible, full = _blocks(self._spans, -(-length // BLOCK), window)
        return BlockMask.from_kv_blocks(
            *_block_lists(visible & ~full, self._device),
            *_block_lists(full, self._device),
            BLOCK_SIZE=BLOCK,
            mask_mod=self.mask_mod(window),
            seq_lengths=(length, length),
        )


def _blocks(spans: list[_Span], count: int, window: int | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Find the blocks to compute, and those in which every query sees every key.

    The first may include a block in which nothing is visible, the second may lack one that is full: `mask_mod` decides in
    the blocks that are in the first only.

    Returns:
        Two arrays of shape (query blocks, key blocks), both of size `count`.
    """
    visible = np.zeros((count, count), dtype=np.bool_)
    full = np.zeros((count, count), dtype=np.bool_)
    starts = np.arange(count) * BLOCK
    of_segment: dict[int, list[_Span]] = {}
    for span in spans:
        of_segment.setdefault(span.segment, []).append(span)

    def distances(queries: slice, keys: slice, shift: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Smallest and largest distance in the sequence from the keys of a block to the queries of another."""
        difference = starts[queries, None] - starts[None, keys] + shift
        return difference - (BLOCK - 1), difference + (BLOCK - 1)

    for queries in spans:
        for keys in filter(queries.sees, of_segment[queries.segment]):
            shift = (queries.position - queries.start) - (keys.position - keys.start)
            blocks = queries.touched_blocks, keys.touched_blocks
            nearest, farthest = distances(*blocks, shift)
            visible[blocks] |= (farthest >= 0) if window is None else (farthest >= 0) & (nearest < window)
            blocks = queries.whole_blocks, keys.whole_blocks
            nearest, farthest = distances(*blocks, shift)
            full[blocks] |= (nearest >= 0) if window is None else (nearest >= 0) & (farthest < window)
    return visible, full


def _block_lists(blocks: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """Number of key blocks of each query block, and their indices first, as `BlockMask.from_kv_blocks` takes them."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(axis=1, dtype=np.int32)
    return tuple(transfer(torch.from_numpy(values)[None, None], device) for values in (counts, order))  # type: ignore[return-value]
