"""Packing: every pair once, within the budget, in few rows; and the same number of passes on every process."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout, Packing, deal, pack
from tests.support.sized_pairs import pairs_of

everywhere = pytest.mark.parametrize("layout", Layout)
in_one_row = pytest.mark.parametrize("layout", [Layout.SHARED, Layout.PACKED])
sizes_of_pairs = st.lists(st.integers(3, 300), min_size=1, max_size=40)
budgets = st.sampled_from([1, 64, 256, 1000])


def cost(sizes: list[int], members: list[int], layout: Layout) -> int:
    """Tokens of a pass, padding included."""
    of_members = [sizes[index] for index in members]
    return max(of_members) * len(of_members) if layout.pads else sum(of_members)


@everywhere
@settings(max_examples=80, deadline=None)
@given(sizes=sizes_of_pairs, budget=budgets)
def test_every_pair_goes_once_and_within_the_budget_unless_alone(layout: Layout, sizes: list[int], budget: int) -> None:
    packed = pack(sizes, Packing(layout, budget))
    assert sorted(index for members in packed for index in members) == list(range(len(sizes)))
    for members in packed:
        assert len(members) == 1 or cost(sizes, members, layout) <= budget


@everywhere
@settings(max_examples=40, deadline=None)
@given(sizes=sizes_of_pairs, budget=budgets)
def test_the_largest_pair_is_in_the_first_pass(layout: Layout, sizes: list[int], budget: int) -> None:
    packed = pack(sizes, Packing(layout, budget))
    assert max(sizes) == sizes[packed[0][0]]
    firsts = [sizes[members[0]] for members in packed]
    assert all(earlier >= later for earlier, later in pairwise(firsts))


@in_one_row
@settings(max_examples=80, deadline=None)
@given(sizes=sizes_of_pairs, budget=st.sampled_from([300, 500, 1000]))
def test_no_two_rows_would_have_gone_into_one(layout: Layout, sizes: list[int], budget: int) -> None:
    packed = pack(sizes, Packing(layout, budget))
    if len(packed) > 1:
        loads = sorted(cost(sizes, members, layout) for members in packed)
        assert loads[0] + loads[1] > budget


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    sizes = [60, 50, 39, 40, 9, 1]
    assert pack(sizes, Packing(Layout.SHARED, 100)) == [[0, 3], [1, 2, 4, 5]]


def test_real_lengths_leave_little_room_in_rows() -> None:
    generator = np.random.default_rng(0)
    sizes = (generator.lognormal(5.5, 0.6, 512) + 3).astype(int).clip(max=2048).tolist()
    packed = pack(sizes, Packing(Layout.SHARED, 4096))
    assert len(packed) == -(-sum(sizes) // 4096)


def test_padded_rows_hold_neighbours_in_size() -> None:
    generator = np.random.default_rng(0)
    sizes = generator.integers(3, 300, 100).tolist()
    packed = pack(sizes, Packing(Layout.PADDED, 1000))
    for earlier, later in pairwise(packed):
        assert min(sizes[index] for index in earlier) >= max(sizes[index] for index in later)


@everywhere
def test_equal_sizes_keep_their_order(layout: Layout) -> None:
    assert [index for members in pack([10] * 9, Packing(layout, 30)) for index in members] == list(range(9))
    assert pack([], Packing(layout, 30)) == []


@everywhere
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@settings(max_examples=40, deadline=None)
@given(sizes=sizes_of_pairs, budget=budgets)
def test_dealing_gives_every_rank_the_same_passes_and_every_pair_once(
    layout: Layout, ranks: int, sizes: list[int], budget: int
) -> None:
    plans = deal(sizes, ranks, Packing(layout, budget))
    assert len(plans) == ranks
    assert len({len(plan) for plan in plans}) == 1
    assert sorted(index for plan in plans for members in plan for index in members) == list(range(len(sizes)))
    for members in (members for plan in plans for members in plan if len(members) > 1):
        assert cost(sizes, members, layout) <= budget
    hands = [sorted(sizes[index] for members in plan for index in members) for plan in plans]
    assert max(map(len, hands)) - min(map(len, hands)) <= 1
    assert max(map(sum, hands)) - min(map(sum, hands)) <= max(sizes)


@everywhere
def test_dealing_to_one_is_packing(layout: Layout) -> None:
    sizes = np.random.default_rng(0).integers(3, 300, 50).tolist()
    assert deal(sizes, 1, Packing(layout, 700)) == [pack(sizes, Packing(layout, 700))]


@pytest.mark.parametrize(
    ("tokens", "width"),
    [(1, 256), (256, 256), (257, 512), (3000, 3072), (4096, 4096), (4097, 4352), (9000, 9216)],
)
def test_rows_have_one_of_few_widths(tokens: int, width: int) -> None:
    assert Packing(Layout.SHARED, 4096).fixed_width(tokens) == width


@settings(max_examples=100, deadline=None)
@given(budget=st.integers(1, 5000), tokens=st.integers(1, 20_000))
def test_a_width_has_room_wastes_little_and_is_one_of_few(budget: int, tokens: int) -> None:
    width, step = Packing(Layout.SHARED, budget).fixed_width(tokens), max(128, budget // 16)
    assert tokens <= width < tokens + step
    assert width % step == 0


@everywhere
def test_the_size_of_a_pair_is_the_same_for_numbers_and_arrays(layout: Layout) -> None:
    generator = np.random.default_rng(0)
    prompt, chosen, rejected = generator.integers(1, 50, (3, 40))
    one_by_one = [layout.size(*map(int, sizes)) for sizes in zip(prompt, chosen, rejected, strict=True)]
    assert layout.size(prompt, chosen, rejected).tolist() == one_by_one


def test_a_batch_knows_its_tokens() -> None:
    batch = PairBatch.of(pairs_of((3, 2, 4), (1, 5, 1)))
    assert len(batch) == 2
    assert batch.num_tokens == 16
    assert batch.longer_lengths == [7, 6]
    assert batch.largest_id() == max(int(ids.max()) for pair in pairs_of((3, 2, 4), (1, 5, 1)) for ids in pair.all_ids)
