"""`--reuse OLD`: log-probs from old caches, pair by pair.

A pair's id is a hash of its tokens and masks. So a pair with the same id, scored by the same reference in the same dtype,
has the same values, whatever settings led to its tokens.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dpocli.cache.fingerprint import Fingerprint, compare_references
from dpocli.cache.join import PairIndex
from dpocli.cache.reader import PairStore
from dpocli.data.preference import EncodedPair
from dpocli.errors import CacheError
from dpocli.model.hashing import changes


class Reusable:
    """The scored pairs of old caches by id, read only. Memory: 24 bytes a pair beyond that of an open cache."""

    def __init__(self, stores: Sequence[PairStore]) -> None:
        self._stores = [(store, PairIndex(store)) for store in stores]

    @classmethod
    def open(cls, directories: Sequence[Path], wanted: Fingerprint) -> "Reusable":
        """Open old caches, which may be incomplete.

        Args:
            directories: of the caches; earlier ones are searched first.
            wanted: fingerprint of the new cache.

        Raises:
            CacheError: one is missing or damaged, or was scored with another reference or dtype.
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
                    f"--reuse {directory}: its values come from another reference ({'; '.join(differences)}). Leave it "
                    "out, or give the model and --dtype that it was made with."
                )
            stores.append(store)
        return cls(stores)

    def fill_in(self, pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
        """The pairs, with the log-probs of an old cache where one has them."""
        found = list(pairs)
        for store, pair_index in self._stores:
            unscored = [index for index, pair in enumerate(found) if pair.reference is None]
            positions = pair_index.find([found[index].pair_id for index in unscored])
            hits = [(index, position) for index, position in zip(unscored, positions, strict=True) if position >= 0]
            for (index, _), scored in zip(hits, store.load([position for _, position in hits]), strict=True):
                found[index] = replace(found[index], reference=scored.reference)
        return found
