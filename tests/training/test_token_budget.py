"""The token budget that is measured: what fits by the difference of two passes, and nothing left behind by them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes, init_processes
from dpocli.scoring.scorer import PairScorer
from dpocli.training import token_budget
from dpocli.training.policy import Policy
from dpocli.training.token_budget import MOST_TOKENS, PROBED_TOKENS, SHARE, STEP, Device, fitting, set_token_budget
from tests.support.pairs import random_pairs
from tests.support.tiny_models import build

BASE, PER_TOKEN = 50_000_000, 2_000
BEFORE = 1_000


class View:
    """Pairs in memory, as a `PairView` gives them."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def sizes(self, layout: Layout) -> NDArray[np.int64]:
        return np.array([layout.size(*map(len, pair.all_ids)) for pair in self.pairs])

    def load(self, positions: NDArray[np.int64]) -> list[EncodedPair]:
        return [self.pairs[int(position)] for position in positions]


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    with init_processes(torch.device("cpu"), even_alone=True) as processes:
        yield processes


@pytest.fixture
def policy(alone: Processes) -> Policy:
    scorer = PairScorer(build("llama-tied"), token_budget=BEFORE)
    policy = Policy(scorer, options(), torch.float32, alone)
    policy.scorer.lay_out(Layout.SHARED)
    return policy


def options(**given: object) -> TrainOptions:
    return build_options(TrainOptions, **{"model": "m", "out": "o", "reference": "r"} | given)


def device_that_takes(policy: Policy, total: int, limit: int = 10**9) -> tuple[Device, list[int]]:
    """A device on which a token takes `PER_TOKEN` bytes; and the sizes of the passes that it sees."""
    sizes: list[int] = []

    def look(_: object, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        sizes.append(options["input_ids"].numel())
        if sizes[-1] > limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    def peak(work: Callable[[], None]) -> int:
        work()
        return BASE + PER_TOKEN * sizes[-1]

    decoder: Any = policy.scorer.model.get_decoder()
    decoder.register_forward_pre_hook(look, with_kwargs=True)
    return Device(total, peak), sizes


@pytest.mark.parametrize(
    ("memory", "expected"),
    [
        (200_000_000, int((SHARE * 2e8 - 1e8 - BASE) / PER_TOKEN) // STEP * STEP),
        (10**13, MOST_TOKENS),
        (1_000, PROBED_TOKENS[0]),
    ],
)
def test_what_fits_is_a_straight_line(memory: int, expected: int) -> None:
    small, large = ((tokens, BASE + PER_TOKEN * tokens) for tokens in (2_000, 6_500))
    assert fitting(small, large, memory, still_to_come=1e8) == expected


def test_a_token_that_takes_nothing_is_no_reason_for_passes_without_end() -> None:
    assert fitting((2_048, 10**9), (6_144, 10**9), 10**10, 0.0) == MOST_TOKENS


def test_the_budget_is_measured_on_pairs_of_the_data(policy: Policy) -> None:
    view = View(random_pairs(7))
    device, sizes = device_that_takes(policy, total=100_000_000)
    before = policy.weights()
    set_token_budget(policy, view, options(), device)  # type: ignore[arg-type]
    budget = policy.scorer.packing.token_budget
    states = policy.num_parameters() * 8
    assert budget == int((SHARE * 1e8 - states - BASE) / PER_TOKEN) // STEP * STEP
    longest = int(view.sizes(Layout.SHARED).max())
    assert [tokens <= size < tokens + longest for tokens, size in zip((2048, *PROBED_TOKENS), sizes, strict=True)]
    assert all(parameter.grad is None for _, parameter in policy.master_weights)
    after = policy.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("at_hand", [True, False])
def test_what_is_given_stays(at_hand: bool, policy: Policy) -> None:
    """And so does the budget of a CPU, on which nothing is measured."""
    device, sizes = device_that_takes(policy, total=10**9)
    given = options(token_budget=500) if at_hand else options()
    set_token_budget(policy, View(random_pairs(3)), given, device if at_hand else Device.of(torch.device("cpu")))  # type: ignore[arg-type]
    assert policy.scorer.packing.token_budget == BEFORE
    assert sizes == []


def test_a_probe_that_does_not_fit_leaves_the_smallest_budget(policy: Policy) -> None:
    pairs = random_pairs(7)
    device, sizes = device_that_takes(policy, total=10**9, limit=3_000)
    set_token_budget(policy, View(pairs), options(), device)  # type: ignore[arg-type]
    assert policy.scorer.packing.token_budget == PROBED_TOKENS[0]
    assert sizes[-1] > 3_000
    policy.outer_gradient(token_budget.score(policy.scorer, pairs)[1].chosen.sum())  # it can go on


def test_several_processes_take_the_smallest(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    device, _ = device_that_takes(policy, total=100_000_000)
    monkeypatch.setattr(Processes, "gather", lambda _, items: [*items, 3_328])
    set_token_budget(policy, View(random_pairs(7)), options(), device)  # type: ignore[arg-type]
    assert policy.scorer.packing.token_budget == 3_328
