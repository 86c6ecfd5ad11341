"""Reading a reference cache: what all pairs look like at start, the tokens of some whenever they are asked for."""

import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
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
from dpocli.cache.part import OpenPart, open_part
from dpocli.cache.row_group import RowGroup
from dpocli.cache.schema import ROWS_PER_GROUP, DamagedPartError, PartFooter, SkippedRow, Tile, tiles
from dpocli.data.preference import EncodedPair
from dpocli.errors import CacheError
from dpocli.model.tokenizer_identity import compare_tokenizer
from dpocli.run.files import translating_file_errors
from dpocli.run.output_check import PART_PATTERN, describe_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MEMORY_BYTES = 256 << 20

MAX_OPEN_PARTS = 64

MAX_THREADS = 4
"""That read parts at start."""

_SAME_LINE = "Run the line that made it again: it writes what is missing or damaged and keeps the rest."


class PairStore:
    """The pairs of a complete cache (or of a store of unscored pairs), in order of source rows.

    Small columns are in memory; tokens are read by row group when asked for, and the last ones kept. `load` may be
    called from several threads. `PairStore.open` makes one.
    """

    def __init__(self, directory: Path, parts: Iterable["_PartAtStart"], memory_bytes: int) -> None:
        self.directory = directory
        self._digests: list[bytes] = []
        footers: list[PartFooter] = []

        def columns() -> Iterator[tuple[PairColumns, int]]:
            for part in parts:
                footers.append(part.footer)
                self._digests.append(part.digest)
                yield part.columns, part.footer.total_rows

        self.columns = PairColumns.joined(columns())
        self.fingerprint = footers[0].fingerprint
        self.num_rows = footers[0].total_rows
        """Source rows, those that gave no pair included."""
        self.skipped: Counter[str] = sum((Counter(footer.skipped) for footer in footers), Counter())
        """Number of skipped rows by reason."""
        self.skipped_rows: tuple[SkippedRow, ...] = tuple(row for footer in footers for row in footer.skipped_rows)
        """Some of them: the first of each part."""
        self.counts: Counter[str] = sum((Counter(footer.counts) for footer in footers), Counter())
        """Sums over the pairs, as in `PartFooter`."""
        self._paths = [directory / footer.tile.file_name for footer in footers]
        self._part_starts = np.cumsum([0, *(footer.num_pairs for footer in footers)])
        self._agreeing: list[set[int]] = [set() for _ in footers]
        """Of each part, the row groups whose small columns, read under their digest, are those that were read at start."""
        self._parts: OrderedDict[int, OpenPart] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._memory_bytes = memory_bytes
        self._used_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls,
        directory: Path,
        *,
        memory_bytes: int = DEFAULT_MEMORY_BYTES,
        complete: bool = True,
        first: str | None = None,
    ) -> "PairStore":
        """The pairs of a cache that is whole.

        Args:
            directory: of the cache.
            memory_bytes: bound of the memory for tokens kept from earlier reads.
            complete: whether parts may not be missing.
            first: name of the first part, where it is known to be there: the directory is not listed then, which on some
                file systems lags.

        Raises:
            CacheError: it is missing, something else, incomplete, damaged, mixed, or of a newer format.
        """
        return cls(directory, _parts_at_start(directory, complete, first), memory_bytes)

    def __len__(self) -> int:
        return len(self.columns.rows)

    @property
    def has_reference(self) -> bool:
        return self.fingerprint.is_scored

    @property
    def weights(self) -> NDArray[np.float32]:
        """Of each pair in the loss, shape (pairs,)."""
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
        pairs: dict[int, EncodedPair] = {}
        for index in np.unique(wanted).tolist():  # in order, so that each row group is read once
            pairs[index] = self._load_one(index)
        return [pairs[index] for index in wanted.tolist()]

    def check_tokenizer(self, tokenizer: "PreTrainedTokenizerBase") -> list[str]:
        """Make sure that a policy's tokenizer means the same by the same ids; further ids are fine.

        Returns:
            What differs without forbidding the use: chat template, BOS, EOS, what is added to a text.

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
        """Make sure that another cache (--eval-reference) was made by this cache's reference.

        Raises:
            CacheError: it was made by another.
        """
        if self.fingerprint.reference_digest != other.fingerprint.reference_digest:
            differences = compare_references(self.fingerprint, other.fingerprint)
            raise CacheError(
                f"The caches {self.directory} and {other.directory} were made by different references: "
                f"{'; '.join(differences)}. Make both with one --model."
            )

    def _load_one(self, index: int) -> EncodedPair:
        part = int(np.searchsorted(self._part_starts, index, side="right")) - 1
        group, offset = divmod(index - int(self._part_starts[part]), ROWS_PER_GROUP)
        return self._group(part, group).pair(offset)

    def _group(self, part: int, group: int) -> RowGroup:
        with self._lock:
            key = (part, group)
            if key not in self._groups:
                self._groups[key] = self._read_group(part, group)
                self._used_bytes += self._groups[key].num_bytes
                while len(self._groups) > 1 and self._used_bytes > self._memory_bytes:
                    _, dropped = self._groups.popitem(last=False)
                    self._used_bytes -= dropped.num_bytes
            self._groups.move_to_end(key)
            return self._groups[key]

    def _read_group(self, part: int, group: int) -> RowGroup:
        opened = self._part(part)
        start = int(self._part_starts[part]) + group * ROWS_PER_GROUP
        if group in self._agreeing[part]:
            table = opened.read_group(group, opened.token_columns)
        else:
            table = opened.read_group(group)
            if not self.columns.agree(start, PairColumns.of(table)):
                raise DamagedPartError(opened.path, f"row group {group} is not what it was when the cache was opened")
            self._agreeing[part].add(group)
        return RowGroup(table, self.columns, start, opened.path)

    def _part(self, part: int) -> OpenPart:
        if part not in self._parts:
            opened = self._parts[part] = _open_known(self._paths[part])
            if opened.digest != self._digests[part]:
                self._digests[part] = opened.digest
                self._agreeing[part].clear()
            if len(self._parts) > MAX_OPEN_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(part)
        return self._parts[part]


@dataclass(frozen=True, slots=True)
class _PartAtStart:
    """What is read of a part when a store is opened."""

    path: Path
    footer: PartFooter
    digest: bytes
    columns: PairColumns

    @classmethod
    def read(cls, path: Path) -> "_PartAtStart | None":
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


def _parts_at_start(directory: Path, complete: bool, first_name: str | None) -> Iterator[_PartAtStart]:
    """All parts of a cache, in order."""
    names = [first_name] if first_name else _part_names(directory)
    first = _open_known(directory / names[0]).footer
    expected = tiles(first.total_rows, first.fingerprint.settings["rows_per_part"])
    missing = []
    with ThreadPoolExecutor(max_workers=MAX_THREADS) as pool:
        try:
            found = pool.map(_PartAtStart.read, (directory / tile.file_name for tile in expected))
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
            f"The reference cache {directory} is incomplete: {len(missing)} of {len(expected)} parts are missing ({shown}). {_SAME_LINE}"
        )
    if foreign := sorted(set(names) - {tile.file_name for tile in expected}):
        raise CacheError(
            f"The reference cache {directory} holds {foreign[0]}, which is no part of it. Remove that file if it was put "
            "there by mistake, else delete the cache and make it anew."
        )


def _open_known(path: Path) -> OpenPart:
    try:
        return open_part(path)
    except FileNotFoundError:
        raise CacheError(f"The part {path} was there and is gone. {_SAME_LINE}") from None


def _check_membership(part: _PartAtStart, tile: Tile, first_name: str, first: PartFooter) -> None:
    if part.footer.fingerprint.digest != first.fingerprint.digest:
        differences = "; ".join(compare(first.fingerprint, part.footer.fingerprint))
        raise CacheError(
            f"The parts {first_name} and {part.path.name} of the reference cache {part.path.parent} were made with different "
            f"settings: {differences}. Remove the one that does not belong there and run the line that made the cache again."
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
    what = describe_directory(directory)
    raise CacheError(
        f"{directory} is {what or 'a directory without any part of one'}, not a reference cache. --reference takes the "
        "directory that precompute wrote: dpocli precompute --model REFERENCE --data prefs.jsonl --out CACHE"
    )
