"""`--reuse OLD`: log-probs that an old cache holds already, taken over pair by pair.

A pair's id is a hash of its tokens and masks, so a pair of the same id that the same reference scored in the same dtype
has the same values, whatever the settings were that led to its tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpocli.cache.fingerprint import Fingerprint, compare_references
from dpocli.cache.reader import PairStore
from dpocli.data.preference import EncodedPair
from dpocli.errors import CacheError
from dpocli.model.hashing import changes


class Reusable:
    """The scored pairs of old caches, found by their ids. The old caches are only read.

    Memory: 24 bytes a pair beyond what an open cache takes.
    """

    def __init__(self, stores: Sequence[PairStore]) -> None:
        self._stores = [_Index(store) for store in stores]

    @classmethod
    def open(cls, directories: Sequence[Path], wanted: Fingerprint) -> "Reusable":
        """The old caches, which may be incomplete.

        Args:
            directories: of the caches, those to be asked first in front.
            wanted: of the cache to be made.

        Raises:
            CacheError: one is missing or damaged, or what decides values differs: weights, config, code, adapter,
                quantization, dtype.
        """
        stores = []
        for directory in directories:
            try:
                store = PairStore.open(directory, complete=False)
            except CacheError as error:
                raise CacheError(f"--reuse {directory}: {error}") from error
            differences = compare_references(store.fingerprint, wanted)
            differences += changes("dtype", store.fingerprint.dtype, wanted.dtype)
            if differences:
                raise CacheError(
                    f"--reuse {directory}: its values are not those of this reference ({'; '.join(differences)}). Leave it "
                    "out, or give the model and --dtype that it was made with."
                )
            stores.append(store)
        return cls(stores)

    def take_over(self, pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
        """The pairs with their log-probs where an old cache has them, and as they are where none has."""
        found = list(pairs)
        for index in self._stores:
            open_places = [place for place, pair in enumerate(found) if pair.reference is None]
            positions = index.find([found[place].pair_id for place in open_places])
            hits = [(place, position) for place, position in zip(open_places, positions, strict=True) if position >= 0]
            for (place, _), old in zip(hits, index.store.load([position for _, position in hits]), strict=True):
                found[place] = replace(found[place], reference=old.reference)
        return found


class _Index:
    """Where the pairs of a store are, by the first half of their ids; the second half is looked at too."""

    def __init__(self, store: PairStore) -> None:
        self.store = store
        halves = store.columns.pair_ids.view(">u8").reshape(-1, 2)
        self._order = np.argsort(halves[:, 0], kind="stable")
        self._firsts = halves[self._order, 0].astype(np.uint64)
        self._seconds = halves[self._order, 1].astype(np.uint64)

    def find(self, pair_ids: Sequence[str]) -> NDArray[np.int64]:
        """The position of each pair in the store, -1 where it has none."""
        wanted = np.frombuffer(bytes.fromhex("".join(pair_ids)), ">u8").reshape(-1, 2).astype(np.uint64)
        places = np.searchsorted(self._firsts, wanted[:, 0])
        found = np.full(len(wanted), -1, dtype=np.int64)
        inside = np.flatnonzero(places < len(self._firsts))
        at = places[inside]
        hit = (self._firsts[at] == wanted[inside, 0]) & (self._seconds[at] == wanted[inside, 1])
        found[inside[hit]] = self._order[at[hit]]
        return found
