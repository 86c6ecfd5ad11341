"""Intervals hold the truth as often as they say, and know which pairs belong together."""

import numpy as np
import pytest

from dpocli.evaluation import bootstrap
from dpocli.evaluation.bootstrap import DIFFERENCE_OF_SHARES, Clusters, mean_interval, share_interval


def alone(count: int) -> Clusters:
    return Clusters.of(np.arange(count))


def coverage(holds: list[bool]) -> float:
    return sum(holds) / len(holds)


def test_an_interval_of_a_share_holds_the_truth_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(1)
    holds = []
    for seed in range(400):
        low, high = share_interval(generator.random(150) < 0.7, alone(150), seed=seed)
        holds.append(low <= 0.7 <= high)
    assert 0.90 <= coverage(holds) <= 0.985


def test_an_interval_of_a_mean_holds_the_truth_in_95_of_100_cases() -> None:
    generator = np.random.default_rng(2)
    holds = []
    for seed in range(300):
        low, high = mean_interval(generator.normal(3.0, 2.0, 100), alone(100), resamples=400, seed=seed)
        holds.append(low <= 3.0 <= high)
    assert 0.90 <= coverage(holds) <= 0.985


def test_where_prompts_repeat_only_the_bootstrap_over_prompts_holds_the_truth() -> None:
    """Prompts are easy or hard: 5 pairs of one have nearly the same outcome."""
    generator = np.random.default_rng(3)
    prompts = np.repeat(np.arange(60), 5)
    clustered, naive = [], []
    for seed in range(200):
        ease = np.where(generator.random(60) < 0.6, 0.95, 0.05)  # the mean is 0.59
        right = generator.random(300) < np.repeat(ease, 5)
        for found, clusters in ((clustered, Clusters.of(prompts)), (naive, alone(300))):
            low, high = share_interval(right, clusters, resamples=400, seed=seed)
            found.append(low <= 0.59 <= high)
    assert coverage(clustered) >= 0.89
    assert coverage(naive) <= 0.80


def test_it_is_wider_over_prompts_than_over_pairs() -> None:
    prompts = np.repeat(np.arange(50), 4)
    right = np.repeat(np.arange(50) % 2 == 0, 4)
    wide, narrow = (share_interval(right, clusters) for clusters in (Clusters.of(prompts), alone(200)))
    # Four equal pairs tell as much as one: √4 times as wide.
    assert wide[1] - wide[0] == pytest.approx(2 * (narrow[1] - narrow[0]), rel=0.15)
    assert Clusters.of(prompts).describe()["method"] == "bootstrap over prompts"
    assert alone(3).describe()["method"] == "bootstrap over pairs"


@pytest.mark.parametrize("repeat", [1, 3])
def test_drawing_kinds_and_drawing_clusters_agree(repeat: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(4)
    clusters = Clusters.of(np.arange(600) // repeat)
    right = generator.random(600) < 0.6
    by_kind = mean_interval(right, clusters, resamples=4000)
    monkeypatch.setattr(bootstrap, "FEW_KINDS", 1000)
    monkeypatch.setattr(bootstrap, "NUMBERS_AT_ONCE", 10_000)
    assert mean_interval(right, clusters, resamples=4000) == pytest.approx(by_kind, abs=0.006)


def test_both_ends_are_where_theory_has_them() -> None:
    values = np.random.default_rng(6).normal(size=400)
    low, high = mean_interval(values, alone(400), resamples=20_000)
    error = values.std() / np.sqrt(400)
    assert (low - values.mean()) / error == pytest.approx(-1.96, abs=0.08)
    assert (high - values.mean()) / error == pytest.approx(1.96, abs=0.08)


def test_the_interval_is_the_same_every_time_and_whatever_the_prompts_are_called() -> None:
    generator = np.random.default_rng(5)
    values, prompts = generator.normal(size=90), np.sort(generator.integers(0, 40, 90))
    first = mean_interval(values, Clusters.of(prompts))
    assert mean_interval(values, Clusters.of(prompts)) == first
    assert mean_interval(values, Clusters.of(prompts.astype(np.uint64) + np.uint64(2**63))) == first
    assert mean_interval(values, Clusters.of(prompts), seed=1) != first


def test_a_handful_of_pairs_that_are_all_right_proves_little() -> None:
    """Clopper and Pearson: of 3 out of 3 the lower bound is 0.025^(1/3)."""
    assert share_interval(np.ones(3, bool), alone(3)) == (pytest.approx(0.2924, abs=1e-4), 1.0)
    assert share_interval(np.zeros(3, bool), alone(3)) == (0.0, pytest.approx(0.7076, abs=1e-4))
    repeated = Clusters.of(np.array([7, 7, 7, 9]))
    assert share_interval(np.ones(4, bool), repeated) == (pytest.approx(0.025**0.5), 1.0)


def test_prompts_that_are_all_alike_prove_little() -> None:
    """So large a share may lie at either end of the range and not have been drawn."""
    unseen = 1 - 0.025 ** (1 / 10)
    assert mean_interval(np.zeros(10), alone(10), DIFFERENCE_OF_SHARES) == pytest.approx((-unseen, unseen))
    one = Clusters.of(np.zeros(10))
    low, high = share_interval(np.arange(10) < 7, one)
    assert (low, high) == pytest.approx((0.7 - 0.975 * 0.7, 0.7 + 0.975 * 0.3))


def test_of_one_prompt_a_value_without_bounds_says_nothing() -> None:
    assert mean_interval(np.array([1.0, 2.0]), Clusters.of(np.zeros(2))) is None
    assert mean_interval(np.full(5, 0.5), alone(5)) == (0.5, 0.5)


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_few_prompts_hold_the_truth_as_often_as_many(count: int) -> None:
    generator = np.random.default_rng(count)
    holds = []
    for seed in range(300):
        low, high = mean_interval(generator.normal(3.0, 2.0, count), alone(count), resamples=400, seed=seed) or (0, 0)
        holds.append(low <= 3.0 <= high)
    assert 0.90 <= coverage(holds) <= 0.985


def test_one_pair_that_differs_makes_nobody_surer() -> None:
    """Clopper and Pearson: of 39 out of 40 the lower bound is 0.8684, and of 40 out of 40 it is 0.9119."""
    lows = [share_interval(np.arange(40) >= wrong, alone(40))[0] for wrong in (0, 1, 2, 3)]
    assert lows[:2] == pytest.approx([0.9119, 0.8684], abs=1e-4)
    assert lows == sorted(lows, reverse=True)
    highs = [share_interval(np.arange(40) < right, alone(40))[1] for right in (0, 1, 2, 3)]
    assert highs == pytest.approx([1 - low for low in lows])


@pytest.mark.parametrize(
    ("up", "down", "tells"), [(4, 0, False), (6, 0, True), (7, 1, False), (9, 2, False), (10, 1, True)]
)
def test_a_few_pairs_that_differ_are_judged_by_the_sign_test(up: int, down: int, tells: bool) -> None:
    """Exact two-sided p: 4:0 0.125, 6:0 0.031, 7:1 0.070, 9:2 0.065, 10:1 0.012."""
    change = np.r_[np.ones(up), -np.ones(down), np.zeros(120 - up - down)]
    low, high = mean_interval(change, alone(120), DIFFERENCE_OF_SHARES) or (0, 0)
    assert (low > 0) == tells
    assert low < change.mean() < high


@pytest.mark.parametrize(("rare", "count"), [(0.05, 10), (0.05, 30), (0.02, 100)])
def test_a_rare_difference_is_not_ruled_out_by_a_sample_without_one(rare: float, count: int) -> None:
    generator = np.random.default_rng(count)
    holds = []
    for seed in range(300):
        change = (generator.random(count) < rare).astype(np.float64)
        low, high = mean_interval(change, alone(count), DIFFERENCE_OF_SHARES, resamples=400, seed=seed) or (1, 1)
        holds.append(low <= rare <= high)
    assert coverage(holds) >= 0.93


def test_a_million_pairs_are_feasible(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces are bounded: 8 MB of draws at a time, whatever the number of resamples."""
    shapes = []
    drawn = np.random.default_rng(0)

    class Counting:
        def integers(self, count: int, size: tuple[int, int], dtype: type) -> np.ndarray:
            shapes.append(size)
            return drawn.integers(count, size=size, dtype=dtype)

    monkeypatch.setattr(bootstrap.np.random, "default_rng", lambda seed: Counting())
    low, high = mean_interval(drawn.normal(size=300_000), alone(300_000), resamples=7)
    assert low < high
    assert [size[0] for size in shapes] == [3, 3, 1]
