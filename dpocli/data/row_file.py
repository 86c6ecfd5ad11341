"""Base of the input files: raw rows, a content hash, and reading from any row."""

import hashlib
import io
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from dpocli.errors import DataError, UsageError

if TYPE_CHECKING:
    from hashlib import _Hash

    from _typeshed import WriteableBuffer

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class RawRow:
    """One row of the input: an object, or the problem that it has."""

    row: int
    """Index in the whole data set, counted over all files in the order given."""
    where: str
    """`prefs.jsonl:17` (lines count from 1) or `prefs.parquet: row 17` (rows of the file count from 1)."""
    fields: Mapping[str, Any] | None
    problem: str | None = None
    """The problem where `fields` is None; the caller decides whether to stop."""


@dataclass(frozen=True, slots=True)
class ContentPart:
    """Content of one input file. The hash and the order decide values; the name is for messages only."""

    name: str
    sha256: str
    num_rows: int


@dataclass(slots=True)
class _Cursor:
    next_row: int
    items: Iterator[Any]


class RowFile(ABC):
    """One input file (or data set) whose rows can be read from any row on.

    The position is kept between reads: consecutive ranges take one pass, also where a file can only be read from its
    start. One reader at a time.

    Args:
        name: base name of the file.
        first_row: index of its first row in the whole data set.
        num_rows: how many rows it has.
        sha256: hash of its bytes.
        path: the file itself, to detect changes.
    """

    def __init__(self, name: str, first_row: int, num_rows: int, sha256: str, path: Path | None = None):
        self.name = name
        self.first_row = first_row
        self.num_rows = num_rows
        self.content = ContentPart(name, sha256, num_rows)
        self._cursor: _Cursor | None = None
        self._file = path
        self._signature = _signature(path)

    @abstractmethod
    def seek_point(self, row: int) -> int:
        """The last row at or before `row` from which reading can start."""

    @abstractmethod
    def items_from(self, seek_point: int) -> Generator[Any, None, None]:
        """What `to_row` parses, one item a row, from a seek point to the end of the file."""

    @abstractmethod
    def to_row(self, row: int, item: Any) -> RawRow:
        """Parse the item of row `row`, counted in this file."""

    def read(self, start: int, stop: int) -> Iterator[RawRow]:
        """Rows [start, stop), counted in this file.

        Raises:
            DataError: the file is damaged, or changed since it was opened.
        """
        if _signature(self._file) != self._signature:
            raise self._changed()
        cursor, self._cursor = self._cursor, None
        seek_point = self.seek_point(start)
        if cursor is None or not seek_point <= cursor.next_row <= start:
            cursor = _Cursor(seek_point, self.items_from(seek_point))
        while cursor.next_row < stop:
            try:
                item = next(cursor.items)
            except StopIteration:
                raise self._changed() from None
            cursor.next_row += 1
            if cursor.next_row > start:
                self._cursor = cursor  # before the yield: the consumer may stop here for good
                yield self.to_row(cursor.next_row - 1, item)

    def _changed(self) -> DataError:
        return DataError(
            f"{self._file or self.name}: changed while it was being read ({self.num_rows} rows when it was opened). "
            "Stop what writes to it and run the same command again."
        )


def _signature(path: Path | None) -> tuple[int, int] | None:
    if path is None or not path.exists():
        return None
    status = path.stat()
    return status.st_size, status.st_mtime_ns


class HashingReader(io.RawIOBase):
    """Hashes what is read, so that counting and hashing take one pass."""

    def __init__(self, file: io.BufferedReader, digest: "_Hash"):
        self._file = file
        self._digest = digest

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: "WriteableBuffer") -> int:
        view = memoryview(buffer)
        count = self._file.readinto(view)
        self._digest.update(view[:count])
        return count


@contextmanager
def open_hashed(path: Path) -> Iterator[tuple[BinaryIO, "_Hash"]]:
    """The file, and the hash of its bytes, which is complete when the block ends."""
    digest = hashlib.sha256()
    with open_binary(path) as file, io.BufferedReader(HashingReader(file, digest), BLOCK_BYTES) as buffered:
        yield buffered, digest
        while buffered.read(BLOCK_BYTES):
            pass


def open_binary(path: Path) -> io.BufferedReader:
    """The file, read in large blocks.

    Raises:
        UsageError: it cannot be opened.
    """
    try:
        return io.BufferedReader(io.FileIO(path), BLOCK_BYTES)
    except OSError as error:
        raise UsageError(
            f"--data {path}: cannot be read: {error.strerror}. Give a file that this user may read."
        ) from error


def file_sha256(path: Path) -> str:
    """Hash of the bytes of a file."""
    with open_hashed(path) as (_, digest):
        pass
    return digest.hexdigest()


def surrogate_problem(text: str) -> str | None:
    """A message about a lone surrogate (`\\ud83d`), which JSON can hold and tokenizers refuse; None without one."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = text[error.start].encode("unicode_escape").decode()
        return f"{half} is half of a character; write the whole pair of \\u escapes, or the character itself"
    return None
