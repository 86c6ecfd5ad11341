"""Batch layouts, and the grouping of pairs into micro-batches. Affects speed and memory, not results."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import overload

import numpy as np
from numpy.typing import NDArray

Lengths = tuple[int, ...]

TokenCounts = NDArray[np.int64]


class Layout(StrEnum):
    """Batch layout of pairs. The first is the fastest, the last the simplest."""

    SHARED = "shared"
    """One row of all pairs, for each: the prompt once, then both sides."""
    PACKED = "packed"
    """One row of all pairs, for each: prompt + chosen, then prompt + rejected."""
    PADDED = "padded"
    """Two rows per pair, padded on the right to the longest."""

    @property
    def pads(self) -> bool:
        return self is Layout.PADDED

    @overload
    def size(self, prompt: int, chosen: int, rejected: int) -> int: ...
    @overload
    def size(self, prompt: TokenCounts, chosen: TokenCounts, rejected: TokenCounts) -> TokenCounts: ...
    def size(
        self, prompt: int | TokenCounts, chosen: int | TokenCounts, rejected: int | TokenCounts
    ) -> int | TokenCounts:
        """Tokens that a pair takes, from the tokens of its parts: integers, or arrays of shape (pairs,)."""
        match self:
            case Layout.SHARED:
                return prompt + chosen + rejected
            case Layout.PACKED:
                return 2 * prompt + chosen + rejected
            case Layout.PADDED:
                longer = chosen * (chosen >= rejected) + rejected * (chosen < rejected)
                return 2 * (prompt + longer)


@dataclass(frozen=True, slots=True)
class Packing:
    """How pairs are grouped for one forward pass."""

    layout: Layout
    token_budget: int
    """Tokens of a pass, padding included."""

    def fixed_width(self, tokens: int) -> int:
        """`tokens` rounded up to a multiple of a 16th of the budget, so that few different row widths occur."""
        step = max(128, self.token_budget // 16)
        return -(-tokens // step) * step


def pack(sizes: Sequence[int], packing: Packing) -> list[list[int]]:
    """Group pairs into micro-batches within the token budget.

    Args:
        sizes: per pair, `Layout.size`.
        packing: the layout and the budget; a larger pair is a micro-batch of its own.

    Returns:
        Micro-batches of indices into `sizes`, longest pairs first, so that running out of memory happens early.
    """
    by_size = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    fill = _fill_padded if packing.layout.pads else _fill_rows
    return fill(by_size, sizes, packing.token_budget)


def _fill_padded(by_size: Sequence[int], sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """Group pairs of similar size: padding gives every pair the size of the largest."""
    micro_batches: list[list[int]] = []
    largest = 0
    for index in by_size:
        if micro_batches and largest * (len(micro_batches[-1]) + 1) <= token_budget:
            micro_batches[-1].append(index)
        else:
            micro_batches.append([index])
            largest = sizes[index]
    return micro_batches


def _fill_rows(by_size: Sequence[int], sizes: Sequence[int], token_budget: int) -> list[list[int]]:
    """Best fit: put each pair into the fullest row that has room for it."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []
    """(room left, row), sorted."""
    for index in by_size:
        place = bisect_left(rooms, (sizes[index], -1))
        if place < len(rooms):
            room, row = rooms.pop(place)
            rows[row].append(index)
        else:
            room, row = token_budget, len(rows)
            rows.append([index])
        insort(rooms, (room - sizes[index], row))
    return rows


def deal(sizes: Sequence[int], ranks: int, packing: Packing) -> list[list[list[int]]]:
    """Distribute the pairs of one global batch over ranks, with the same number of micro-batches on each.

    Every rank computes the whole plan from the sizes, without communication. Pairs are dealt back and forth in order of
    size, which balances the ranks. A rank with too few micro-batches splits its own; one with too few pairs gets empty
    ones, since it must take part in the collectives of each pass.

    Args:
        sizes: as for `pack`.
        ranks: number of ranks.
        packing: as for `pack`, on each rank.

    Returns:
        Per rank, the micro-batches of indices into `sizes`.
    """
    by_size = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    hands: list[list[int]] = [[] for _ in range(ranks)]
    for turn in range(0, len(by_size), ranks):
        round_ = by_size[turn : turn + ranks]
        order = range(ranks) if (turn // ranks) % 2 == 0 else range(ranks - 1, -1, -1)
        for rank, index in zip(order, round_, strict=False):
            hands[rank].append(index)
    plans = [[[hand[i] for i in batch] for batch in pack([sizes[index] for index in hand], packing)] for hand in hands]
    passes = max(len(plan) for plan in plans)
    for plan in plans:
        while len(plan) < passes:
            largest = max(plan, key=len, default=[])
            half = len(largest) // 2
            plan.append(largest[half:] if half else [])
            if half:
                del largest[half:]
    return plans
