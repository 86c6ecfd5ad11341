"""Filling a reference cache: which tiles are missing, and how a tile becomes a part."""

import io
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from dpocli.cache.columns import PairColumns
from dpocli.cache.fingerprint import Fingerprint, compare, compare_references
from dpocli.cache.part import OpenPart, blank_seal, open_part, seal
from dpocli.cache.schema import (
    FOOTER_KEY,
    MAX_LISTED_SKIPS,
    ROWS_PER_GROUP,
    SEAL_KEY,
    DamagedPartError,
    KeptType,
    PartFooter,
    SkippedRow,
    Tile,
    cache_schema,
    kept_type,
    tiles,
)
from dpocli.data.preference import EncodedPair, ReferenceLogps, Skipped, SkipReason
from dpocli.errors import CacheError, DataError, DpoError, NumericsError
from dpocli.run.files import make_directory, remove_stale_temporaries, write_atomically
from dpocli.run.output_check import PART_PATTERN, check_destination

_OF_LENGTH = (SkipReason.TOO_LONG, SkipReason.PROMPT_TOO_LONG, SkipReason.TRUNCATED_AWAY)

_log = logging.getLogger(__name__)


class CacheWriter:
    """Fills one cache directory, beside any number of other workers, in any order, any number of times.

    Args:
        directory: of the cache; created by `check`.
        fingerprint: of the values to be written.
        total_rows: source rows, skipped ones included.
        rows_per_part: source rows in each tile.
        kept: types of the kept columns (`kept_types`).
        say: told of damaged parts.

    Raises:
        UsageError: a kept column has the name of a column of the cache.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: Fingerprint,
        total_rows: int,
        rows_per_part: int,
        kept: Mapping[str, KeptType] | None = None,
        say: Callable[[str], None] = _log.warning,
    ) -> None:
        self.directory = directory
        self._strays: frozenset[str] = frozenset()
        """Parts of another run among parts of this one: copied here by mistake, and made anew."""
        self.fingerprint = fingerprint
        self.total_rows = total_rows
        self.tiles = tiles(total_rows, rows_per_part)
        self._kept = dict(kept or {})
        self._say = say
        self._schema = cache_schema(self._kept)

    def check(self) -> None:
        """Make sure that the directory can become, or go on being, the cache of this fingerprint. Creates it.

        Raises:
            UsageError: it is something else than a cache, or cannot be written.
            CacheError: it holds parts that were made with other settings. (A few among more that were not were copied there
                by mistake: they count as damaged.)
        """
        check_destination(self.directory)
        make_directory(self.directory)
        remove_stale_temporaries(self.directory)
        self.check_parts()

    def check_parts(self) -> None:
        """What `check` looks at, without touching anything. Raises CacheError as it does."""
        parts = sorted(self.directory.glob(PART_PATTERN))
        strays: dict[str, CacheError] = {}
        num_own = 0
        for path in parts:
            try:
                self._check_fingerprint(open_part(path).footer.fingerprint, path)
                num_own += 1
            except (DamagedPartError, FileNotFoundError):
                continue  # `missing` deals with it
            except CacheError as error:
                strays[path.name] = error
        if strays and len(strays) >= num_own:
            raise next(iter(strays.values()))
        self._strays = frozenset(strays)
        expected = {tile.file_name for tile in self.tiles}
        if foreign := [path for path in parts if path.name not in expected]:
            raise CacheError(
                f"The reference cache {self.directory} holds {foreign[0].name}, which is no part of it "
                f"({len(self.tiles)} parts of {self.total_rows:,} rows). Remove that file, or choose another --out."
            )

    def inform(self, information: Mapping[str, Any]) -> None:
        """Sets the information that the parts written from now on carry; it is never compared."""
        self.fingerprint = replace(self.fingerprint, information=information)

    def missing(self, index: int = 0, count: int = 1, between: Callable[[], None] = lambda: None) -> list[Tile]:
        """The tiles that worker `index` of `count` has to make: those without a part, or with a damaged one.

        Expected names are opened, since listings lag on some file systems, and every byte of them is verified. `between`
        is called before each, and may raise to stop.

        Raises:
            CacheError: a part was made with other settings, or by a later version.
        """
        missing = []
        for tile in self.tiles[index::count]:
            between()
            if not self.is_present(tile):
                missing.append(tile)
        return missing

    def is_present(self, tile: Tile) -> bool:
        """Whether a tile's part is there, every byte as it was written; a damaged one is reported."""
        try:
            return self._find(tile, thorough=True) is not None
        except DamagedPartError as error:
            self._say(f"{error} It is made anew now.")
            return False

    def progress(self) -> tuple[int, int]:
        """(parts present, parts in all), over all workers."""
        return sum(1 for _ in self.footers()), len(self.tiles)

    def footers(self) -> Iterator[PartFooter]:
        """The footers of the parts that are there, in order of rows: counts and skipped rows for a summary."""
        for tile in self.tiles:
            with suppress(DamagedPartError):
                if part := self._find(tile, thorough=False):
                    yield part.footer

    def write(self, tile: Tile, pairs: Sequence[EncodedPair], skipped: Sequence[Skipped] = ()) -> None:
        """Write the part of a tile: there and complete afterwards, also after a power cut.

        Args:
            tile: its rows are those of `pairs` and `skipped` together.
            pairs: in any order; scored exactly if the fingerprint names a reference.
            skipped: rows that gave no pair.

        Raises:
            NumericsError: a reference log-prob is not finite.
            DataError: a kept column holds values of several types.
            ResourceError: the disk is full.
            UsageError: the directory cannot be written.
        """
        pairs = sorted(pairs, key=lambda pair: pair.row)
        rows = [*(pair.row for pair in pairs), *(skip.row for skip in skipped)]
        assert sorted(rows) == list(range(tile.start, tile.stop)), "each row of a tile gives one pair or is skipped"
        assert all((pair.reference is not None) == self.fingerprint.is_scored for pair in pairs)
        assert all(_log_probs_fit(pair) for pair in pairs), "one log-prob for each token of a side"
        _check_finite(pairs)
        footer = self._footer(tile, pairs, skipped)
        write_atomically(self.directory / tile.file_name, lambda file: self._write_part(file, pairs, footer))

    def size_of(self, pairs: Sequence[EncodedPair]) -> int:
        """Bytes that the pairs would take in a part, its footer left out."""
        file = io.BytesIO()
        self._write_groups(file, pairs, {})
        return file.tell()

    def _write_part(self, file: BinaryIO, pairs: Sequence[EncodedPair], footer: PartFooter) -> None:
        num_groups = -(-len(pairs) // ROWS_PER_GROUP)
        self._write_groups(file, pairs, {FOOTER_KEY: footer.to_json(), SEAL_KEY: blank_seal(num_groups)})
        seal(file)

    def _write_groups(self, file: BinaryIO, pairs: Sequence[EncodedPair], metadata: Mapping[bytes, Any]) -> None:
        groups = [pairs[start : start + ROWS_PER_GROUP] for start in range(0, len(pairs), ROWS_PER_GROUP)]
        with pq.ParquetWriter(
            file,
            self._schema,
            compression="zstd",
            use_dictionary=["source", *self._kept],
            write_statistics=["row", "source"],
            write_page_checksum=True,
        ) as parquet:
            for group in groups:
                parquet.write_table(self._to_table(group))
            parquet.add_key_value_metadata(metadata)

    def _to_table(self, pairs: Sequence[EncodedPair]) -> pa.Table:
        references = [
            (None, None) if pair.reference is None else (pair.reference.chosen, pair.reference.rejected)
            for pair in pairs
        ]
        sums = [(None, None) if pair.reference is None else pair.reference_sums for pair in pairs]
        columns: dict[str, Any] = {
            "row": [pair.row for pair in pairs],
            "pair_id": [pair.pair_id for pair in pairs],
            "source": [_to_utf8(pair.source) for pair in pairs],
            "weight": [pair.weight for pair in pairs],
            "num_turns": [min(pair.num_turns, np.iinfo(np.int16).max) for pair in pairs],
            "prompt_tokens": [len(pair.prompt_ids) for pair in pairs],
            "chosen_tokens": [len(pair.chosen_ids) for pair in pairs],
            "rejected_tokens": [len(pair.rejected_ids) for pair in pairs],
            "truncated": [pair.truncated for pair in pairs],
            "prompt_hash": np.array([pair.prompt_hash for pair in pairs], dtype=np.uint64),
            "ref_chosen_logps": [chosen for chosen, _ in sums],
            "ref_rejected_logps": [rejected for _, rejected in sums],
            "prompt_ids": _lists([pair.prompt_ids for pair in pairs], np.int32),
            "chosen_ids": _lists([pair.chosen_ids for pair in pairs], np.int32),
            "rejected_ids": _lists([pair.rejected_ids for pair in pairs], np.int32),
            "chosen_mask": _lists([pair.chosen_mask for pair in pairs], np.bool_),
            "rejected_mask": _lists([pair.rejected_mask for pair in pairs], np.bool_),
            "ref_chosen_token_logps": _lists([chosen for chosen, _ in references], np.float32),
            "ref_rejected_token_logps": _lists([rejected for _, rejected in references], np.float32),
        }
        for name, kind in self._kept.items():
            columns[name] = [_encode_kept(pair, name, kind) for pair in pairs]
        return pa.table(columns, schema=self._schema)

    def _footer(self, tile: Tile, pairs: Sequence[EncodedPair], skipped: Sequence[Skipped]) -> PartFooter:
        listed = sorted(skipped, key=lambda skip: skip.row)[:MAX_LISTED_SKIPS]
        return PartFooter(
            tile=tile,
            total_rows=self.total_rows,
            num_pairs=len(pairs),
            fingerprint=self.fingerprint,
            skipped=Counter(skip.reason.value for skip in skipped),
            skipped_rows=tuple(SkippedRow(skip.row, skip.where, skip.reason.value, skip.detail) for skip in listed),
            counts={
                "truncated": sum(pair.truncated for pair in pairs),
                "prompt_tokens": sum(len(pair.prompt_ids) for pair in pairs),
                "chosen_tokens": sum(len(pair.chosen_ids) for pair in pairs),
                "rejected_tokens": sum(len(pair.rejected_ids) for pair in pairs),
            },
        )

    def _find(self, tile: Tile, *, thorough: bool) -> OpenPart | None:
        """A tile's part, verified (its footer alone unless `thorough`); None where there is none."""
        try:
            part = open_part(self.directory / tile.file_name)
        except FileNotFoundError:
            return None
        if part.path.name in self._strays and (found := compare(part.footer.fingerprint, self.fingerprint)):
            raise DamagedPartError(
                part.path, f"it belongs to another run ({'; '.join(found)}), unlike most parts beside it"
            )
        self._check_fingerprint(part.footer.fingerprint, part.path)
        if part.footer.tile != tile:
            raise DamagedPartError(part.path, f"it holds the rows {part.footer.tile.start} to {part.footer.tile.stop}")
        if thorough:
            part.check()
        return part

    def _check_fingerprint(self, stored: Fingerprint, path: Path) -> None:
        if not (differences := compare(stored, self.fingerprint)):
            return
        if compare_references(stored, self.fingerprint) or stored.dtype != self.fingerprint.dtype:
            elsewhere = "another --out"
        else:
            elsewhere = f"another --out (with --reuse {self.directory}, which scores only what is not in it)"
        raise CacheError(
            f"The reference cache {self.directory} was made with other settings than these; in {path.name}: "
            f"{'; '.join(differences)}{self._affected(stored)}. Give the settings that it was made with, or {elsewhere}, or "
            "delete it."
        )

    def _affected(self, stored: Fingerprint) -> str:
        """How many pairs another --max-length changes, in brackets; empty where that is not what differs."""
        before, now = (each.settings.get("max_length") for each in (stored, self.fingerprint))
        if before is None or now is None or before == now:
            return ""
        affected = total = 0
        for path in sorted(self.directory.glob(PART_PATTERN)):
            with suppress(DamagedPartError, FileNotFoundError):
                part = open_part(path)
                columns = PairColumns.of(part.read_small_columns())
                longest = columns.prompt_tokens + np.maximum(columns.chosen_tokens, columns.rejected_tokens)
                affected += int((columns.truncated if now > before else longest > now).sum())
                left_out = sum(part.footer.skipped.get(reason, 0) for reason in _OF_LENGTH) if now > before else 0
                affected += left_out
                total += part.footer.num_pairs + left_out
        return f" ({affected:,} of {total:,} pairs are affected by max_length)"


def _lists(arrays: Sequence[NDArray[Any] | None], dtype: type[np.generic]) -> pa.ListArray:
    """A list column from one array a row, null where there is none."""
    lengths = [0 if array is None else len(array) for array in arrays]
    values = [np.empty(0, dtype), *(array.astype(dtype, copy=False) for array in arrays if array is not None)]
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum([0, *lengths]), pa.int32()),
        pa.array(np.concatenate(values)),
        mask=pa.array([array is None for array in arrays], pa.bool_()),
    )


def _encode_kept(pair: EncodedPair, name: str, kind: KeptType) -> Any:
    value = pair.kept.get(name)
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, default=str)
    if (found := kept_type(value)) != kind and (found, kind) != ("int", "float"):
        raise DataError(
            f"Row {pair.row}: the kept column {name} holds {type(value).__name__} here and {kind} in the rows before. "
            "Make the column uniform, or leave it out of --keep-columns."
        )
    return float(value) if kind == "float" else _to_utf8(value) if kind == "string" else value


def _to_utf8(text: str) -> str:
    """The text, with a mark in place of half characters (lone surrogates), which JSON can hold and Parquet cannot."""
    return text.encode(errors="replace").decode()


def _check_finite(pairs: Sequence[EncodedPair]) -> None:
    bad = [pair.row for pair in pairs if pair.reference is not None and not _is_finite(pair.reference)]
    if bad:
        rows = ", ".join(map(str, bad[:8])) + (f" and {len(bad) - 8} more" if len(bad) > 8 else "")
        raise NumericsError(
            f"The reference gives log-probs that are not finite (NaN or infinity) for the pairs of the rows {rows}. "
            "Nothing was written for this tile. Look at the model's weights and at these rows, or try --dtype float32."
        )


def _is_finite(reference: ReferenceLogps) -> bool:
    return bool(np.isfinite(reference.chosen).all() and np.isfinite(reference.rejected).all())


def _log_probs_fit(pair: EncodedPair) -> bool:
    found = pair.reference
    return found is None or (len(found.chosen), len(found.rejected)) == (len(pair.chosen_ids), len(pair.rejected_ids))


def recorded_dtype(directory: Path) -> str | None:
    """In which dtype the parts of a directory were scored; None where there is no part to read it from."""
    for path in sorted(directory.glob(PART_PATTERN)):
        with suppress(DpoError, OSError):
            return open_part(path).footer.fingerprint.dtype
    return None
