"""From log-probs of tokens to the sums of pairs: masks, tails, and the columns that are wanted."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.config.hyperparameters import Need
from dpocli.data.batch import PairBatch
from dpocli.data.preference import EncodedPair, TokenMask
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.scoring.token_logps import TokenLogps, pair_logps, segment_sums, tail_mask
from tests.support.pairs import random_pairs

EVERYTHING = LogpColumns(reference=True, collision=True, tails=True)
ALL_WANTED = [LogpColumns(*wanted) for wanted in itertools.product([False, True], repeat=3)]
SIDES = ("chosen", "rejected")


def masked_pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    """Random masks that may begin with tokens that do not count; some sides have none."""
    generator = np.random.default_rng(seed)

    def mask(length: int) -> TokenMask | None:
        if generator.random() < 0.2:
            return None
        drawn = generator.random(length) < 0.6
        drawn[generator.integers(length)] = True
        return drawn

    pairs = random_pairs(count, seed, reference=True)
    return [
        replace(pair, chosen_mask=mask(len(pair.chosen_ids)), rejected_mask=mask(len(pair.rejected_ids)))
        for pair in pairs
    ]


def random_tokens(pairs: Sequence[EncodedPair], seed: int = 0) -> TokenLogps:
    generator = torch.Generator().manual_seed(seed)
    chosen, rejected = (sum(len(getattr(pair, f"{side}_ids")) for pair in pairs) for side in SIDES)
    values = (-10 * torch.rand(count, generator=generator) for count in (chosen, rejected, chosen, rejected))
    return TokenLogps(*values)


def counted(values: NDArray[np.float32], mask: TokenMask | None) -> list[float]:
    """The values that count, in order."""
    return [float(value) for index, value in enumerate(values) if mask is None or mask[index]]


def by_a_plain_loop(tokens: TokenLogps, pairs: Sequence[EncodedPair]) -> dict[str, list[float]]:
    """Every column, pair by pair."""
    columns: dict[str, list[float]] = {column.name: [] for column in fields(PairLogps)}
    position = dict.fromkeys(SIDES, 0)
    for pair in pairs:
        values: dict[str, list[float]] = {}
        for side in SIDES:
            mask = getattr(pair, f"{side}_mask")
            here = slice(position[side], position[side] + len(getattr(pair, f"{side}_ids")))
            position[side] = here.stop
            values[f"policy_{side}"] = counted(getattr(tokens, side)[here].numpy(), mask)
            values[f"policy_{side}_collision"] = counted(getattr(tokens, f"{side}_collision")[here].numpy(), mask)
            values[f"reference_{side}"] = counted(getattr(pair.reference, side), mask)
        shared = min(len(values["policy_chosen"]), len(values["policy_rejected"]))
        for name, those in values.items():
            columns[name].append(math.fsum(those))
            if not name.endswith("_collision"):
                columns[f"{name}_tail"].append(math.fsum(those[shared:]))
        for side in SIDES:
            columns[f"{side}_tokens"].append(len(values[f"policy_{side}"]))
    return columns


# sums


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("masked", [True, False])
def test_the_sums_of_pairs_are_those_of_a_plain_loop(masked: bool, seed: int) -> None:
    pairs = masked_pairs(12, seed) if masked else random_pairs(12, seed, reference=True)
    tokens = random_tokens(pairs, seed)
    columns = pair_logps(tokens, PairBatch.of(pairs), pairs, EVERYTHING).columns()
    expected = by_a_plain_loop(tokens, pairs)
    assert columns.keys() == expected.keys()
    for name, values in columns.items():
        assert values.tolist() == pytest.approx(expected[name], rel=1e-12, abs=1e-12), name
        assert values.dtype == (torch.int64 if name.endswith("_tokens") else torch.float64), name
    # The pairs have tails on both sides, and the shorter side has none.
    for side in SIDES:
        assert any(columns[f"policy_{side}_tail"] != 0)
    assert not any((columns["policy_chosen_tail"] != 0) & (columns["policy_rejected_tail"] != 0))


@pytest.mark.parametrize("wanted", ALL_WANTED, ids=str)
def test_what_is_wanted_is_there_and_nothing_else(wanted: LogpColumns) -> None:
    pairs = masked_pairs(6)
    tokens = random_tokens(pairs)
    logps = pair_logps(tokens, PairBatch.of(pairs), pairs, wanted)
    assert tuple(logps.columns()) == wanted.names
    everything = pair_logps(tokens, PairBatch.of(pairs), pairs, EVERYTHING).columns()
    for name, values in logps.columns().items():
        assert torch.equal(values, everything[name]), name
    assert len(logps) == 6


def test_without_a_reference_none_is_asked_for() -> None:
    pairs = [replace(pair, reference=None) for pair in masked_pairs(4)]
    tokens = random_tokens(pairs)._replace(chosen_collision=None, rejected_collision=None)
    logps = pair_logps(tokens, PairBatch.of(pairs), pairs, LogpColumns(tails=True))
    assert logps.reference_chosen is None
    assert logps.reference_chosen_tail is None
    assert logps.policy_chosen_tail is not None
    with pytest.raises(AssertionError):
        pair_logps(tokens, PairBatch.of(pairs), pairs, LogpColumns(collision=True))


@pytest.mark.parametrize("poison", [math.nan, -math.inf])
def test_what_is_masked_reaches_neither_sums_nor_gradients(poison: float) -> None:
    pairs = masked_pairs(8)
    batch, clean = PairBatch.of(pairs), random_tokens(pairs)
    assert not batch.chosen_mask.all()
    leaf = torch.where(batch.chosen_mask, clean.chosen, poison).requires_grad_()
    logps = pair_logps(clean._replace(chosen=leaf), batch, pairs, EVERYTHING)
    expected = pair_logps(clean, batch, pairs, EVERYTHING)
    for name, values in logps.columns().items():
        assert torch.equal(values, expected.columns()[name]), name
    (gradient,) = torch.autograd.grad(logps.policy_chosen.sum(), [leaf])
    assert torch.equal(gradient, batch.chosen_mask.float())


def test_the_gradient_of_a_tail_goes_to_its_tokens_alone() -> None:
    pairs = masked_pairs(8)
    batch, tokens = PairBatch.of(pairs), random_tokens(pairs)
    leaf = tokens.rejected.clone().requires_grad_()
    tail = pair_logps(tokens._replace(rejected=leaf), batch, pairs, EVERYTHING).policy_rejected_tail
    assert tail is not None
    (gradient,) = torch.autograd.grad(tail.sum(), [leaf])
    shared = torch.tensor([min(pair.num_chosen_tokens, pair.num_rejected_tokens) for pair in pairs])
    assert torch.equal(gradient, tail_mask(batch.rejected_mask, batch.rejected_lengths, shared).float())
    assert 0 < gradient.sum() < batch.rejected_mask.sum()


def test_sums_are_made_in_float64() -> None:
    """In float32, 100,000 times 0.1 is off by more than a nat."""
    count = 100_000
    sums = segment_sums(torch.full((count,), -0.1), torch.ones(count, dtype=torch.bool), (count,))
    assert sums.dtype == torch.float64
    assert float(sums) == pytest.approx(count * float(torch.tensor(-0.1)), abs=1e-7)


# tails


def plain_tail_mask(mask: list[bool], lengths: Sequence[int], kept: Sequence[int]) -> list[bool]:
    tail = []
    start = 0
    for length, keep in zip(lengths, kept, strict=True):
        seen = 0
        for counts in mask[start : start + length]:
            seen += counts
            tail.append(counts and seen > keep)
        start += length
    return tail


@pytest.mark.parametrize("seed", range(20))
def test_the_tail_is_what_comes_after_the_first_tokens_that_count(seed: int) -> None:
    generator = np.random.default_rng(seed)
    lengths = tuple(int(length) for length in generator.integers(1, 9, size=generator.integers(1, 7)))
    mask = [bool(counts) for counts in generator.random(sum(lengths)) < 0.6]
    kept = [int(count) for count in generator.integers(0, 6, size=len(lengths))]
    found = tail_mask(torch.tensor(mask), lengths, torch.tensor(kept))
    assert found.tolist() == plain_tail_mask(mask, lengths, kept)


def test_a_tail_by_hand() -> None:
    """Segments of five tokens, of one and of two; of the first, one token that counts is kept."""
    mask = torch.tensor([True, False, True, True, False, False, True, False])
    tail = [False, False, True, True, False, False, True, False]
    assert tail_mask(mask, (5, 1, 2), torch.tensor([1, 0, 0])).tolist() == tail
    assert tail_mask(mask, (5, 1, 2), torch.tensor([3, 1, 1])).sum() == 0


# columns


def test_columns_of_each_kind() -> None:
    always = ("policy_chosen", "policy_rejected", "chosen_tokens", "rejected_tokens")
    extra = {
        "reference": {"reference_chosen", "reference_rejected"},
        "collision": {"policy_chosen_collision", "policy_rejected_collision"},
        "tails": {"policy_chosen_tail", "policy_rejected_tail"},
    }
    for wanted in ALL_WANTED:
        expected = set(always).union(*(names for kind, names in extra.items() if getattr(wanted, kind)))
        if wanted.reference and wanted.tails:
            expected |= {"reference_chosen_tail", "reference_rejected_tail"}
        assert set(wanted.names) == expected
        assert len(wanted.names) == len(expected)
    assert LogpColumns().names == always
    assert EVERYTHING.names == tuple(column.name for column in fields(PairLogps))


@pytest.mark.parametrize(
    ("needs", "has_reference", "expected"),
    [
        (set(), False, LogpColumns()),
        (set(), True, LogpColumns(reference=True)),
        ({Need.COLLISION, Need.WHOLE_BATCH}, False, LogpColumns(collision=True)),
        ({Need.REFERENCE, Need.TAILS}, True, LogpColumns(reference=True, tails=True)),
        (set(Need), True, EVERYTHING),
    ],
)
def test_what_losses_need_is_what_is_wanted(needs: set[Need], has_reference: bool, expected: LogpColumns) -> None:
    assert LogpColumns.by(needs, has_reference=has_reference) == expected


@pytest.mark.parametrize("wanted", ALL_WANTED, ids=str)
def test_a_matrix_and_back(wanted: LogpColumns) -> None:
    pairs = masked_pairs(5)
    tokens = random_tokens(pairs)._replace(chosen=random_tokens(pairs).chosen.requires_grad_())
    logps = pair_logps(tokens, PairBatch.of(pairs), pairs, wanted)
    assert logps.policy_chosen.requires_grad
    matrix = logps.matrix()
    assert matrix.shape == (5, len(wanted.names))
    assert matrix.dtype == torch.float64
    assert not matrix.requires_grad
    again = PairLogps.from_matrix(wanted, matrix)
    assert again.columns().keys() == logps.columns().keys()
    for name, values in again.columns().items():
        original: Tensor = logps.columns()[name]
        assert torch.equal(values, original.detach().double()), name
    for absent in {column.name for column in fields(PairLogps)} - set(wanted.names):
        assert getattr(again, absent) is None
    rows = PairLogps.from_matrix(wanted, matrix[[3, 1]])
    assert rows.policy_rejected.tolist() == logps.policy_rejected[[3, 1]].tolist()


def test_a_matrix_of_other_columns_is_an_error() -> None:
    pairs = masked_pairs(2)
    matrix = pair_logps(random_tokens(pairs), PairBatch.of(pairs), pairs, LogpColumns(reference=True)).matrix()
    wrong: Any = LogpColumns(reference=True, tails=True)
    with pytest.raises(ValueError, match="zip"):
        PairLogps.from_matrix(wrong, matrix)
