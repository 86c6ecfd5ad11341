"""The block mask shows each token what its own sequence has up to it, and its lists of blocks leave nothing out."""

import tracemalloc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import PreTrainedModel
from transformers.integrations import flex_attention as library

from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout
from dpocli.scoring import block_mask
from dpocli.scoring.block_mask import BLOCK, BlockMasks
from dpocli.scoring.layout import Segment
from dpocli.scoring.scorer import PairScorer
from tests.scoring.test_scorer import BATCHING_TOLERANCE
from tests.support.sized_pairs import pairs_of
from tests.support.tiny_models import WINDOW, build, length_dependent

CPU = torch.device("cpu")
WINDOWS = [None, 1, 7, BLOCK, BLOCK + 2, 2 * BLOCK - 1, 300]
"""Some end just where a block begins to be seen, or ceases to be wholly so."""


def naive(segments: tuple[Segment, ...], window: int | None) -> Tensor:
    """Who sees whom, from the tokens of each sequence in order. Shape (tokens, tokens), bool."""
    size = sum(segment.size for segment in segments)
    seen = torch.zeros(size, size, dtype=torch.bool)
    start = 0
    for segment in segments:
        trunk = torch.arange(start, start + segment.trunk)
        start += segment.trunk
        for length in segment.branches:
            sequence = torch.cat([trunk, torch.arange(start, start + length)])
            place = torch.arange(len(sequence))
            distance = place[:, None] - place
            seen[sequence[:, None], sequence] |= (distance >= 0) & (distance < (window or size))
            start += length
    return seen


def random_segments(seed: int) -> tuple[Segment, ...]:
    """Shared pairs, packed ones, long and short, with parts of one token and padding at the end."""
    generator = np.random.default_rng(seed)
    longest = int(generator.choice([4, 60, 400]))
    segments = []
    for _ in range(int(generator.integers(1, 6))):
        trunk = int(generator.choice([0, 1, generator.integers(1, longest + 1)]))
        branches = generator.integers(1, longest + 1, size=2 if trunk else 1)
        segments.append(Segment(trunk, tuple(branches.tolist())))
    if seed % 2:
        segments.append(Segment(0, (int(generator.integers(1, 300)),)))
    return tuple(segments)


ON_BLOCK_EDGES = (
    Segment(BLOCK, (BLOCK, 2 * BLOCK)),
    Segment(2 * BLOCK, (1, BLOCK - 1)),
    Segment(BLOCK - 1, (1, BLOCK)),
    Segment(0, (BLOCK,)),
)


def asked(masks: BlockMasks, window: int | None, size: int) -> Tensor:
    """`mask_mod` for all pairs of tokens. Shape (tokens, tokens), bool."""
    zero, index = torch.tensor(0), torch.arange(size)
    return masks.mask_mod(window)(zero, zero, index[:, None], index[None])


@dataclass
class Listed:
    """Blocks that the kernel computes. Shape (blocks, blocks), bool."""

    partial: Tensor
    """In which `mask_mod` is called."""
    full: Tensor
    """In which it is not called."""

    @classmethod
    def of(cls, mask: BlockMask) -> "Listed":
        assert mask.full_kv_num_blocks is not None
        assert mask.full_kv_indices is not None
        return cls(
            unlisted(mask.kv_num_blocks, mask.kv_indices), unlisted(mask.full_kv_num_blocks, mask.full_kv_indices)
        )

    @classmethod
    def of_backward_pass(cls, mask: BlockMask) -> "Listed":
        """The same from the lists by key."""
        assert mask.q_num_blocks is not None
        assert mask.q_indices is not None
        assert mask.full_q_num_blocks is not None
        assert mask.full_q_indices is not None
        return cls(
            unlisted(mask.q_num_blocks, mask.q_indices).T, unlisted(mask.full_q_num_blocks, mask.full_q_indices).T
        )


def unlisted(counts: Tensor, indices: Tensor) -> Tensor:
    blocks = torch.zeros(indices.shape[-2:], dtype=torch.bool)
    for row, count in enumerate(counts[0, 0].tolist()):
        blocks[row, indices[0, 0, row, :count].long()] = True
    return blocks


def by_token(blocks: Tensor, size: int) -> Tensor:
    return blocks.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)[:size, :size]


def assert_tokens_see_their_own_sequence(segments: tuple[Segment, ...], window: int | None) -> None:
    """And no further back than the window."""
    expected = naive(segments, window)
    assert torch.equal(asked(BlockMasks(segments, CPU), window, len(expected)), expected)


def assert_blocks_cover_just_what_is_seen(segments: tuple[Segment, ...], window: int | None) -> None:
    expected = naive(segments, window)
    size = len(expected)
    mask = BlockMasks(segments, CPU).of(window)
    assert mask.seq_lengths == (size, size)
    listed = Listed.of(mask)
    assert not (listed.partial & listed.full).any(), "a block in both lists is counted twice"
    assert not (by_token(listed.full, size) & ~expected).any(), "a block in which not all is seen"
    assert (expected <= by_token(listed.partial | listed.full, size)).all(), (
        "a block is missing in which something is seen"
    )
    computed = by_token(listed.full, size) | (
        by_token(listed.partial, size) & asked(BlockMasks(segments, CPU), window, size)
    )
    assert torch.equal(computed, expected)
    backward = Listed.of_backward_pass(mask)
    assert torch.equal(backward.partial, listed.partial)
    assert torch.equal(backward.full, listed.full)


@pytest.mark.parametrize("check", [assert_tokens_see_their_own_sequence, assert_blocks_cover_just_what_is_seen])
def test_masks_of_random_rows(check: Callable[[tuple[Segment, ...], int | None], None]) -> None:
    for seed in range(12):
        for window in WINDOWS:
            check(random_segments(seed), window)


@pytest.mark.parametrize(
    ("segments", "window"),
    [
        *((ON_BLOCK_EDGES, window) for window in WINDOWS),
        ((Segment(0, (1,)),), None),
        ((Segment(3 * BLOCK + 5, (2, 3)),), None),
        ((Segment(3 * BLOCK + 5, (2, 3)),), BLOCK),
    ],
)
def test_masks_on_block_edges(segments: tuple[Segment, ...], window: int | None) -> None:
    assert_tokens_see_their_own_sequence(segments, window)
    assert_blocks_cover_just_what_is_seen(segments, window)


def blocks_by_whole_matrices(segments: tuple[Segment, ...], window: int | None) -> tuple[Tensor, Tensor]:
    """Visible and full blocks, worked out for all pairs of blocks before the part of two spans is cut out."""
    spans = list(block_mask._spans(segments))
    index = torch.arange(-(-spans[-1].stop // BLOCK))
    visible, full = torch.zeros(2, len(index), len(index), dtype=torch.bool)
    for queries in spans:
        for keys in filter(queries.sees, spans):
            shift = (queries.position - queries.start) - (keys.position - keys.start)
            nearest = index[:, None] * BLOCK - (index[None] + 1) * BLOCK + 1 + shift
            farthest = (index[:, None] + 1) * BLOCK - 1 - index[None] * BLOCK + shift
            reach = block_mask.NO_WINDOW if window is None else window
            touched = queries.touched_blocks, keys.touched_blocks
            visible[touched] |= ((farthest >= 0) & (nearest < reach))[touched]
            whole = queries.whole_blocks, keys.whole_blocks
            full[whole] |= ((nearest >= 0) & (farthest < reach))[whole]
    return visible, full


def test_blocks_are_those_of_whole_matrices() -> None:
    for segments in (*map(random_segments, range(20)), ON_BLOCK_EDGES):
        for window in WINDOWS:
            listed = Listed.of(BlockMasks(segments, CPU).of(window))
            visible, full = blocks_by_whole_matrices(segments, window)
            assert torch.equal(listed.partial, visible & ~full)
            assert torch.equal(listed.full, full)


def test_a_pair_of_spans_computes_its_own_blocks_only() -> None:
    """One int64 matrix over the whole row of 65,536 tokens would have 2 MiB, allocated for every pair of spans."""
    spans = list(block_mask._spans((Segment(130, (65, 61)),) * 256))
    tracemalloc.start()
    block_mask._blocks(spans, 512, 1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert 2 * 512**2 <= peak < 2 * 512**2 + 300_000, "two matrices of booleans, and a little"


def test_long_rows_of_short_pairs_compute_few_blocks() -> None:
    """What a mask over the whole row would not save: the work grows with the row and not with its square."""
    mask = BlockMasks((Segment(200, (100, 84)),) * 32, CPU).of(None)
    blocks = 32 * 3
    listed = Listed.of(mask)
    assert int((listed.partial | listed.full).sum()) <= 6 * blocks < blocks**2 / 10


def test_whole_blocks_inside_a_sequence_are_not_asked_about() -> None:
    length = 16
    listed = Listed.of(BlockMasks((Segment(0, (length * BLOCK,)),), CPU).of(None))
    assert int(listed.full.sum()) == length * (length - 1) // 2
    assert torch.equal(listed.partial, torch.eye(length, dtype=torch.bool))
    windowed = Listed.of(BlockMasks((Segment(0, (length * BLOCK,)),), CPU).of(3 * BLOCK))
    assert int(windowed.full.sum()) == (length - 1) + (length - 2)
    assert int(windowed.partial.sum()) == length + (length - 3)


def test_each_window_has_a_mask_that_is_made_once() -> None:
    masks = BlockMasks(ON_BLOCK_EDGES, CPU)
    assert masks.of(None) is masks.of(None)
    assert masks.of(7) is masks.of(7)
    assert masks.of(7) is not masks.of(None)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """FlexAttention without its compiler; gives the masks it was called with."""
    used: list[BlockMask] = []

    def plain(query: Tensor, key: Tensor, value: Tensor, training: bool = False, **options: Any) -> Any:
        used.append(options["block_mask"])
        return flex_attention(query, key, value, **options)

    monkeypatch.setattr(library, "compile_friendly_flex_attention", plain)
    return used


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("layout", [Layout.SHARED, Layout.PACKED])
@pytest.mark.parametrize("family", ["llama-tied", "mistral-window", "gemma2-window-softcap", "gemma3-window", "olmo2"])
def test_flex_attention_gives_the_values_of_attention_by_segment(
    family: str, layout: Layout, uncompiled: list[BlockMask]
) -> None:
    batch = PairBatch.of(pairs_of((1, 9, 4), (30, 1, 1), (WINDOW, 7, 2 * WINDOW), (28, 31, 17), (70, 60, 3)))
    scorer = PairScorer(build(family), token_budget=1200)
    with torch.no_grad():
        scorer.lay_out(layout)
        expected = scorer(batch)
        assert not uncompiled
        scorer.lay_out(layout, flex=True)
        found = scorer(batch)
    assert all(length % 128 == 0 for mask in uncompiled for length in mask.seq_lengths)
    assert len({id(mask) for mask in uncompiled}) == (2 if family.startswith("gemma") else 1)
    assert scorer.layout_info == {"scoring": str(layout), "attention": "flex_attention"}
    torch.testing.assert_close(found.chosen, expected.chosen, **BATCHING_TOLERANCE)
    torch.testing.assert_close(found.rejected, expected.rejected, **BATCHING_TOLERANCE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    "make", [lambda: build("gpt2"), lambda: length_dependent("longrope")], ids=["gpt2", "longrope"]
)
def test_padding_of_a_row_is_at_no_position_that_a_model_cannot_bear(
    make: Callable[[], PreTrainedModel], uncompiled: list[BlockMask]
) -> None:
    """Of a table with 256 entries, and beyond 16 tokens."""
    scorer = PairScorer(make(), token_budget=5000)
    batch = PairBatch.of(pairs_of((3, 9, 4), (2, 1, 1)))
    with torch.no_grad():
        expected = scorer(batch)
        scorer.lay_out(Layout.SHARED, flex=True)
        found = scorer(batch)
    assert uncompiled[0].seq_lengths[0] > 256
    if scorer.rotary_limit:  # beyond it, rows go alone, through the model's own attention
        long = PairBatch.of(pairs_of((9, 30, 4), (2, 1, 1)))
        with torch.no_grad():
            assert scorer(long).chosen.isfinite().all()
    torch.testing.assert_close(found.chosen, expected.chosen, **BATCHING_TOLERANCE)
    torch.testing.assert_close(found.rejected, expected.rejected, **BATCHING_TOLERANCE)
