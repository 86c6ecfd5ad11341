"""What a complete cache shows about the data: duplicates, contradictions, truncation and extreme reference margins."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpocli.cache.columns import PairColumns
from dpocli.cache.reader import PairStore

MAX_ROWS = 20
"""Source rows that a finding lists; all pairs are counted."""

FAR = 8.0
"""A reference margin is extreme beyond so many robust standard deviations from the median."""

PAIRS_AT_ONCE = 4096

_ODD = (np.uint64(0x9E3779B97F4A7C15), np.uint64(0xC2B2AE3D27D4EB4F), np.uint64(0x165667B19E3779F9))


@dataclass(frozen=True, slots=True)
class Finding:
    """Pairs that deserve a look."""

    name: str
    count: int
    """Pairs concerned."""
    rows: tuple[int, ...]
    """Source rows of the first of them, or of the most extreme."""
    meaning: str
    """What it is, and why it matters."""


@dataclass(frozen=True, slots=True)
class DataReport:
    """What the reference and the lengths show about the pairs; the entry `triage` of `summary.json`."""

    pairs: int
    reference_accuracy: float
    """Share of pairs whose chosen side has the higher reference log-prob, summed over its tokens."""
    pick_the_longer_accuracy: float
    """Share of pairs whose chosen side is the longer one; ties count half."""
    median_length_difference: float
    """Tokens of chosen - rejected."""
    findings: tuple[Finding, ...]

    @classmethod
    def of(cls, store: PairStore) -> "DataReport":
        """The report on a complete, scored cache. Reads the tokens only of pairs that may contradict another."""
        columns = store.columns
        margin = columns.reference_chosen - columns.reference_rejected
        length = columns.chosen_tokens.astype(np.int64) - columns.rejected_tokens
        return cls(
            pairs=len(columns.rows),
            reference_accuracy=float(np.mean(margin > 0)),
            pick_the_longer_accuracy=float(np.mean((length > 0) + 0.5 * (length == 0))),
            median_length_difference=float(np.median(length)),
            findings=tuple(finding for finding in _findings(store, margin) if finding.count),
        )

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def _findings(store: PairStore, margin: NDArray[np.float64]) -> Iterator[Finding]:
    columns = store.columns

    def finding(name: str, members: NDArray[np.int64], meaning: str) -> Finding:
        return Finding(name, len(members), tuple(columns.rows[members[:MAX_ROWS]].tolist()), meaning)

    yield finding(
        "duplicates",
        _repeated(columns),
        "the same prompt and sides as an earlier row; it counts that often in training",
    )
    yield finding(
        "contradictions",
        _contradictory(store),
        "another row prefers the other of the same two answers; the two cancel",
    )
    yield finding(
        "truncated", np.flatnonzero(columns.truncated), "cut to --max-length; the preference may depend on the rest"
    )
    distance = np.abs(margin - np.median(margin))
    spread = 1.4826 * np.median(distance)
    if spread > 0:
        distance /= spread
        extreme = np.flatnonzero(distance > FAR)
        yield finding(
            "extreme reference margins",
            extreme[np.argsort(-distance[extreme], kind="stable")],
            f"more than {FAR:g} robust standard deviations from the median: broken text, another language, or a mistake",
        )


def _repeated(columns: PairColumns) -> NDArray[np.int64]:
    """Positions of pairs that equal an earlier one."""
    keys = np.ascontiguousarray(columns.pair_ids).view("V16").ravel()
    _, first = np.unique(keys, return_index=True)
    is_first = np.zeros(len(keys), dtype=np.bool_)
    is_first[first] = True
    return np.flatnonzero(~is_first)


def _contradictory(store: PairStore) -> NDArray[np.int64]:
    """Positions of pairs whose sides are swapped in another pair of the same prompt."""
    candidates = _may_contradict(store.columns)
    seen: dict[tuple[int, ...], list[int]] = {}
    for start in range(0, len(candidates), PAIRS_AT_ONCE):
        positions = candidates[start : start + PAIRS_AT_ONCE]
        for position, pair in zip(positions.tolist(), store.load(positions), strict=True):
            seen.setdefault(tuple(hash(ids.tobytes()) for ids in pair.all_ids), []).append(position)
    opposed = [
        position
        for (prompt, chosen, rejected), positions in seen.items()
        if (prompt, rejected, chosen) in seen
        for position in positions
    ]
    return np.array(sorted(opposed), dtype=np.int64)


def _may_contradict(columns: PairColumns) -> NDArray[np.int64]:
    """Positions of pairs with a partner of the same prompt whose sides have the same numbers of tokens, swapped."""

    def keys(first: NDArray[np.int32], second: NDArray[np.int32]) -> NDArray[np.uint64]:
        """A hash of prompt and lengths; a collision only costs reading the tokens."""
        mixed = columns.prompt_hashes.copy()
        for counts, factor in zip((columns.prompt_tokens, first, second), _ODD, strict=True):
            mixed += counts.astype(np.uint64) * factor
        return mixed

    chosen, rejected = columns.chosen_tokens, columns.rejected_tokens
    own, opposite = keys(chosen, rejected), keys(rejected, chosen)
    kinds, counts = np.unique(own, return_counts=True)
    places = np.minimum(np.searchsorted(kinds, opposite), len(kinds) - 1)
    is_alone = (own == opposite) & (counts[places] == 1)
    return np.flatnonzero((kinds[places] == opposite) & ~is_alone)
