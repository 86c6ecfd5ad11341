"""JSON Lines (plain or gzip) and JSON lists: counted and hashed in one pass, read with flat memory."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from dpocli.data.row_file import BLOCK_BYTES, RawRow, RowFile, open_binary, open_hashed, surrogate_problem
from dpocli.errors import DataError

BOM = b"\xef\xbb\xbf"

INDEX_STRIDE = 256
"""Rows between two entries of the byte offset index. A seek reads up to this many rows too many."""


class JsonLines(RowFile):
    """A `.jsonl` or `.jsonl.gz` file. Blank lines are not rows, but count in line numbers."""

    def __init__(self, path: Path, first_row: int):
        self._path = path
        self._is_gzip = path.name.lower().endswith(".gz")
        self._index: list[tuple[int, int]] = []  # (byte offset, line number) of every INDEX_STRIDE-th row
        num_rows = offset = 0
        with open_hashed(path) as (file, digest), self._lines(file) as lines:
            for number, line in enumerate(lines, 1):
                if not _is_blank(number, line):
                    if num_rows % INDEX_STRIDE == 0:
                        self._index.append((offset, number))
                    num_rows += 1
                offset += len(line)
        super().__init__(path.name, first_row, num_rows, digest.hexdigest(), path)

    def seek_point(self, row: int) -> int:
        return 0 if self._is_gzip else row - row % INDEX_STRIDE

    def items_from(self, seek_point: int) -> Generator[tuple[int, bytes], None, None]:
        offset, first_number = self._index[seek_point // INDEX_STRIDE]
        with open_binary(self._path) as file:
            if self._is_gzip:
                first_number = 1  # offsets count uncompressed bytes, so gzip files are read from the start
            else:
                file.seek(offset)
            with self._lines(file) as lines:
                for number, line in enumerate(lines, first_number):
                    if not _is_blank(number, line):
                        yield number, line

    def to_row(self, row: int, item: tuple[int, bytes]) -> RawRow:
        number, line = item
        fields, problem = _parse(line.removeprefix(BOM) if number == 1 else line)
        return RawRow(self.first_row + row, f"{self.name}:{number}", fields, problem)

    @contextmanager
    def _lines(self, file: BinaryIO) -> Iterator[Iterable[bytes]]:
        if not self._is_gzip:
            yield file
            return
        try:
            with gzip.GzipFile(fileobj=file) as text:
                yield io.BufferedReader(text, BLOCK_BYTES)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(
                f"{self._path}: the gzip data is damaged or cut off ({error}). Copy or compress the file again; "
                f"`gzip -t {self._path.name}` checks a copy."
            ) from error


class JsonList(RowFile):
    """A `.json` file that holds one list, decoded element by element."""

    def __init__(self, path: Path, first_row: int):
        self._path = path
        with open_hashed(path) as (file, digest):
            num_rows = sum(1 for _ in iterate_list(file, str(path)))
        super().__init__(path.name, first_row, num_rows, digest.hexdigest(), path)

    def seek_point(self, row: int) -> int:  # noqa: ARG002 - a list can only be read from its start
        return 0

    def items_from(self, seek_point: int) -> Generator[Any, None, None]:
        assert seek_point == 0
        with open_binary(self._path) as file:
            yield from iterate_list(file, str(self._path))

    def to_row(self, row: int, item: Any) -> RawRow:
        fields, problem = _object_or_problem(item)
        problem = problem or surrogate_problem(json.dumps(item, ensure_ascii=False))
        return RawRow(self.first_row + row, f"{self.name}: row {row + 1}", None if problem else fields, problem)


def open_json(path: Path, first_row: int) -> RowFile:
    """A `.json` file: a list, or one object per line, which is often published under this name."""
    with open_binary(path) as file:
        start = file.read(4096).removeprefix(BOM).lstrip()
    return JsonLines(path, first_row) if start[:1] in (b"{", b"") else JsonList(path, first_row)


def _is_blank(number: int, line: bytes) -> bool:
    if number == 1:
        line = line.removeprefix(BOM)
    return not line or line.isspace()


def _parse(line: bytes) -> tuple[dict[str, Any] | None, str | None]:
    """(fields, None), or (None, problem)."""
    try:
        text = line.decode("utf-8").rstrip()
    except UnicodeDecodeError as error:
        return None, f"column {error.start + 1}: byte 0x{line[error.start]:02x} is not UTF-8; save the file as UTF-8"
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        return None, f"column {error.colno}: not JSON: {error.msg}; each line must be one JSON object"
    except (ValueError, RecursionError) as error:
        return None, f"not JSON: {error}; each line must be one JSON object"
    fields, problem = _object_or_problem(value)
    if "\\ud" in text or "\\uD" in text:
        problem = problem or surrogate_problem(json.dumps(value, ensure_ascii=False))
    return None if problem else fields, problem


def _object_or_problem(value: Any) -> tuple[dict[str, Any] | None, str | None]:
    if isinstance(value, dict):
        return value, None
    hint = "; if the file is one JSON list, name it .json" if isinstance(value, list) else ""
    return None, f"a JSON object with the fields of the row is expected, found {type(value).__name__}{hint}"


CHUNK_CHARACTERS = 1 << 18

_BLANKS = re.compile(r"[ \t\r\n]*")

_LONGEST_LITERAL = 12
"""Longer than any literal or escape: an error closer to the end of the buffer may only mean that more must be read."""

_STRUCTURE = re.compile(r"[\[\]{},:]")

_FIX = "Fix that place, or write the rows as JSON Lines (.jsonl), where a bad row does not affect the others."


def iterate_list(file: BinaryIO, name: str) -> Iterator[Any]:
    """The elements of the JSON list in `file`. Memory: the largest element.

    Raises:
        DataError: not a list, damaged, or cut off. `name` is how messages call the file.
    """
    reader = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield from _ListDecoder(reader, name).elements()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}). Save it as UTF-8."
        ) from error
    finally:
        reader.detach()  # the caller closes the file


class _ListDecoder:
    """Decodes a list with the standard library, element by element.

    Not ijson: it replaces lone surrogates by `?`, refuses NaN, has no line numbers, and crashes on integers of thousands
    of digits.
    """

    def __init__(self, reader: io.TextIOWrapper, name: str):
        self._reader = reader
        self._name = name
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._line, self._column = 1, 1  # of the buffer's start
        self._count = 0

    def elements(self) -> Iterator[Any]:
        self._expect("[", "a JSON list of rows is expected")
        more = self._peek() != "]"
        while more:
            yield self._element()
            self._count += 1
            if more := self._peek() == ",":
                self._position += 1
                if self._peek() == "]":
                    raise self._damaged("there is a comma before this closing bracket", "Take that comma out.")
        self._expect("]", "',' or ']' is expected")
        if self._peek():
            raise self._damaged("something follows the list")

    def _peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            match = _BLANKS.match(self._buffer, self._position)
            assert match
            self._position = match.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            if not self._read_more():
                return ""

    def _expect(self, character: str, problem: str) -> None:
        found = self._peek()
        if not found:
            raise self._cut_off()
        if found != character:
            raise self._damaged(problem)
        self._position += 1

    def _element(self) -> Any:
        if not self._peek():
            raise self._cut_off()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                in_string = error.msg.startswith("Unterminated string")
                if in_string or error.pos >= len(self._buffer) - _LONGEST_LITERAL:
                    if self._read_more():
                        continue
                    if in_string or not _STRUCTURE.search(self._buffer, error.pos):
                        raise self._cut_off() from error
                self._position = error.pos
                raise self._damaged(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._damaged(str(error)) from error
            # A number at the end of the buffer may continue in the next chunk.
            if end < len(self._buffer) or not self._read_more():
                self._position = end
                return value

    def _read_more(self) -> bool:
        """Double the unread rest, so that an element of any length takes linear time. False at the end of the file."""
        chunk = self._reader.read(max(CHUNK_CHARACTERS, len(self._buffer) - self._position))
        if chunk:
            self._line, self._column = self._place()
            self._buffer, self._position = self._buffer[self._position :] + chunk, 0
        return bool(chunk)

    def _place(self) -> tuple[int, int]:
        """Line and column of the position, counted from 1."""
        newlines = self._buffer.count("\n", 0, self._position)
        if not newlines:
            return self._line, self._column + self._position
        return self._line + newlines, self._position - self._buffer.rfind("\n", 0, self._position)

    def _damaged(self, problem: str, remedy: str = _FIX) -> DataError:
        line, column = self._place()
        return DataError(f"{self._name}:{line}: column {column}: {problem} (after {self._count} whole rows). {remedy}")

    def _cut_off(self) -> DataError:
        return DataError(
            f"{self._name}: the list is cut off after {self._count} whole rows. Copy or write the file again."
        )
