"""One part of a cache on disk: writing it with a seal, and reading it with every byte verified.

The seal (key `dpocli_seal`) holds a digest of the footer and one of each row group, so that no byte is unprotected.
"""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpocli.cache.kept_columns import KeptType
from dpocli.cache.schema import (
    FOOTER_KEY,
    FORMAT_VERSION,
    ROWS_PER_GROUP,
    SEAL_KEY,
    SMALL_COLUMNS,
    TOKEN_COLUMNS,
    DamagedPartError,
    NewerFormatError,
    PartFooter,
    cache_schema,
    kept_columns,
)
from dpocli.cache.table import to_table
from dpocli.data.preference import EncodedPair
from dpocli.run.files import translated_file_error

_SEAL_MARK = b"sha256/128 of the footer, of each row group:"

_BLANK_DIGEST = b"0" * 32

_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class OpenPart:
    """A part whose footer is verified. For one thread at a time."""

    path: Path
    footer: PartFooter
    digest: bytes
    """Of the footer, which contains the digests of the row groups, so that it identifies the content."""
    parquet: pq.ParquetFile
    _source: pa.NativeFile
    _group_digests: tuple[bytes, ...]
    _bounds: tuple[int, ...]
    """Byte positions of the row groups, see `_group_bounds`."""

    @cached_property
    def token_columns(self) -> list[str]:
        """The columns to read for tokens, kept ones included."""
        return [*TOKEN_COLUMNS.names, *(field.name for field in kept_columns(self.parquet.schema_arrow))]

    def read_small_columns(self) -> pa.Table:
        """The columns of SMALL_COLUMNS, verified by the checksums of their pages."""
        with _reporting_damage(self.path):
            # One read per row group instead of one per column, since network disks have a high latency.
            together = pq.ParquetFile(
                self._source, metadata=self.parquet.metadata, page_checksum_verification=True, pre_buffer=True
            )
            return together.read(columns=SMALL_COLUMNS.names, use_threads=False)

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """All or some columns of a row group, verified by its digest (page checksums do not cover page headers)."""
        with _reporting_damage(self.path):
            self._check_group(group)
            return self.parquet.read_row_group(group, columns=columns, use_threads=False)

    def check(self) -> None:
        """Raise DamagedPartError if any byte of a row group has changed."""
        with _reporting_damage(self.path):
            for group in range(len(self._group_digests)):
                self._check_group(group)

    def _check_group(self, group: int) -> None:
        start, stop = self._bounds[group : group + 2]
        if _digest(self._source.read_at(stop - start, start)) != self._group_digests[group]:
            raise DamagedPartError(self.path, f"row group {group} (bytes {start} to {stop}) has changed")


def open_part(path: Path) -> OpenPart:
    """Open a part and verify its footer.

    Raises:
        FileNotFoundError: it does not exist.
        DamagedPartError: its footer has changed.
        NewerFormatError: a later version of dpocli wrote it.
    """
    with _reporting_damage(path):
        source = pa.OSFile(str(path))
        footer, footer_start = _read_parquet_footer(source, path)
        digest = _check_footer(footer, path)
        parquet = pq.ParquetFile(source, page_checksum_verification=True, pre_buffer=False)
        text, sealed = parquet.metadata.metadata[FOOTER_KEY], parquet.metadata.metadata[SEAL_KEY]
        if (version := json.loads(text)["format"]) > FORMAT_VERSION:
            raise NewerFormatError(path, version)
        bounds = _group_bounds(parquet.metadata, footer_start)
        digests = tuple(re.findall(rb".{32}", sealed.removeprefix(_SEAL_MARK)))[1:]
        return OpenPart(path, PartFooter.from_json(text), digest, parquet, source, digests, bounds)


def write_part(
    file: BinaryIO, pairs: Sequence[EncodedPair], kept: Mapping[str, KeptType], footer: PartFooter | None
) -> None:
    """Write the pairs as a sealed part; without a footer, only their row groups."""
    groups = [pairs[start : start + ROWS_PER_GROUP] for start in range(0, len(pairs), ROWS_PER_GROUP)]
    with pq.ParquetWriter(
        file,
        cache_schema(kept),
        compression="zstd",
        use_dictionary=["source", *kept],
        write_statistics=["row", "source"],
        write_page_checksum=True,
    ) as parquet:
        for group in groups:
            parquet.write_table(to_table(group, kept))
        if footer:
            parquet.add_key_value_metadata({FOOTER_KEY: footer.to_json(), SEAL_KEY: _blank_seal(len(groups))})
    if footer:
        _seal(file)


def _blank_seal(num_groups: int) -> bytes:
    """The value of SEAL_KEY until `seal` fills in the digests."""
    return _SEAL_MARK + _BLANK_DIGEST * (1 + max(num_groups, 1))


def _seal(file: BinaryIO) -> None:
    """Fill in the digests of a Parquet file that is otherwise complete.

    The digest of the footer is computed with its own place blank. All later formats must keep this rule, so that an
    older dpocli can distinguish a newer part from a damaged one.
    """
    file.flush()
    source = pa.PythonFile(file, mode="r")
    footer, footer_start = _read_parquet_footer(source, Path(file.name))
    bounds = _group_bounds(pq.read_metadata(source), footer_start)
    groups = [_digest(source.read_at(stop - start, start)) for start, stop in itertools.pairwise(bounds)]
    place = footer.rindex(_SEAL_MARK) + len(_SEAL_MARK)
    after = place + len(_BLANK_DIGEST)
    assert footer[place:].startswith(_BLANK_DIGEST * (1 + len(groups)))
    filled = footer[:after] + b"".join(groups) + footer[after + len(_BLANK_DIGEST) * len(groups) :]
    file.seek(footer_start)
    file.write(filled[:place] + _digest(filled) + filled[after:])


def _read_parquet_footer(source: pa.NativeFile, path: Path) -> tuple[bytes, int]:
    """The footer of a Parquet file, and its position."""
    size = source.size()
    tail = source.read_at(min(size, 8), max(size - 8, 0))
    start = size - 8 - int.from_bytes(tail[:4], "little")
    if tail[4:] != _PARQUET_MAGIC or start < len(_PARQUET_MAGIC):
        raise DamagedPartError(path, "its end is not that of a Parquet file")
    return source.read_at(size - 8 - start, start), start


def _check_footer(footer: bytes, path: Path) -> bytes:
    """Verify the footer, and return its digest."""
    place = footer.rfind(_SEAL_MARK) + len(_SEAL_MARK)
    if place < len(_SEAL_MARK):
        raise DamagedPartError(path, "it carries no digests, so it was not written by dpocli")
    after = place + len(_BLANK_DIGEST)
    if _digest(footer[:place] + _BLANK_DIGEST + footer[after:]) != footer[place:after]:
        raise DamagedPartError(path, "its footer has changed")
    return footer[place:after]


def _group_bounds(metadata: pq.FileMetaData, footer_start: int) -> tuple[int, ...]:
    """Where each row group ends and the next begins. The first begins at byte 0, so that all bytes are covered."""
    columns = [metadata.row_group(group).column(0) for group in range(1, metadata.num_row_groups)]
    return (0, *(column.dictionary_page_offset or column.data_page_offset for column in columns), footer_start)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[: len(_BLANK_DIGEST)].encode()


@contextmanager
def _reporting_damage(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise translated_file_error(error, f"Reading {path}") from error
        raise DamagedPartError(path, f"it cannot be read ({type(error).__name__})") from error
