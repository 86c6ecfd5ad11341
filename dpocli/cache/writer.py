"""Filling a reference cache: which parts are missing, and writing them."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpocli.cache.columns import PairColumns
from dpocli.cache.fingerprint import Fingerprint, compare, compare_references
from dpocli.cache.kept_columns import KeptType
from dpocli.cache.part import OpenPart, open_part, write_part
from dpocli.cache.schema import DamagedPartError, PartFooter, Tile, tiles
from dpocli.console.console import Console
from dpocli.data.preference import EncodedPair, ReferenceLogps, Skipped, SkipReason
from dpocli.errors import CacheError, DpoError, NumericsError
from dpocli.run.files import make_directory, remove_stale_temporaries, write_atomically
from dpocli.run.output_check import PART_PATTERN, check_destination

_LENGTH_REASONS = (SkipReason.TOO_LONG, SkipReason.PROMPT_TOO_LONG, SkipReason.TRUNCATED_AWAY)


class CacheWriter:
    """Fills one cache directory. Any number of workers may do so, in any order, any number of times.

    Args:
        directory: of the cache; created by `prepare`.
        fingerprint: of the values to be written.
        kept: types of the kept columns.
        console: for warnings about damaged parts.
    """

    def __init__(
        self,
        directory: Path,
        fingerprint: Fingerprint,
        kept: Mapping[str, KeptType] | None = None,
        console: Console | None = None,
    ) -> None:
        self.directory = directory
        self.fingerprint = fingerprint
        self.total_rows = fingerprint.total_rows
        self.tiles = tiles(fingerprint.total_rows, fingerprint.rows_per_part)
        self._kept = dict(kept or {})
        self._console = console or Console()
        self._strays: frozenset[str] = frozenset()
        """Names of a few parts with other settings: copied here by mistake, and rewritten."""

    def prepare(self) -> None:
        """Create the directory, and remove what killed writers left in it. Raises UsageError if it cannot be written."""
        make_directory(self.directory)
        remove_stale_temporaries(self.directory)

    def check(self) -> None:
        """Check that the directory is free, or holds parts of this cache. Changes nothing.

        Raises:
            UsageError: it is something else than a cache.
            CacheError: they were made with other settings. Parts with other settings that are fewer than the others count
                as damaged instead.
        """
        check_destination(self.directory)
        parts = sorted(self.directory.glob(PART_PATTERN))
        strays: dict[str, CacheError] = {}
        num_own = 0
        for path in parts:
            try:
                self._check_fingerprint(open_part(path).footer.fingerprint, path)
                num_own += 1
            except (DamagedPartError, FileNotFoundError):
                continue  # counts as missing
            except CacheError as error:
                strays[path.name] = error
        if strays and len(strays) >= num_own:
            raise next(iter(strays.values()))
        self._strays = frozenset(strays)
        expected = {tile.file_name for tile in self.tiles}
        if foreign := [path for path in parts if path.name not in expected]:
            raise CacheError(
                f"The reference cache {self.directory} holds {foreign[0].name}, which is not a part of it "
                f"({len(self.tiles)} parts of {self.total_rows:,} rows). Remove that file, or choose another --out."
            )

    def set_information(self, information: Mapping[str, Any]) -> None:
        """Set the information in the fingerprint of the parts written from now on; it is never compared."""
        self.fingerprint = replace(self.fingerprint, information=information)

    def missing(self, index: int = 0, count: int = 1) -> list[Tile]:
        """The tiles that worker `index` of `count` has to write: without a part, or with a damaged one.

        Expected names are opened, since directory listings lag on some file systems.

        Raises:
            CacheError: a part was made with other settings, or by a later version.
        """
        return [tile for tile in self.tiles[index::count] if not self.is_present(tile)]

    def is_present(self, tile: Tile) -> bool:
        """Whether a tile has an intact part; every byte is verified, and a damaged part is reported."""
        try:
            part = self._find(tile)
            if part:
                part.check()
            return part is not None
        except DamagedPartError as error:
            self._console.warn(f"{error} It is rewritten now.")
            return False

    def progress(self) -> tuple[int, int]:
        """(existing parts, parts in all), of all workers."""
        return sum(1 for _ in self.footers()), len(self.tiles)

    def footers(self) -> Iterator[PartFooter]:
        """The footers of the existing parts, in order of rows."""
        for tile in self.tiles:
            with suppress(DamagedPartError):
                if part := self._find(tile):
                    yield part.footer

    def write(self, tile: Tile, pairs: Sequence[EncodedPair], skipped: Sequence[Skipped] = ()) -> None:
        """Write the part of a tile, atomically and durably.

        Args:
            tile: `pairs` and `skipped` together cover its rows.
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
        assert all(_has_logp_per_token(pair) for pair in pairs), "one log-prob for each token of a side"
        _check_finite(pairs)
        footer = PartFooter.of(tile, self.fingerprint, pairs, skipped)
        write_atomically(self.directory / tile.file_name, lambda file: write_part(file, pairs, self._kept, footer))

    def size_of(self, pairs: Sequence[EncodedPair]) -> int:
        """Bytes that the pairs would take in a part, without its footer."""
        file = io.BytesIO()
        write_part(file, pairs, self._kept, footer=None)
        return file.tell()

    def _find(self, tile: Tile) -> OpenPart | None:
        """The part of a tile, its footer verified; None if there is none."""
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
        """How many pairs another --max-length changes, in brackets; empty if it is the same."""
        before, now = (each.settings.get("max_length") for each in (stored, self.fingerprint))
        if before is None or now is None or before == now:
            return ""
        affected = total = 0
        for path in sorted(self.directory.glob(PART_PATTERN)):
            with suppress(DamagedPartError, FileNotFoundError):
                part = open_part(path)
                columns = PairColumns.of(part.read_small_columns())
                longest = columns.prompt_tokens + np.maximum(columns.chosen_tokens, columns.rejected_tokens)
                skipped = sum(part.footer.skipped.get(reason, 0) for reason in _LENGTH_REASONS) if now > before else 0
                affected += int((columns.truncated if now > before else longest > now).sum()) + skipped
                total += part.footer.num_pairs + skipped
        return f" ({affected:,} of {total:,} pairs are affected by max_length)"


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


def _has_logp_per_token(pair: EncodedPair) -> bool:
    found = pair.reference
    return found is None or (len(found.chosen), len(found.rejected)) == (len(pair.chosen_ids), len(pair.rejected_ids))


def recorded_dtype(directory: Path) -> str | None:
    """The dtype in which the parts of a directory were scored; None without any part."""
    for path in sorted(directory.glob(PART_PATTERN)):
        with suppress(DpoError, OSError):
            return open_part(path).footer.fingerprint.dtype
    return None
