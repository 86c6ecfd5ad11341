"""Join of two caches by `pair_id`."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpocli.cache.reader import PairStore
from dpocli.errors import CacheError


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
    ids = {pair_id.tobytes() for pair_id in first.columns.pair_ids}
    if not any(pair_id.tobytes() in ids for pair_id in second.columns.pair_ids):
        raise CacheError(
            f"--second-reference {directory}: it has none of the pairs of {first.directory}. Make it of the same --data, with the "
            "same tokenizer, --max-length and --truncation."
        )
    return second


def join(second: PairStore, pair_ids: NDArray[Any]) -> NDArray[np.int64]:
    """Positions in the second cache of the pairs with these ids (text), -1 where it lacks one, shape (pairs,)."""
    places = {pair_id.tobytes().hex(): place for place, pair_id in enumerate(second.columns.pair_ids)}
    return np.array([places.get(pair_id, -1) for pair_id in pair_ids.tolist()], dtype=np.int64)
