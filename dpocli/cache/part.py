"""One part of a cache on disk: reading it with every byte verified, and the seal that makes that possible."""

import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from dpocli.cache.schema import (
    FOOTER_KEY,
    FORMAT_VERSION,
    SEAL_KEY,
    SMALL_COLUMNS,
    TOKEN_COLUMNS,
    DamagedPartError,
    NewerFormatError,
    PartFooter,
    kept_columns,
)
from dpocli.run.files import translated_file_error

_SEAL_MARK = b"sha256/128 of the footer, of each row group:"

_BLANK_DIGEST = b"0" * 32

_PARQUET_MAGIC = b"PAR1"


@dataclass(frozen=True)
class OpenPart:
    """A part whose footer is as it was written. Not for use by several threads at once."""

    path: Path
    footer: PartFooter
    digest: bytes
    """Of the footer, in which those of the row groups stand: other content, another digest."""
    parquet: pq.ParquetFile
    _source: pa.NativeFile
    _group_digests: tuple[bytes, ...]
    _bounds: tuple[int, ...]
    """Of the row groups in the file, in bytes: see `_group_bounds`."""

    @cached_property
    def token_columns(self) -> list[str]:
        """Those that are read whenever tokens are asked for, kept ones among them."""
        return [*TOKEN_COLUMNS.names, *kept_columns(self.parquet.schema_arrow)]

    def read_small_columns(self) -> pa.Table:
        """The columns of SMALL_COLUMNS, guarded by the checksums of their pages."""
        with _damage_in_words(self.path):
            # One read a row group instead of one a column: far away disks answer slowly.
            together = pq.ParquetFile(
                self._source, metadata=self.parquet.metadata, page_checksum_verification=True, pre_buffer=True
            )
            return together.read(columns=SMALL_COLUMNS.names, use_threads=False)

    def read_group(self, group: int, columns: Sequence[str] | None = None) -> pa.Table:
        """All or some columns of a row group, guarded by its digest (page checksums leave the page headers open)."""
        with _damage_in_words(self.path):
            self._check_group(group)
            return self.parquet.read_row_group(group, columns=columns, use_threads=False)

    def check(self) -> None:
        """Raises DamagedPartError unless every byte is as it was written."""
        with _damage_in_words(self.path):
            for group in range(len(self._group_digests)):
                self._check_group(group)

    def _check_group(self, group: int) -> None:
        start, stop = self._bounds[group : group + 2]
        if _digest(self._source.read_at(stop - start, start)) != self._group_digests[group]:
            raise DamagedPartError(self.path, f"row group {group} (bytes {start} to {stop}) has changed")


def open_part(path: Path) -> OpenPart:
    """A part with its footer read and verified.

    Raises:
        FileNotFoundError: there is none.
        DamagedPartError: it is not as it was written.
        NewerFormatError: a later version of dpocli wrote it.
    """
    with _damage_in_words(path):
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


def blank_seal(num_groups: int) -> bytes:
    """What stands under SEAL_KEY until `seal` fills it in."""
    return _SEAL_MARK + _BLANK_DIGEST * (1 + max(num_groups, 1))


def seal(file: BinaryIO) -> None:
    """Fill in the digests of a Parquet file that is written but for them.

    The digest of the footer is taken with its own place blank. This rule holds in all formats to come, so that an
    older dpocli can tell a newer part from a damaged one.
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
    """The footer of a Parquet file, and where it begins."""
    size = source.size()
    tail = source.read_at(min(size, 8), max(size - 8, 0))
    start = size - 8 - int.from_bytes(tail[:4], "little")
    if tail[4:] != _PARQUET_MAGIC or start < len(_PARQUET_MAGIC):
        raise DamagedPartError(path, "it does not end as a Parquet file does")
    return source.read_at(size - 8 - start, start), start


def _check_footer(footer: bytes, path: Path) -> bytes:
    """The digest that stands in it, which is right."""
    place = footer.rfind(_SEAL_MARK) + len(_SEAL_MARK)
    if place < len(_SEAL_MARK):
        raise DamagedPartError(path, "it carries no digests, so something else than dpocli wrote it")
    after = place + len(_BLANK_DIGEST)
    if _digest(footer[:place] + _BLANK_DIGEST + footer[after:]) != footer[place:after]:
        raise DamagedPartError(path, "its footer has changed")
    return footer[place:after]


def _group_bounds(metadata: pq.FileMetaData, footer_start: int) -> tuple[int, ...]:
    """Where each row group ends and the next begins; the first from byte 0, so that nothing is left out."""
    columns = [metadata.row_group(group).column(0) for group in range(1, metadata.num_row_groups)]
    return (0, *(column.dictionary_page_offset or column.data_page_offset for column in columns), footer_start)


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest()[: len(_BLANK_DIGEST)].encode()


@contextmanager
def _damage_in_words(path: Path) -> Iterator[None]:
    try:
        yield
    except (FileNotFoundError, MemoryError):
        raise
    except (pa.ArrowException, OSError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise translated_file_error(error, f"Reading {path}") from error
        raise DamagedPartError(path, f"it cannot be read ({type(error).__name__})") from error
