"""Join of caches by pair id."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpocli.cache.reader import PairStore
from dpocli.errors import CacheError


class PairIndex:
    """Positions of the pairs of a store by id. Memory: 24 bytes a pair."""

    def __init__(self, store: PairStore) -> None:
        halves = store.columns.pair_ids.view(">u8").reshape(-1, 2)
        self._order = np.argsort(halves[:, 0], kind="stable")
        self._firsts = halves[self._order, 0].astype(np.uint64)
        self._seconds = halves[self._order, 1].astype(np.uint64)

    def find(self, pair_ids: Sequence[str]) -> NDArray[np.int64]:
        """The position of each pair in the store, -1 where it is not there."""
        wanted = np.frombuffer(bytes.fromhex("".join(pair_ids)), ">u8").reshape(-1, 2).astype(np.uint64)
        places = np.searchsorted(self._firsts, wanted[:, 0])
        found = np.full(len(wanted), -1, dtype=np.int64)
        inside = np.flatnonzero(places < len(self._firsts))
        at = places[inside]
        hit = (self._firsts[at] == wanted[inside, 0]) & (self._seconds[at] == wanted[inside, 1])
        found[inside[hit]] = self._order[at[hit]]
        return found


def open_second(directory: Path, first: PairStore) -> PairStore:
    """Open the cache of `--second-reference`.

    Raises:
        CacheError: it has no log-probs, or shares no pair. Pair ids depend on tokens, so it needs the same data, tokenizer and
            lengths.
    """
    second = PairStore.open(directory)
    if not second.has_reference:
        raise CacheError(
            f"--second-reference {directory}: no reference has scored these pairs. Give what precompute wrote."
        )
    if not (PairIndex(second).find([pair_id.tobytes().hex() for pair_id in first.columns.pair_ids]) >= 0).any():
        raise CacheError(
            f"--second-reference {directory}: it has none of the pairs of {first.directory}. Make it of the same --data, with the "
            "same tokenizer, --max-length and --truncation."
        )
    return second


def join(second: PairStore, pair_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Positions in the second cache of the pairs with these ids (text), -1 where it lacks one, shape (pairs,)."""
    return PairIndex(second).find(pair_ids.tolist())
