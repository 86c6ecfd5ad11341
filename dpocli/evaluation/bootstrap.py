"""Confidence intervals of means over pairs, from resampled prompts; the same values give the same interval.

Pairs of one prompt resemble each other, so prompts are resampled and not pairs (the cluster bootstrap: Cameron, Gelbach and
Miller 2008, "Bootstrap-based improvements for inference with clustered errors"). Intervals are percentiles (Efron 1979),
which are too narrow for few prompts. They are widened about the mean by the ratio of Student's t to the normal
distribution, and by √(n / (n - 1)), since a resample of n varies too little (Hesterberg 2015, "What teachers should know
about the bootstrap", section 3.2, there by other percentiles).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from math import exp, lgamma, log, log1p
from statistics import NormalDist
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95

RESAMPLES = 1000

SEED = 0x5EED

NUMBERS_AT_ONCE = 1 << 20
"""Random numbers drawn in one piece, which bounds the memory."""

FEW_DIFFER = 30
"""Prompts that differ from all others, below which exact bounds hold beside the resamples."""

FEW_KINDS = 16
"""Clusters per distinct cluster, from which on it is cheaper to draw counts of each kind than clusters."""

Interval = tuple[float, float]

SHARE, DIFFERENCE_OF_SHARES = (0.0, 1.0), (-1.0, 1.0)


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which pairs are resampled together: pairs of one prompt."""

    codes: NDArray[np.int64]
    """Number of the cluster of each pair, shape (pairs,)."""
    count: int

    @classmethod
    def of(cls, prompt_hashes: NDArray[Any]) -> "Clusters":
        """Pairs with equal values are of one prompt. Shape of the argument: (pairs,)."""
        distinct, codes = np.unique(prompt_hashes, return_inverse=True)
        return cls(codes.reshape(-1), len(distinct))

    @property
    def repeat(self) -> bool:
        """Whether a prompt has several pairs."""
        return self.count < len(self.codes)

    def where(self, chosen: NDArray[np.bool_] | NDArray[np.int64]) -> "Clusters":
        """The clusters of some of the pairs, by mask or by position."""
        return Clusters.of(self.codes[chosen])

    def describe(self) -> dict[str, Any]:
        """How intervals are made, for `metrics.json`."""
        method = "bootstrap over prompts" if self.repeat else "bootstrap over pairs"
        return {"level": LEVEL, "method": method, "resamples": RESAMPLES}


def mean_interval(
    values: NDArray[Any],
    clusters: Clusters,
    within: Interval | None = None,
    *,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Interval | None:
    """The 95% interval of the mean over all pairs like these.

    Where all prompts are alike, every resample is like the sample, and the bootstrap would be certain after a handful of
    pairs. Values with bounds then have the exact binomial bound over prompts (Clopper and Pearson 1934): the largest share
    of prompts that may lie at the end of the range without having been drawn.

    Args:
        values: of each pair, shape (pairs,), finite.
        clusters: of the pairs.
        within: the range of values, `SHARE` or `DIFFERENCE_OF_SHARES`; None: without bounds.
        resamples: number of resamples, each with replacement.
        seed: of the draws.

    Returns:
        Its ends; None for values without bounds of a single prompt.
    """
    sums = np.bincount(clusters.codes, weights=values, minlength=clusters.count).astype(np.float64, copy=False)
    sizes = np.bincount(clusters.codes, minlength=clusters.count).astype(np.float64)
    mean = float(sums.sum() / sizes.sum())
    each = sums / sizes
    if each.min() == each.max() and within:
        unseen = 1 - ((1 - LEVEL) / 2) ** (1 / clusters.count)
        return mean - unseen * (mean - within[0]), mean + unseen * (within[1] - mean)
    if clusters.count == 1:
        return None
    generator = np.random.default_rng(seed)
    # Of a cluster only its sum and its size matter. Where pairs are right or wrong, few of them are distinct.
    kinds, counts = np.unique(sums + 1j * sizes, return_counts=True)
    if len(kinds) * FEW_KINDS <= clusters.count or len(kinds) == 1:
        draws = generator.multinomial(clusters.count, counts / clusters.count, size=resamples)
        means = (draws @ kinds.real) / (draws @ kinds.imag)
    else:
        means = _means_of_drawn(sums, sizes if clusters.repeat else None, generator, resamples)
    ends = mean + _widening(clusters.count) * (np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2)) - mean)
    if within:
        ends = np.clip(ends, *within)
        for low, high in _exact_where_few_differ(each, within):
            ends = np.array([min(ends[0], low), max(ends[1], high)])
    return float(ends[0]), float(ends[1])


def share_interval(
    right: NDArray[Any], clusters: Clusters, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The 95% interval of a share of pairs. `right`: between 0 and 1, shape (pairs,)."""
    found = mean_interval(right, clusters, SHARE, resamples=resamples, seed=seed)
    assert found
    return found


def _exact_where_few_differ(each: NDArray[np.float64], within: Interval) -> Iterator[Interval]:
    """Intervals that the bootstrap's must contain where all but a few prompts are alike: resamples then take few values,
    and the bootstrap would be more certain of 39 out of 40 than of 40.

    The bound is the exact binomial one on the share of prompts that differ, times their mean distance. Of differences,
    which are alike at 0, it is the bound on the share that goes up (the sign test).

    Args:
        each: means of prompts, shape (prompts,).
        within: the range of values.
    """
    count, (least, most) = len(each), within
    if least < 0 < most:
        up, down = each[each > 0], each[each < 0]
        moved = len(up) + len(down)
        if 0 < moved < FEW_DIFFER:
            size = float(np.abs(each).sum()) / count
            fewest, largest = 1 - _largest_share(len(down), moved), _largest_share(len(up), moved)
            yield size * (2 * fewest - 1), size * (2 * largest - 1)
        return
    for end in within:
        other = each[each != end]
        if 0 < len(other) < FEW_DIFFER:
            reach = end + _largest_share(len(other), count) * float((other - end).mean())
            yield (reach, reach)


def _largest_share(found: int, count: int) -> float:
    """The upper end of the interval of Clopper and Pearson (1934) for `found` of `count`."""
    if found == count:
        return 1.0
    low, high = found / count, 1.0
    ways = [lgamma(count + 1) - lgamma(k + 1) - lgamma(count - k + 1) for k in range(found + 1)]
    for _ in range(60):
        share = (low + high) / 2
        chance = sum(exp(way + k * log(share) + (count - k) * log1p(-share)) for k, way in enumerate(ways))
        low, high = (share, high) if chance > (1 - LEVEL) / 2 else (low, share)
    return (low + high) / 2


def _widening(count: int) -> float:
    """Ratio of an interval of `count` clusters to its percentiles: t / z * sqrt(n / (n - 1))."""
    z = NormalDist().inv_cdf((1 + LEVEL) / 2)
    return _student_t(count - 1) / z * float(np.sqrt(count / (count - 1)))


def _student_t(freedom: int) -> float:
    """Student's t at the upper end of the interval, to 1%: in closed form for 1 and 2 degrees of freedom, else by the
    expansion of Cornish and Fisher (Abramowitz and Stegun 1964, 26.7.5)."""
    p = (1 + LEVEL) / 2
    if freedom == 1:
        return float(np.tan(np.pi * (p - 0.5)))
    if freedom == 2:
        return float((2 * p - 1) / np.sqrt(2 * p * (1 - p)))
    z = NormalDist().inv_cdf(p)
    terms = ((z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384)
    return float(z + sum(term / freedom**power for power, term in enumerate(terms, start=1)))


def _means_of_drawn(
    sums: NDArray[np.float64], sizes: NDArray[np.float64] | None, generator: np.random.Generator, resamples: int
) -> NDArray[np.float64]:
    """Means over clusters drawn one by one, in pieces of bounded size. `sizes`: None where all are 1. Shape (resamples,)."""
    count = len(sums)
    at_once = max(1, NUMBERS_AT_ONCE // count)
    means = []
    for start in range(0, resamples, at_once):
        drawn = generator.integers(count, size=(min(at_once, resamples - start), count), dtype=np.int32)
        totals = sums[drawn].sum(axis=1)
        means.append(totals / (count if sizes is None else sizes[drawn].sum(axis=1)))
    return np.concatenate(means)
