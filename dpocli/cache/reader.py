"""Reading a reference cache: the small columns of all pairs when it is opened, the tokens of some when asked for."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpocli.cache.columns import PairColumns
from dpocli.cache.fingerprint import compare, compare_references
from dpocli.cache.part import open_part
from dpocli.cache.row_groups import RERUN, RowGroups, open_known
from dpocli.cache.schema import DamagedPartError, PartFooter, Tile, tiles
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.errors import CacheError
from dpocli.model.tokenizer_identity import compare_tokenizer
from dpocli.run.files import translating_file_errors
from dpocli.run.output_check import PART_PATTERN, describe_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MEMORY_BYTES = 256 << 20

MAX_THREADS = 4
"""Threads that read parts when a cache is opened."""


class PairStore:
    """The pairs of a complete cache (scored or not), in order of source rows. Made by `PairStore.open`.

    `load` may be called from several threads.
    """

    def __init__(
        self,
        directory: Path,
        columns: PairColumns,
        footers: Sequence[PartFooter],
        digests: Sequence[bytes],
        memory_bytes: int,
    ) -> None:
        self.directory = directory
        self.columns = columns
        self.fingerprint = footers[0].fingerprint
        self.num_rows = footers[0].total_rows
        """Source rows, including those that gave no pair."""
        self.skipped: Counter[str] = sum((Counter(footer.skipped) for footer in footers), Counter())
        """Number of skipped rows by reason."""
        self.skipped_rows: tuple[Skipped, ...] = tuple(row for footer in footers for row in footer.skipped_rows)
        """The first skipped rows of each part."""
        self.counts: Counter[str] = sum((Counter(footer.counts) for footer in footers), Counter())
        """Sums over the pairs, as in `PartFooter`."""
        paths = [directory / footer.tile.file_name for footer in footers]
        sizes = [footer.num_pairs for footer in footers]
        self._row_groups = RowGroups(paths, digests, sizes, columns, memory_bytes)

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        complete: bool = True,
        first: str | None = None,
    ) -> "PairStore":
        """Open a cache.

        Args:
            directory: of the cache.
            memory_bytes: bound of the memory for tokens kept from earlier reads.
            complete: whether all parts must exist.
            first: name of the first part, if it is known to exist. Then the directory is not listed, which on some file
                systems lags.

        Raises:
            CacheError: it is missing, something else, incomplete, damaged, mixed, or of a newer format.
        """
        names = [first] if first else _part_names(directory)
        first_footer = open_known(directory / names[0]).footer
        footers: list[PartFooter] = []
        digests: list[bytes] = []

        def columns() -> Iterator[PairColumns]:
            for part in _read_parts(directory, names, first_footer, complete):
                footers.append(part.footer)
                digests.append(part.digest)
                yield part.columns

        joined = PairColumns.concatenate(columns(), at_most=first_footer.total_rows)
        return cls(directory, joined, footers, digests, memory_bytes)

    def __len__(self) -> int:
        return len(self.columns.rows)

    @property
    def has_reference(self) -> bool:
        return self.fingerprint.is_scored

    @property
    def weights(self) -> NDArray[np.float32]:
        """Weight of each pair in the loss, shape (pairs,)."""
        return self.columns.weights

    @cached_property
    def pair_lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt + the longer side, shape (pairs,)."""
        columns = self.columns
        return columns.prompt_tokens.astype(np.int64) + np.maximum(columns.chosen_tokens, columns.rejected_tokens)

    def load(self, indices: Sequence[int] | NDArray[np.integer[Any]]) -> list[EncodedPair]:
        """The pairs at these positions (0 to len - 1), in this order, every byte verified.

        Raises:
            CacheError: a part is damaged, or changed since the store was opened.
        """
        wanted = np.asarray(indices, dtype=np.int64)
        if wanted.size and not 0 <= wanted.min() <= wanted.max() < len(self):
            raise IndexError(f"positions {wanted.min()} to {wanted.max()} in a store of {len(self)} pairs")
        # in order of positions, so that each row group is read once
        pairs = {position: self._row_groups.pair(position) for position in np.unique(wanted).tolist()}
        return [pairs[position] for position in wanted.tolist()]

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """Check that a policy's tokenizer gives the cached ids the same meaning; additional ids are allowed.

        Returns:
            Differences that do not forbid the use: chat template, BOS, EOS, what is added to a text.

        Raises:
            CacheError: the tokenizers differ.
        """
        forbidden, notes = compare_tokenizer(self.fingerprint.tokenizer, tokenizer)
        if forbidden:
            raise CacheError(
                f"The pairs of {self.directory} were made with another tokenizer than the model's: {'; '.join(forbidden)}. "
                "Train a model that has that tokenizer, or make a cache with a reference that has the model's."
            )
        return notes

    def check_same_reference(self, other: "PairStore") -> None:
        """Check that another cache (--eval-reference) was made with this cache's reference.

        Raises:
            CacheError: it was made with another.
        """
        if self.fingerprint.reference_digest != other.fingerprint.reference_digest:
            differences = compare_references(self.fingerprint, other.fingerprint)
            raise CacheError(
                f"The caches {self.directory} and {other.directory} were made by different references: "
                f"{'; '.join(differences)}. Make both with one --model."
            )


@dataclass(frozen=True, slots=True)
class _PartStart:
    """What is read of a part when a store is opened."""

    path: Path
    footer: PartFooter
    digest: bytes
    columns: PairColumns

    @classmethod
    def read(cls, path: Path) -> "_PartStart | None":
        """None where there is no such part."""
        try:
            part = open_part(path)
        except FileNotFoundError:
            return None
        columns = PairColumns.of(part.read_small_columns())
        tile, rows = part.footer.tile, columns.rows
        in_order = bool((np.diff(rows) > 0).all()) and (not rows.size or tile.start <= rows[0] <= rows[-1] < tile.stop)
        if not in_order or len(rows) != part.footer.num_pairs:
            raise DamagedPartError(path, "its rows are not those that its footer says")
        return cls(path, part.footer, part.digest, columns)


def _read_parts(directory: Path, names: Sequence[str], first: PartFooter, complete: bool) -> Iterator[_PartStart]:
    """All parts of a cache, in order.

    Args:
        directory: of the cache.
        names: of the parts that were found.
        first: footer of the first of them, which the others must match.
        complete: whether all parts must exist.
    """
    expected = tiles(first.total_rows, first.fingerprint.rows_per_part)
    missing = []
    with ThreadPoolExecutor(max_workers=MAX_THREADS) as pool:
        try:
            found = pool.map(_PartStart.read, (directory / tile.file_name for tile in expected))
            for tile, part in zip(expected, found, strict=True):
                if part is None:
                    missing.append(tile.file_name)
                else:
                    _check_membership(part, tile, names[0], first)
                    yield part
        finally:
            pool.shutdown(cancel_futures=True)
    if missing and complete:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise CacheError(
            f"The reference cache {directory} is incomplete: {len(missing)} of {len(expected)} parts are missing ({shown}). {RERUN}"
        )
    if foreign := sorted(set(names) - {tile.file_name for tile in expected}):
        raise CacheError(
            f"The reference cache {directory} holds {foreign[0]}, which is not a part of it. Remove that file if it was put "
            "there by mistake, else delete the cache and rebuild it."
        )


def _check_membership(part: _PartStart, tile: Tile, first_name: str, first: PartFooter) -> None:
    if part.footer.fingerprint.digest != first.fingerprint.digest:
        differences = "; ".join(compare(first.fingerprint, part.footer.fingerprint))
        raise CacheError(
            f"The parts {first_name} and {part.path.name} of the reference cache {part.path.parent} were made with "
            f"different settings: {differences}. Remove the one that does not belong there and run the command that made the "
            "cache again."
        )
    if part.footer.tile != tile or part.footer.total_rows != first.total_rows:
        raise DamagedPartError(part.path, f"it holds the rows {part.footer.tile.start} to {part.footer.tile.stop}")


def _part_names(directory: Path) -> list[str]:
    if directory.is_file():
        raise CacheError(
            f"{directory} is a file. A reference cache is a directory: give the one that precompute wrote."
        )
    if not directory.is_dir():
        raise CacheError(
            f"There is no reference cache {directory}. Make it first: dpocli precompute --model REFERENCE --data "
            f"prefs.jsonl --out {directory}"
        )
    with translating_file_errors(f"Reading the reference cache {directory}"):
        names = sorted(name for name in os.listdir(directory) if fnmatch(name, PART_PATTERN))
    if names:
        return names
    found = describe_directory(directory) or "a directory without any part of one"
    raise CacheError(
        f"{directory} is {found}, not a reference cache. --reference takes the directory that precompute wrote: dpocli "
        "precompute --model REFERENCE --data prefs.jsonl --out CACHE"
    )
