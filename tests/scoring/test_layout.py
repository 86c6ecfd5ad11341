"""Token ids, position ids and predicting states of rows, against rows built token by token."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.scoring.layout import Segment, TokenCounter, TokenRows
from tests.support.sized_pairs import pairs_of

length = st.one_of(st.just(1), st.integers(1, 9))
sizes = st.lists(st.tuples(length, length, length), min_size=1, max_size=5)
everywhere = pytest.mark.parametrize("layout", Layout)
in_one_row = pytest.mark.parametrize("layout", [Layout.SHARED, Layout.PACKED])


@dataclass
class Naive:
    """A row built token by token."""

    ids: list[int] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    chosen: list[tuple[int, int]] = field(default_factory=list)
    """(index of the state, token that it predicts)"""
    rejected: list[tuple[int, int]] = field(default_factory=list)

    def write(self, tokens: Sequence[int], first_position: int) -> list[int]:
        """Their indices in the row."""
        places = list(range(len(self.ids), len(self.ids) + len(tokens)))
        self.ids += tokens
        self.positions += range(first_position, first_position + len(tokens))
        return places

    def share(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> None:
        trunk = self.write(prompt, 0)
        for side, states in ((chosen, self.chosen), (rejected, self.rejected)):
            places = self.write(side, len(prompt))
            states += zip([trunk[-1], *places[:-1]], side, strict=True)

    def pack(self, prompt: list[int], chosen: list[int], rejected: list[int]) -> None:
        for side, states in ((chosen, self.chosen), (rejected, self.rejected)):
            places = self.write(prompt + side, 0)
            states += zip(places[len(prompt) - 1 : -1], side, strict=True)


def token_lists(pair: EncodedPair) -> tuple[list[int], list[int], list[int]]:
    prompt, chosen, rejected = (ids.tolist() for ids in pair.all_ids)
    return prompt, chosen, rejected


@in_one_row
@settings(max_examples=60, deadline=None)
@given(sizes=sizes)
def test_one_row_is_the_one_written_by_hand(layout: Layout, sizes: list[tuple[int, int, int]]) -> None:
    pairs = pairs_of(*sizes)
    naive = Naive()
    write: Callable[..., None] = naive.share if layout is Layout.SHARED else naive.pack
    for pair in pairs:
        write(*token_lists(pair))
    rows = TokenRows.of(PairBatch.of(pairs), layout)
    assert rows.input_ids.tolist() == [naive.ids]
    assert rows.position_ids is not None
    assert rows.position_ids.tolist() == [naive.positions]
    assert list(zip(rows.predicting.tolist(), rows.targets.tolist(), strict=True)) == naive.chosen + naive.rejected
    assert rows.lengths == (len(naive.ids),)
    assert rows.inputs.keys() == {"input_ids", "position_ids"}
    assert rows.is_token.all()
    assert sum(segment.size for segment in rows.segments) == len(naive.ids)
    expected = [
        Segment(prompt, (chosen, rejected)) if layout is Layout.SHARED else Segment(0, (prompt + side,))
        for prompt, chosen, rejected in sizes
        for side in ([chosen] if layout is Layout.SHARED else [chosen, rejected])
    ]
    assert list(rows.segments) == expected


@settings(max_examples=60, deadline=None)
@given(sizes=sizes)
def test_padded_rows_hold_all_chosen_sides_and_then_all_rejected_ones(sizes: list[tuple[int, int, int]]) -> None:
    pairs = pairs_of(*sizes)
    rows = TokenRows.of(PairBatch.of(pairs), Layout.PADDED)
    assert rows.position_ids is None
    assert rows.segments == ()
    assert rows.inputs.keys() == {"input_ids"}
    written = [token_lists(pair) for pair in pairs]
    sides = [(prompt, chosen) for prompt, chosen, _ in written] + [
        (prompt, rejected) for prompt, _, rejected in written
    ]
    width = max(len(prompt + side) for prompt, side in sides)
    assert rows.input_ids.shape == (len(sides), width)
    states = []
    for row, (prompt, side) in enumerate(sides):
        whole = prompt + side
        assert rows.input_ids[row].tolist() == whole + [0] * (width - len(whole))
        assert rows.is_token[row].tolist() == [column < len(whole) for column in range(width)]
        assert rows.lengths[row] == len(whole)
        states += [(row * width + len(prompt) - 1 + step, token) for step, token in enumerate(side)]
    assert list(zip(rows.predicting.tolist(), rows.targets.tolist(), strict=True)) == states


@everywhere
@settings(max_examples=30, deadline=None)
@given(sizes=sizes)
def test_each_predicting_state_stands_left_of_its_target_in_its_own_sequence(
    layout: Layout, sizes: list[tuple[int, int, int]]
) -> None:
    """Whatever the layout: the token at a predicting state, and its place, are those before the target's."""
    pairs = pairs_of(*sizes)
    rows = TokenRows.of(PairBatch.of(pairs), layout)
    width = rows.input_ids.shape[1]
    places = torch.arange(width).expand_as(rows.input_ids) if rows.position_ids is None else rows.position_ids
    before = [
        (([*prompt, *side])[len(prompt) + step - 1], len(prompt) + step - 1)
        for which in (1, 2)
        for prompt, side in ((token_lists(pair)[0], token_lists(pair)[which]) for pair in pairs)
        for step in range(len(side))
    ]
    found = zip(
        rows.input_ids.flatten()[rows.predicting].tolist(), places.flatten()[rows.predicting].tolist(), strict=True
    )
    assert list(found) == before


@everywhere
def test_the_size_of_a_pair_is_what_it_takes_in_its_rows(layout: Layout) -> None:
    for sizes in ((1, 1, 1), (4, 2, 7), (3, 9, 1)):
        assert TokenRows.of(PairBatch.of(pairs_of(sizes)), layout).input_ids.numel() == layout.size(*sizes)


@in_one_row
def test_a_widened_row_has_padding_in_a_segment_of_its_own(layout: Layout) -> None:
    rows = TokenRows.of(PairBatch.of(pairs_of((3, 2, 4), (1, 1, 1))), layout)
    length = rows.input_ids.shape[1]
    wide = rows.widened(length + 5)
    assert wide.position_ids is not None
    assert rows.position_ids is not None
    assert wide.input_ids.tolist() == [rows.input_ids[0].tolist() + [0] * 5]
    assert wide.position_ids.tolist() == [[*rows.position_ids[0].tolist(), 0, 0, 0, 0, 0]]
    assert wide.segments == (*rows.segments, Segment(0, (5,)))
    assert wide.lengths == rows.lengths
    assert wide.is_token.sum() == length
    assert torch.equal(wide.predicting, rows.predicting)
    assert torch.equal(wide.targets, rows.targets)


def test_rows_that_are_wide_enough_stay_as_they_are() -> None:
    batch = PairBatch.of(pairs_of((3, 2, 4), (1, 1, 1)))
    row = TokenRows.of(batch, Layout.SHARED)
    assert row.widened(row.input_ids.shape[1]) is row
    assert row.widened(1) is row
    padded = TokenRows.of(batch, Layout.PADDED)
    assert padded.widened(64) is padded


def test_a_tally_counts_tokens_by_what_became_of_them() -> None:
    batch = PairBatch.of(pairs_of((3, 2, 4), (1, 1, 1)))
    attended = 9 / 2 + (2 * 3 + 2) + (4 * 3 + 8) + 1 / 2 + 2 * (1 + 1 / 2)
    computed = {Layout.SHARED: 12, Layout.PACKED: 16, Layout.PADDED: 4 * 7}
    for layout, tokens in computed.items():
        tally = TokenCounter()
        tally.add(batch, TokenRows.of(batch, layout))
        padding = tokens - 16 if layout is Layout.PADDED else 0
        assert (tally.computed, tally.padding, tally.unique, tally.scored) == (tokens, padding, 12, 8)
        assert tally.attended == pytest.approx(attended)
        tally.add(batch, TokenRows.of(batch, layout).widened(32))
        grown = tokens if layout is Layout.PADDED else 32
        assert (tally.computed, tally.padding) == (
            tokens + grown,
            padding + grown - 12 - 4 * (layout is not Layout.SHARED),
        )
        assert (tally.unique, tally.scored) == (24, 16)


def test_a_tally_of_training_leaves_out_passes_without_a_graph() -> None:
    batch = PairBatch.of(pairs_of((3, 2, 4)))
    tally = TokenCounter(with_gradient_only=True)
    with torch.no_grad():
        tally.add(batch, TokenRows.of(batch, Layout.SHARED))
    assert tally == TokenCounter(with_gradient_only=True)
    tally.add(batch, TokenRows.of(batch, Layout.SHARED))
    assert tally.unique == 9
