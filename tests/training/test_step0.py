"""The step-0 check sees a difference where there is one, and a direction in it, and no more pairs than it should."""

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpocli.cache.view import PairView
from dpocli.data.batch import PairBatch
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.distributed.processes import Processes
from dpocli.errors import NumericsError
from dpocli.objective.logps import PairLogps
from dpocli.scoring.scorer import PairScorer
from dpocli.training import step0
from tests.support.pairs import random_pairs
from tests.support.tiny_models import build

ALONE = Processes(0, 1, torch.device("cpu"))


class StoreInMemory:
    """What a view asks of a store."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        self.pairs = pairs
        self.pair_lengths = np.array([pair.num_tokens_longer for pair in pairs])
        prompts, chosen, rejected = (
            np.array(counts) for counts in zip(*(map(len, pair.all_ids) for pair in pairs), strict=True)
        )
        self.columns = SimpleNamespace(prompt_tokens=prompts, chosen_tokens=chosen, rejected_tokens=rejected)

    def load(self, indices: Sequence[int]) -> list[EncodedPair]:
        return [self.pairs[index] for index in indices]


def view_of(scorer: PairScorer, pairs: Sequence[EncodedPair], shift: float = 0.0, noise: float = 0.0) -> PairView:
    """The pairs with what the scorer gives them, moved and shaken."""
    generator = np.random.default_rng(0)

    def moved(values: torch.Tensor) -> np.ndarray:
        shaken = values.numpy() + shift + noise * generator.choice([-1.0, 1.0], len(values))
        return shaken.astype(np.float32)

    scored = []
    with torch.no_grad():
        for pair in pairs:
            tokens = scorer(PairBatch.of([pair]))
            scored.append(replace(pair, reference=ReferenceLogps(moved(tokens.chosen), moved(tokens.rejected))))
    return PairView(StoreInMemory(scored), np.arange(len(pairs)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shift", "noise", "holds"),
    [(0.0, 0.0, True), (0.0, 0.07, True), (0.0, 0.09, False), (0.03, 0.0, False), (-0.03, 0.0, False)],
    ids=["equal", "noise", "too much noise", "a direction", "the other direction"],
)
def test_noise_is_allowed_and_a_direction_is_not(shift: float, noise: float, holds: bool) -> None:
    scorer = PairScorer(build("llama-tied"))
    view = view_of(scorer, random_pairs(60, longest=40), shift, noise)
    found = step0.measure(scorer, view, step0.chosen_positions(view, 0), tolerance=0.08, processes=ALONE)
    assert found.holds is holds
    assert found.mean == pytest.approx(max(abs(shift), noise), abs=1e-5)
    if shift:
        assert found.signed_mean == pytest.approx(-shift, abs=1e-5)


def test_the_worst_pair_is_named() -> None:
    scorer = PairScorer(build("llama-tied"))
    view = view_of(scorer, random_pairs(20))
    bad = view.store.pairs[7]  # type: ignore[attr-defined]
    bad.reference.rejected[:] += 1.0
    found = step0.measure(scorer, view, step0.chosen_positions(view, 0), tolerance=1e-4, processes=ALONE)
    assert (found.worst_row, found.holds) == (7, False)


def test_the_longest_pairs_are_always_among_those_drawn() -> None:
    scorer = PairScorer(build("llama-tied"))
    view = view_of(scorer, random_pairs(200, longest=40))
    for seed in range(5):
        positions = step0.chosen_positions(view, seed)
        assert 32 <= len(positions) <= 36
        assert set(np.argsort(-view.lengths, kind="stable")[:4]) <= set(positions)
    assert not np.array_equal(step0.chosen_positions(view, 0), step0.chosen_positions(view, 1))


def first_batch(off: float, *, binding: bool = True, **given: bool) -> None:
    """Check a batch of which the last chosen answer is off by some nats per token."""
    pairs = random_pairs(3, longest=30)
    lengths = torch.tensor([len(pair.chosen_ids) for pair in pairs]).double()
    zeros = torch.zeros(3, dtype=torch.float64)
    policy = zeros.clone()
    policy[2] = off * lengths[2]
    setup = SimpleNamespace(
        options=SimpleNamespace(policy=SimpleNamespace(model_dropout=given.get("model_dropout", False))),
        policy=SimpleNamespace(files=None),
        training=SimpleNamespace(describe_rows=lambda positions: f"rows {positions.tolist()}"),
    )
    found = step0.Step0(0.0, 0.0, 0, 0.0, 3, 1e-4, is_binding=binding)
    check = step0.first_batch_check(setup, found)
    if check:
        check(PairLogps(policy, zeros, zeros, zeros, lengths, lengths), np.array([5, 6, 7]))


def test_the_first_batch_must_be_the_reference() -> None:
    first_batch(1e-5)
    with pytest.raises(NumericsError, match=r"Step 1: the chosen answer of rows \[7\] .* before the first update"):
        first_batch(0.01)
    with pytest.raises(NumericsError):
        first_batch(float("nan"))


def test_the_first_batch_may_differ_where_the_policy_is_another_model_or_has_dropout() -> None:
    first_batch(1.0, binding=False)
    first_batch(1.0, model_dropout=True)
