"""Reading a reference cache: what all pairs look like at start, the tokens of some whenever they are asked for."""

import hashlib
import json
import os
import threading
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatch
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpocli.artifacts.cache_format import (
    PART_PATTERN,
    ROWS_PER_GROUP,
    TOKEN_COLUMNS,
    DamagedPartError,
    OpenPart,
    PartFooter,
    SkippedRow,
    Tile,
    describe_directory,
    kept_columns,
    open_part,
    tiles,
)
from dpocli.artifacts.files import file_errors_in_words
from dpocli.artifacts.fingerprint import compare, compare_references, compare_tokenizer
from dpocli.data.encode import pair_id
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.errors import CacheError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEFAULT_MEMORY_BYTES = 256 << 20
MAX_OPEN_PARTS = 64

_PLAIN = ("row", "pair_id", "source", "weight", "num_turns", "truncated")
_SAME_LINE = "Run the line that made it again: it writes what is missing or damaged and keeps the rest."


@dataclass(frozen=True, slots=True)
class PairColumns:
    """What is known of every pair without its tokens: arrays of shape (pairs,), in order of source rows."""

    rows: NDArray[np.int64]
    pair_ids: NDArray[np.uint8]
    """Shape (pairs, 16)."""
    sources: NDArray[np.object_]
    """The label of each pair; equal labels of a part are one string in memory."""
    weights: NDArray[np.float32]
    num_turns: NDArray[np.int16]
    prompt_tokens: NDArray[np.int32]
    chosen_tokens: NDArray[np.int32]
    rejected_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    reference_chosen: NDArray[np.float64]
    """Nats, summed over the tokens that count; NaN where no reference scored the pairs."""
    reference_rejected: NDArray[np.float64]

    @classmethod
    def of(cls, table: pa.Table) -> "PairColumns":
        """From a table with the columns of SMALL_COLUMNS."""
        labels = table["source"].combine_chunks().dictionary_encode()
        return cls(
            rows=table["row"].to_numpy(),
            pair_ids=np.frombuffer(bytes.fromhex("".join(table["pair_id"].to_pylist())), np.uint8).reshape(-1, 16),
            sources=np.array(labels.dictionary.to_pylist(), dtype=object)[labels.indices.to_numpy()],
            weights=table["weight"].to_numpy(),
            num_turns=table["num_turns"].to_numpy(),
            prompt_tokens=table["prompt_tokens"].to_numpy(),
            chosen_tokens=table["chosen_tokens"].to_numpy(),
            rejected_tokens=table["rejected_tokens"].to_numpy(),
            truncated=table["truncated"].to_numpy(),
            reference_chosen=table["ref_chosen_logps"].to_numpy(),
            reference_rejected=table["ref_rejected_logps"].to_numpy(),
        )

    @classmethod
    def joined(cls, parts: Sequence["PairColumns"]) -> "PairColumns":
        names = [field.name for field in fields(cls)]
        return cls(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in names})

    def agree(self, start: int, other: "PairColumns") -> bool:
        """Whether `other` holds what stands here from `start` on."""
        stop = start + len(other.rows)
        arrays = ((getattr(self, field.name)[start:stop], getattr(other, field.name)) for field in fields(self))
        return all(
            mine.tobytes() == theirs.tobytes() if mine.dtype != object else (mine == theirs).all()
            for mine, theirs in arrays
        )


class PairStore:
    """The pairs of a complete cache (or of a store of unscored pairs), in order of source rows.

    Small columns are in memory; tokens are read by row group when asked for, and the last ones kept. `load` may be
    called from several threads. `PairStore.open` makes one.
    """

    def __init__(self, directory: Path, footers: Sequence[PartFooter], columns: PairColumns, memory_bytes: int) -> None:
        self.directory = directory
        self.columns = columns
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
        self._parts: OrderedDict[int, OpenPart] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], _Group] = OrderedDict()
        self._memory_bytes = memory_bytes
        self._lock = threading.Lock()

    @classmethod
    def open(cls, directory: Path, *, memory_bytes: int = DEFAULT_MEMORY_BYTES) -> "PairStore":
        """The pairs of a cache that is complete and whole.

        Args:
            directory: of the cache.
            memory_bytes: bound of the memory for tokens kept from earlier reads.

        Raises:
            CacheError: it is missing, something else, incomplete, damaged, mixed, or of a newer format.
        """
        footers, columns = [], []
        for part in _open_parts(directory):
            footers.append(part.footer)
            columns.append(_read_columns(part))
        return cls(directory, footers, PairColumns.joined(columns), memory_bytes)

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

    def prompt_hashes(self) -> NDArray[np.uint64]:
        """A hash of each pair's prompt ids, shape (pairs,): the same on every machine. Reads all parts once."""
        hashes = []
        for part in range(len(self._paths)):
            for group in range(self._num_groups(part)):
                with self._lock:
                    prompts = _Ragged.of(self._part(part).read_group(group, ["prompt_ids"])["prompt_ids"])
                hashes += [_hash_ids(prompts[row]) for row in range(len(prompts))]
        return np.array(hashes, dtype=np.uint64)

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

    def _num_groups(self, part: int) -> int:
        return -(-int(self._part_starts[part + 1] - self._part_starts[part]) // ROWS_PER_GROUP)

    def _group(self, part: int, group: int) -> "_Group":
        with self._lock:
            key = (part, group)
            if key not in self._groups:
                self._groups[key] = self._read_group(part, group)
                while (
                    len(self._groups) > 1 and sum(kept.num_bytes for kept in self._groups.values()) > self._memory_bytes
                ):
                    self._groups.popitem(last=False)
            self._groups.move_to_end(key)
            return self._groups[key]

    def _read_group(self, part: int, group: int) -> "_Group":
        table = self._part(part).read_group(group)
        start = int(self._part_starts[part]) + group * ROWS_PER_GROUP
        if not self.columns.agree(start, PairColumns.of(table)):
            raise DamagedPartError(self._paths[part], f"row group {group} is not what it was when the cache was opened")
        return _Group(table, self._paths[part])

    def _part(self, part: int) -> OpenPart:
        if part not in self._parts:
            self._parts[part] = _open_known(self._paths[part])
            if len(self._parts) > MAX_OPEN_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(part)
        return self._parts[part]


@dataclass(frozen=True, slots=True)
class _Ragged:
    """A list column: one array a row, or None."""

    values: NDArray[Any]
    offsets: NDArray[np.int32]
    is_valid: NDArray[np.bool_]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "_Ragged":
        lists = column.combine_chunks()
        valid = lists.is_valid().to_numpy(zero_copy_only=False)
        return cls(lists.values.to_numpy(zero_copy_only=False), lists.offsets.to_numpy(), valid)

    def __len__(self) -> int:
        return len(self.is_valid)

    def __getitem__(self, row: int) -> Any:
        """A copy: writable, as torch wants it, and not keeping the whole row group in memory."""
        if not self.is_valid[row]:
            return None
        return self.values[self.offsets[row] : self.offsets[row + 1]].copy()


class _Group:
    """A row group in memory."""

    def __init__(self, table: pa.Table, path: Path) -> None:
        self._path = path
        self._columns = {name: table[name].to_pylist() for name in _PLAIN}
        self._kept = {name: (table[name].to_pylist(), is_json) for name, is_json in kept_columns(table.schema).items()}
        self._ragged = {name: _Ragged.of(table[name]) for name in TOKEN_COLUMNS.names}
        self.num_bytes = table.nbytes + sum(ragged.values.nbytes for ragged in self._ragged.values())

    def pair(self, row: int) -> EncodedPair:
        """The pair at a place of the group, its tokens checked against their hash."""
        tokens = {name: ragged[row] for name, ragged in self._ragged.items()}
        chosen_logps, rejected_logps = tokens.pop("ref_chosen_token_logps"), tokens.pop("ref_rejected_token_logps")
        plain = {name: values[row] for name, values in self._columns.items()}
        if pair_id(**tokens) != plain["pair_id"]:
            raise DamagedPartError(
                self._path, f"the tokens of row {plain['row']} do not have the hash that stands beside them"
            )
        kept = {name: _decode(values[row], is_json) for name, (values, is_json) in self._kept.items()}
        reference = None if chosen_logps is None else ReferenceLogps(chosen_logps, rejected_logps)
        return EncodedPair(**plain, **tokens, kept=kept, reference=reference)


def _decode(value: Any, is_json: bool) -> Any:
    return json.loads(value) if is_json and value is not None else value


def _hash_ids(ids: NDArray[np.int32]) -> int:
    return int.from_bytes(hashlib.blake2b(ids.astype("<i4").tobytes(), digest_size=8).digest(), "little")


def _read_columns(part: OpenPart) -> PairColumns:
    columns = PairColumns.of(part.read_small_columns())
    tile, rows = part.footer.tile, columns.rows
    in_order = bool((np.diff(rows) > 0).all()) and (not rows.size or tile.start <= rows[0] <= rows[-1] < tile.stop)
    if not in_order or len(rows) != part.footer.num_pairs:
        raise DamagedPartError(part.path, "its rows are not those that its footer says")
    return columns


def _open_parts(directory: Path) -> Iterator[OpenPart]:
    """All parts of a complete cache, in order."""
    names = _part_names(directory)
    first = _open_known(directory / names[0]).footer
    expected = tiles(first.total_rows, first.fingerprint.settings["rows_per_part"])
    missing = []
    for tile in expected:
        try:
            part = open_part(directory / tile.file_name)
        except FileNotFoundError:
            missing.append(tile.file_name)
            continue
        _check_membership(part, tile, names[0], first)
        yield part
    if missing:
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


def _check_membership(part: OpenPart, tile: Tile, first_name: str, first: PartFooter) -> None:
    if part.footer.fingerprint.digest != first.fingerprint.digest:
        differences = "; ".join(compare(first.fingerprint, part.footer.fingerprint))
        raise CacheError(
            f"The parts {first_name} and {part.path.name} of the reference cache {part.path.parent} were made with different "
            f"settings: {differences}. Remove the one that does not belong there and run the line that made the cache again."
        )
    if part.footer.tile != tile or part.footer.total_rows != first.total_rows:
        raise DamagedPartError(part.path, f"it holds the rows {part.footer.tile.start} to {part.footer.tile.stop}")


def _part_names(directory: Path) -> list[str]:
    if not directory.is_dir():
        raise CacheError(
            f"There is no reference cache {directory}. Make it first: dpocli precompute --model REFERENCE --data "
            f"prefs.jsonl --out {directory}"
        )
    with file_errors_in_words(f"Reading the reference cache {directory}"):
        names = sorted(name for name in os.listdir(directory) if fnmatch(name, PART_PATTERN))
    if names:
        return names
    what = describe_directory(directory)
    raise CacheError(
        f"{directory} is {what or 'a directory without any part of one'}, not a reference cache. --reference takes the "
        "directory that precompute wrote: dpocli precompute --model REFERENCE --data prefs.jsonl --out CACHE"
    )
