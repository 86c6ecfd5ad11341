"""How sure a mean over pairs is: intervals from resampled prompts, the same every time.

Pairs of one prompt resemble each other, so where prompts repeat it is they that are drawn anew and not pairs (the cluster
bootstrap: Cameron, Gelbach and Miller 2008, "Bootstrap-based improvements for inference with clustered errors"). Intervals
are percentiles (Efron 1979).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEVEL = 0.95
RESAMPLES = 1000
SEED = 0x5EED
NUMBERS_AT_ONCE = 1 << 20
"""Drawn in one piece, which bounds the memory."""
FEW_KINDS = 16
"""Clusters per distinct cluster, from which on it is cheaper to draw how often each kind comes than to draw clusters."""

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Clusters:
    """Which pairs are drawn together: those of one prompt."""

    codes: NDArray[np.int64]
    """Of each pair, which cluster it is in. Shape (pairs,)."""
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
        """Of some of the pairs, by mask or by position."""
        return Clusters.of(self.codes[chosen])

    def describe(self) -> dict[str, Any]:
        """What `metrics.json` says of its intervals."""
        method = "bootstrap over prompts" if self.repeat else "bootstrap over pairs"
        return {"level": LEVEL, "method": method, "resamples": RESAMPLES}


def mean_interval(
    values: NDArray[Any], clusters: Clusters, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The interval that holds the mean of all pairs like these with 95% probability.

    Args:
        values: of each pair, shape (pairs,), finite.
        clusters: of the pairs.
        resamples: how often all clusters are drawn anew, with replacement.
        seed: of the draws; with equal values, prompts and seed the interval is the same.
    """
    sums = np.bincount(clusters.codes, weights=values, minlength=clusters.count).astype(np.float64, copy=False)
    sizes = np.bincount(clusters.codes, minlength=clusters.count).astype(np.float64)
    generator = np.random.default_rng(seed)
    # What counts of a cluster is its sum and its size. With rights and wrongs there are few distinct ones.
    kinds, counts = np.unique(sums + 1j * sizes, return_counts=True)
    if len(kinds) * FEW_KINDS <= clusters.count or len(kinds) == 1:
        draws = generator.multinomial(clusters.count, counts / clusters.count, size=resamples)
        means = (draws @ kinds.real) / (draws @ kinds.imag)
    else:
        means = _means_of_drawn(sums, sizes if clusters.repeat else None, generator, resamples)
    low, high = np.quantile(means, ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return float(low), float(high)


def share_interval(
    right: NDArray[Any], clusters: Clusters, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Interval:
    """The same for a share of pairs, `right` being between 0 and 1.

    Where all pairs are right, or all wrong, every resample is like the sample, and the bootstrap would be sure of what a
    handful of pairs say. There the bound is the exact binomial one over prompts (Clopper and Pearson 1934).
    """
    reach = ((1 - LEVEL) / 2) ** (1 / clusters.count)
    if (right == 1).all():
        return float(reach), 1.0
    if (right == 0).all():
        return 0.0, float(1 - reach)
    return mean_interval(right, clusters, resamples=resamples, seed=seed)


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
