"""The block mask of a row of segments, for FlexAttention: one kernel for the whole row, and no work between segments.

Made from the segments themselves, block by block, rather than by asking a function about every pair of tokens.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask
from transformers import PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from dpocli.data.batch import transfer
from dpocli.scoring.layout import Segment

BLOCK = 128

TRUNK = -1

NO_WINDOW = 2**30

KERNELS = 64
"""Shapes that are compiled before the compiler gives up; it counts few by itself, and then silently makes all scores."""


def try_kernel(model: PreTrainedModel, device: torch.device, dtype: torch.dtype, *, backward: bool) -> None:
    """Compiles and runs the kernel for a small row of the model's shape, alone.

    Raises:
        Exception: whatever a missing compiler, or a device without resources for the kernel, raises.
    """
    limits = torch._dynamo.config
    limits.recompile_limit = max(limits.recompile_limit, KERNELS)
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
    output = BlockMasks(segments, device).attention(model, query, key, value, 0.0, None, {})
    if backward:
        output.float().sum().backward()  # type: ignore[no-untyped-call]
    float(output.detach().float().sum())  # waits for the device, which reports late


class _Run(NamedTuple):
    """Tokens of one segment and one branch (or trunk), side by side in the row."""

    start: int
    stop: int
    segment: int
    branch: int
    position: int
    """Of the first token, in its sequence."""

    def sees(self, other: "_Run") -> bool:
        return self.segment == other.segment and other.branch in (TRUNK, self.branch)

    @property
    def touched(self) -> slice:
        """Blocks that hold one of the tokens."""
        return slice(self.start // BLOCK, (self.stop - 1) // BLOCK + 1)

    @property
    def filled(self) -> slice:
        """Blocks that hold nothing else."""
        first = -(-self.start // BLOCK)
        return slice(first, max(first, self.stop // BLOCK))


def _runs(segments: tuple[Segment, ...]) -> Iterator[_Run]:
    start = 0
    for index, segment in enumerate(segments):
        lengths = [(TRUNK, segment.trunk, 0)] if segment.trunk else []
        lengths += [(branch, length, segment.trunk) for branch, length in enumerate(segment.branches)]
        for branch, length, position in lengths:
            yield _Run(start, start + length, index, branch, position)
            start += length


@dataclass(slots=True)
class _Tokens:
    """Per token of the row, shape (tokens,)."""

    segment: Tensor
    branch: Tensor
    position: Tensor


class BlockMasks:
    """The block masks of one row, one for each window that its layers have."""

    def __init__(self, segments: tuple[Segment, ...], device: torch.device) -> None:
        self._runs = [run for run in _runs(segments) if run.stop > run.start]
        self._device = device
        lengths = torch.tensor([run.stop - run.start for run in self._runs])

        def per_token(values: list[int]) -> Tensor:
            return transfer(torch.tensor(values, dtype=torch.int32).repeat_interleave(lengths), device)

        starts = per_token([run.start - run.position for run in self._runs])
        self._tokens = _Tokens(
            segment=per_token([run.segment for run in self._runs]),
            branch=per_token([run.branch for run in self._runs]),
            position=torch.arange(len(starts), dtype=torch.int32, device=device) - starts,
        )
        self._masks: dict[int | None, BlockMask] = {}

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        dropout: float,
        scaling: float | None,
        options: dict[str, Any],
    ) -> Tensor:
        """Arguments and result as for `segment_attention`; soft caps and sinks are the library's business."""
        mask = self.of(options.get("sliding_window"))
        output: Tensor = flex_attention_forward(
            module, query, key, value, mask, scaling=scaling, dropout=dropout, **options
        )[0]
        return output

    def of(self, window: int | None) -> BlockMask:
        """The mask of layers that look no further back than `window` tokens."""
        if window not in self._masks:
            self._masks[window] = self._make(window)
        return self._masks[window]

    def sees(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Which token sees which: a function of batch, head, query and key."""
        segment, branch, position = self._tokens.segment, self._tokens.branch, self._tokens.position
        # A tensor, so that the kernel is compiled once for all windows and none.
        reach = transfer(torch.tensor(NO_WINDOW if window is None else window, dtype=torch.int32), self._device)

        def seen(_batch: Tensor, _head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            distance = position[query] - position[key]
            of_mine = (branch[key] == TRUNK) | (branch[key] == branch[query])
            return (segment[query] == segment[key]) & of_mine & (distance >= 0) & (distance < reach)

        return seen

    def _make(self, window: int | None) -> BlockMask:
        length = self._runs[-1].stop
        touched, filled = _blocks(self._runs, -(-length // BLOCK), window)
        some_count, some_index = _as_lists(touched & ~filled, self._device)
        full_count, full_index = _as_lists(filled, self._device)
        return BlockMask.from_kv_blocks(
            some_count,
            some_index,
            full_count,
            full_index,
            BLOCK_SIZE=BLOCK,
            mask_mod=self.sees(window),
            seq_lengths=(length, length),
        )


def _blocks(runs: list[_Run], count: int, window: int | None) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Blocks in which a token may see another, and blocks in which every token sees every other. Shape (count, count).

    The first may hold more than need be, the second less: what is in one and not in the other is asked token by token.
    """
    touched = np.zeros((count, count), dtype=np.bool_)
    filled = np.zeros((count, count), dtype=np.bool_)
    index = np.arange(count)
    of_segment: dict[int, list[_Run]] = {}
    for run in runs:
        of_segment.setdefault(run.segment, []).append(run)
    for queries in runs:
        for keys in filter(queries.sees, of_segment[queries.segment]):
            # Distance in the sequence of the last query of a block from the first key of another.
            shift = (queries.position - queries.start) - (keys.position - keys.start)
            nearest = index[:, None] * BLOCK - (index[None] + 1) * BLOCK + 1 + shift
            farthest = (index[:, None] + 1) * BLOCK - 1 - index[None] * BLOCK + shift
            reachable = farthest >= 0
            inside = nearest >= 0
            if window is not None:
                reachable &= nearest < window
                inside &= farthest < window
            rows, columns = queries.touched, keys.touched
            touched[rows, columns] |= reachable[rows, columns]
            rows, columns = queries.filled, keys.filled
            filled[rows, columns] |= inside[rows, columns]
    return touched, filled


def _as_lists(blocks: NDArray[np.bool_], device: torch.device) -> tuple[Tensor, Tensor]:
    """How many blocks of each row of blocks, and which (those first), as the kernel wants them."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    counts = blocks.sum(axis=1, dtype=np.int32)
    return tuple(transfer(torch.from_numpy(values)[None, None], device) for values in (counts, order))  # type: ignore[return-value]
