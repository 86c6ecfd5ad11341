"""What lies in reference caches, for tests that compare them, and caches with other values."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpocli.cache.reader import PairStore
from dpocli.cache.writer import CacheWriter
from dpocli.data.preference import EncodedPair, ReferenceLogps

Bits = tuple[bytes, ...]


def pairs_in(cache: Path) -> list[EncodedPair]:
    """All pairs of a cache, which may be incomplete."""
    store = PairStore.open(cache, complete=False)
    return store.load(np.arange(len(store)))


def values_in(cache: Path) -> dict[str, Bits]:
    """The log-probs of each pair, bit by bit, by its id."""
    return {pair.pair_id: _bits(pair) for pair in pairs_in(cache)}


def content_of(cache: Path) -> list[tuple[Any, ...]]:
    """Everything that a cache holds of each row, bit by bit."""
    return [
        (
            pair.row, pair.pair_id, *(ids.tobytes() for ids in pair.all_ids),
            *(None if mask is None else mask.tobytes() for mask in (pair.chosen_mask, pair.rejected_mask)),
            pair.source, pair.weight, pair.num_turns, pair.truncated, pair.prompt_hash, dict(pair.kept), *_bits(pair),
        )
        for pair in pairs_in(cache)
    ]  # fmt: skip


def assert_same_values(pairs: Sequence[EncodedPair], others: Sequence[EncodedPair]) -> None:
    """Up to the rounding of another arrangement."""
    assert [(pair.row, pair.pair_id) for pair in pairs] == [(pair.row, pair.pair_id) for pair in others]
    for pair, twin in zip(pairs, others, strict=True):
        assert pair.reference is not None
        assert twin.reference is not None
        np.testing.assert_allclose(pair.reference.chosen, twin.reference.chosen, rtol=0, atol=2e-5)
        np.testing.assert_allclose(pair.reference.rejected, twin.reference.rejected, rtol=0, atol=2e-5)


def tree(*directories: Path) -> dict[Path, tuple[int, bytes | None]]:
    """Every file and directory, with the time of its last change and its content."""
    paths = [path for directory in directories for path in [directory, *directory.rglob("*")] if path.exists()]
    return {path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else None) for path in paths}


def parts_of(cache: Path) -> dict[str, int]:
    """The parts of a cache, with the time when each was written."""
    return {path.name: path.stat().st_mtime_ns for path in sorted(cache.glob("rows-*"))}


def with_other_values(cache: Path, destination: Path, change: Callable[[EncodedPair], ReferenceLogps]) -> None:
    """A cache as valid as the other, of the same pairs (no row may be skipped), with log-probs that nobody computed."""
    store = PairStore.open(cache)
    writer = CacheWriter(destination, store.fingerprint)
    writer.prepare()
    for tile in writer.tiles:
        pairs = store.load(range(tile.start, tile.stop))
        writer.write(tile, [replace(pair, reference=change(pair)) for pair in pairs])


def write_rows(path: Path, rows: Iterable[object]) -> Path:
    """A JSON Lines file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def _bits(pair: EncodedPair) -> Bits:
    assert pair.reference is not None
    return pair.reference.chosen.tobytes(), pair.reference.rejected.tobytes()
