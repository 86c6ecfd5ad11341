"""The token budget is settled before step 1: no pass beyond the limit is tried, and nothing of the rehearsal is left."""

from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Console
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes, init_processes
from dpocli.errors import ExitCode, ResourceError, UsageError
from dpocli.run.status import Status, new_status
from dpocli.scoring.passes import size_of_pass
from dpocli.scoring.scorer import PairScorer
from dpocli.training import rehearsal
from dpocli.training.optimizers import make_optimizer
from dpocli.training.policy import Policy
from dpocli.training.schedule import Schedule
from dpocli.training.token_budget import OUT_OF_MEMORY, available_memory, choose_token_budget
from dpocli.training.trainer import TrainSetup
from tests.pairs import random_pairs
from tests.tiny_models import build

BASE = 500 * 2**20


class View:
    """Pairs in memory, with the interface of a `PairView`."""

    def __init__(self, pairs: Sequence[EncodedPair]) -> None:
        self.pairs = pairs

    def __len__(self) -> int:
        return len(self.pairs)

    def sizes(self, layout: Layout) -> NDArray[np.int64]:
        return np.array([layout.size(*map(len, pair.all_ids)) for pair in self.pairs])

    def load(self, positions: NDArray[np.int64]) -> list[EncodedPair]:
        return [self.pairs[int(position)] for position in positions]


class ModelledMemory:
    """A device on which a pass takes a base, and bytes per token and per scored token. It records every pass."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, policy: Policy, total: int, per_token: int, per_scored: int):
        self.total, self.per_token, self.per_scored = total, per_token, per_scored
        self.policy = policy
        self.passes: list[int] = []
        """Bytes of each pass that was tried."""
        self._current = 0
        plain = rehearsal.score

        def score(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> Any:
            tokens = size_of_pass(scorer.packing.layout, pairs)
            scored = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
            self._current = BASE + per_token * tokens + per_scored * scored
            self.passes.append(self._current)
            return plain(scorer, pairs)

        monkeypatch.setattr(rehearsal, "score", score)

    def limit(self) -> int:
        return self.total

    def peak(self, work: Callable[[], None]) -> int:
        self._current = BASE
        work()
        return self._current


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    with init_processes(torch.device("cpu"), even_alone=True) as processes:
        yield processes


def setup_of(alone: Processes, pairs: Sequence[EncodedPair], held_out: Any = None, **given: object) -> TrainSetup:
    options = build_options(TrainOptions, **{"model": "m", "out": "o", "reference": "r", "learning_rate": 1e-4} | given)
    policy = Policy(PairScorer(build("llama-tied")), options, torch.float32, alone)
    schedule = Schedule.plan(options.optimizer, len(pairs), 1, options.seed)
    optimizer = make_optimizer(policy, options.optimizer)
    view: Any = View(pairs)
    return TrainSetup(policy, optimizer, view, held_out, schedule, LossChoice.of("dpo"), options)


@pytest.mark.parametrize("per_token", [20_000, 300_000, 3_000_000])
@pytest.mark.parametrize("per_scored", [0, 200_000])
def test_no_pass_beyond_the_limit_is_tried_and_the_largest_that_fits_is_found(
    per_token: int, per_scored: int, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    pairs = random_pairs(400, longest=60)
    total = 1500 * 2**20
    setup = setup_of(alone, pairs, batch_size=400)
    memory = ModelledMemory(monkeypatch, setup.policy, total, per_token, per_scored)
    choose_token_budget(setup, None, memory, Console())
    assert max(memory.passes) <= total
    budget = setup.policy.scorer.packing.token_budget
    everything = sum(View(pairs).sizes(setup.policy.scorer.packing.layout))
    room = (total - BASE) / (per_token + per_scored)
    assert min(0.8 * room - 256, everything) <= budget
    assert all(weight.grad is None or not weight.grad.any() for _, weight in setup.policy.master_weights)


def test_the_rehearsal_changes_no_weight_and_no_moment(alone: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = setup_of(alone, random_pairs(20, longest=30))
    before = {name: weight.detach().clone() for name, weight in setup.policy.master_weights}
    memory = ModelledMemory(monkeypatch, setup.policy, 10 * BASE, 1_000, 0)
    choose_token_budget(setup, None, memory, Console())
    for name, weight in setup.policy.master_weights:
        assert torch.equal(weight.detach(), before[name]), name
    for state in setup.optimizer.state.values():
        for key, value in state.items():
            assert not torch.as_tensor(value).any(), key


def test_a_pair_that_does_not_fit_is_named(alone: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = random_pairs(20, longest=60)
    setup = setup_of(alone, pairs)
    memory = ModelledMemory(monkeypatch, setup.policy, BASE + 40 * 2**20, 3_000_000, 0)
    with pytest.raises(ResourceError, match=r"pair of source row \d+ does not fit .* --gradient-checkpointing"):
        choose_token_budget(setup, None, memory, Console())
    assert max(memory.passes) <= memory.total


def test_a_budget_that_does_not_fit_is_refused_with_one_that_does(
    alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    setup = setup_of(alone, random_pairs(400, longest=60), token_budget=20_000, batch_size=400)
    memory = ModelledMemory(monkeypatch, setup.policy, 1500 * 2**20, 300_000, 0)
    with pytest.raises(
        UsageError, match=r"--token-budget 20000 does not fit into memory: (\d+) is the largest that does"
    ) as error:
        choose_token_budget(setup, None, memory, Console())
    assert 0 < int(str(error.value).split(": ")[1].split()[0]) * 300_000 <= 1000 * 2**20
    assert max(memory.passes) <= memory.total


def test_held_out_passes_count(alone: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    held_out = View(random_pairs(3, longest=250))
    setup = setup_of(alone, random_pairs(20, longest=10), held_out)
    memory = ModelledMemory(monkeypatch, setup.policy, 4000 * 2**20, 10_000, 0)
    choose_token_budget(setup, None, memory, Console())
    longest = max(held_out.sizes(setup.policy.scorer.packing.layout))
    assert max(memory.passes) >= BASE + 10_000 * longest


def after_a_shortage(budget: int, message: str = f"{OUT_OF_MEMORY} 512 tokens") -> Status:
    status = new_status("train")
    return SimpleNamespace(  # type: ignore[return-value]
        **{name: getattr(status, name) for name in status.__dataclass_fields__}
        | {"state": "failed", "exit_code": int(ExitCode.RESOURCES), "message": message, "token_budget": budget}
    )


def test_after_a_shortage_the_next_start_takes_half(alone: Processes) -> None:
    setup = setup_of(alone, random_pairs(20, longest=30))
    choose_token_budget(setup, after_a_shortage(512), None, Console())
    assert setup.policy.scorer.packing.token_budget == 256


def test_a_full_disk_is_no_shortage_of_memory(alone: Processes) -> None:
    setup = setup_of(alone, random_pairs(20, longest=30))
    choose_token_budget(setup, after_a_shortage(512, "No space left on device"), None, Console())
    assert setup.policy.scorer.packing.token_budget == 512, "the passes of before, and so the same rounding"


def test_a_smaller_budget_on_the_command_line_is_taken_as_it_is(alone: Processes) -> None:
    setup = setup_of(alone, random_pairs(20, longest=30), token_budget=300)
    choose_token_budget(setup, after_a_shortage(512), None, Console())
    assert setup.policy.scorer.packing.token_budget == 300


def test_the_limit_of_the_control_group_counts(tmp_path: Any) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:    8000 kB\n")
    assert available_memory(tmp_path) == 8000 * 1024
    group = tmp_path / "sys/fs/cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text("5000000\n")
    (group / "memory.current").write_text("3000000\n")
    (group / "memory.stat").write_text("anon 1\nfile 1000000\n")
    assert available_memory(tmp_path) == 3_000_000
    (group / "memory.max").write_text("max\n")
    assert available_memory(tmp_path) == 8000 * 1024
