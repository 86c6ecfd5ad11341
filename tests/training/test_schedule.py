"""Which pairs make up each step: a permutation, a function of the seed and the epoch alone."""

import itertools

import numpy as np
import pytest
import torch
from transformers import get_scheduler

from dpocli.config.training_options import OptimizerOptions
from dpocli.errors import DataError, UsageError
from dpocli.training.schedule import Schedule, default_batch_size, learning_rates


def options(**given: object) -> OptimizerOptions:
    return OptimizerOptions.model_validate(given)


def plan(num_pairs: int, num_processes: int = 1, seed: int = 0, **given: object) -> Schedule:
    return Schedule.plan(options(**given), num_pairs, num_processes, seed)


def test_an_epoch_is_every_pair_once_and_the_last_batch_may_be_smaller() -> None:
    schedule = plan(27, seed=3, batch_size=8, epochs=2)
    assert schedule.num_steps == 8
    epochs = [[schedule.batch(step) for step in range(start, start + 4)] for start in (1, 5)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == [8, 8, 8, 3]
        assert sorted(np.concatenate(epoch)) == list(range(27))
    assert not np.array_equal(np.concatenate(epochs[0]), np.concatenate(epochs[1]))


def test_a_batch_is_the_callers_own() -> None:
    schedule = plan(27, batch_size=8)
    expected = schedule.batch(1).tolist()
    schedule.batch(1)[:] = 0
    assert schedule.batch(1).tolist() == expected


def test_the_order_does_not_depend_on_the_number_of_processes() -> None:
    one, two = (plan(50, count, batch_size=8) for count in (1, 2))
    assert all(np.array_equal(one.batch(step), two.batch(step)) for step in range(1, one.num_steps + 1))


def test_another_seed_is_another_order() -> None:
    orders = [plan(50, seed=seed, batch_size=50).batch(1).tolist() for seed in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]


def test_the_default_batch_is_at_most_a_tenth_of_the_pairs() -> None:
    assert [default_batch_size(pairs) for pairs in (3, 48, 400, 100_000)] == [1, 4, 40, 128]


def test_max_steps_sets_the_length() -> None:
    assert plan(1000, batch_size=8, max_steps=5).num_steps == 5


def test_fewer_pairs_a_step_than_processes_is_an_error() -> None:
    with pytest.raises(UsageError, match="--batch-size 2: fewer pairs a step than the 4 processes"):
        plan(100, 4, batch_size=2)
    with pytest.raises(DataError, match="no pair to train on"):
        plan(0)


def test_no_batch_is_wasted_on_a_learning_rate_of_zero() -> None:
    rate = learning_rates(options(learning_rate=1.0, warmup_ratio=0.2), num_steps=10)
    rates = [rate(step) for step in range(1, 11)]
    assert rates[:2] == [0.5, 1.0]
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[1:]))
    constant = learning_rates(options(learning_rate=0.5, warmup_ratio=0, lr_schedule="constant"), 4)
    assert {constant(step) for step in range(1, 5)} == {0.5}


@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_rates_are_those_of_transformers(schedule: str) -> None:
    """To the last bit, at every step, where the warm-up ends before the run and where it does not."""
    name = "constant_with_warmup" if schedule == "constant" else schedule
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(()))], lr=1.0)
    for warmup, num_steps in itertools.product((0, 1, 3, 10, 11, 30), (1, 10)):
        theirs = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=num_steps + 1)
        rate = learning_rates(options(learning_rate=5e-7, warmup_steps=warmup, lr_schedule=schedule), num_steps)
        expected = [5e-7 * float(theirs.lr_lambdas[0](step)) for step in range(1, num_steps + 1)]
        assert [rate(step) for step in range(1, num_steps + 1)] == expected


def test_warm_up_may_be_counted_in_steps() -> None:
    """As the original DPO code does it: up to the peak, and there it stays."""
    given = options(learning_rate=1.0, warmup_steps=4, lr_schedule="constant")
    rates = [learning_rates(given, num_steps=8)(step) for step in range(1, 9)]
    assert rates == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    short = learning_rates(given, num_steps=2)
    assert [short(step) for step in (1, 2)] == [0.25, 0.5], "a run that ends within its warm-up"
    assert learning_rates(options(learning_rate=1.0, warmup_steps=0, lr_schedule="constant"), 8)(1) == 1
