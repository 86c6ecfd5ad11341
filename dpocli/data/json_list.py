"""A JSON list, decoded element by element."""

import io
import json
import re
from collections.abc import Iterator
from typing import Any, BinaryIO

from dpocli.errors import DataError

CHUNK_CHARACTERS = 1 << 18
_WHITESPACE = " \t\r\n"
_LONGEST_LITERAL = 12
"""No literal or escape is longer: an error this close to the end of the buffer may only mean that more must be read."""

_STRUCTURE = re.compile(r"[\[\]{},:]")
MEND = "Mend that place, or write the rows as JSON Lines (.jsonl), where one bad row leaves the others readable."


def iterate_list(file: BinaryIO, name: str) -> Iterator[Any]:
    """The elements of the JSON list in `file`; memory is that of the largest element.

    Raises:
        DataError: no list, damaged, or cut off. `name` stands in the message.
    """
    reader = io.TextIOWrapper(file, encoding="utf-8-sig", newline="")
    try:
        yield from _ListDecoder(reader, name).elements()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{name}: not UTF-8 ({error.reason}, byte 0x{error.object[error.start]:02x}). Save it as UTF-8."
        ) from error
    finally:
        reader.detach()  # closing the file is the caller's


class _ListDecoder:
    def __init__(self, reader: io.TextIOWrapper, name: str):
        self._reader = reader
        self._name = name
        self._decoder = json.JSONDecoder()
        self._buffer = ""
        self._position = 0
        self._line, self._column = 1, 1  # of the buffer's start
        self._count = 0

    def elements(self) -> Iterator[Any]:
        if self._next_character() != "[":
            raise self._damaged("a JSON list of rows is expected")
        self._position += 1
        separator = "" if self._next_character() == "]" else ","
        while separator == ",":
            yield self._element()
            self._count += 1
            separator = self._next_character()
            if separator == ",":
                self._position += 1
                if self._next_character() == "]":
                    raise self._damaged("there is a comma before this closing bracket", "Take that comma out.")
        if separator not in ("]", ""):
            raise self._damaged("',' or ']' is expected")
        if self._next_character() != "]":
            raise self._cut_off()
        self._position += 1
        if self._next_character():
            raise self._damaged("something follows the list")

    def _next_character(self) -> str:
        """The next character that is no white space, not consumed; empty at the end of the file."""
        while True:
            while self._position < len(self._buffer):
                if (character := self._buffer[self._position]) not in _WHITESPACE:
                    return character
                self._position += 1
            if not self._read_more():
                return ""

    def _element(self) -> Any:
        if not self._next_character():
            raise self._cut_off()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._position)
            except json.JSONDecodeError as error:
                offset = error.pos - self._position
                if _may_be_cut(error):
                    if self._read_more():
                        continue
                    if _is_cut(error):
                        raise self._cut_off() from error
                self._position += offset
                raise self._damaged(error.msg) from error
            except (ValueError, RecursionError) as error:
                raise self._damaged(str(error)) from error
            else:
                # A number that ends with the buffer may go on.
                if end < len(self._buffer) or not self._read_more():
                    self._position = end
                    return value

    def _read_more(self) -> bool:
        """Doubles what is left, so that an element of any length costs linear time."""
        self._line, self._column = self._place()
        rest = self._buffer[self._position :]
        chunk = self._reader.read(max(CHUNK_CHARACTERS, len(rest)))
        self._buffer, self._position = rest + chunk, 0
        return bool(chunk)

    def _place(self) -> tuple[int, int]:
        newlines = self._buffer.count("\n", 0, self._position)
        if not newlines:
            return self._line, self._column + self._position
        return self._line + newlines, self._position - self._buffer.rfind("\n", 0, self._position)

    def _damaged(self, problem: str, remedy: str = MEND) -> DataError:
        line, column = self._place()
        return DataError(f"{self._name}:{line}: column {column}: {problem} (after {self._count} whole rows). {remedy}")

    def _cut_off(self) -> DataError:
        return DataError(
            f"{self._name}: the list is cut off after {self._count} whole rows. Copy or write the file again."
        )


def _is_cut(error: json.JSONDecodeError) -> bool:
    """Whether what stands at the end of a file is only the beginning of something."""
    return error.msg.startswith("Unterminated string") or not _STRUCTURE.search(error.doc, error.pos)


def _may_be_cut(error: json.JSONDecodeError) -> bool:
    return error.msg.startswith("Unterminated string") or error.pos >= len(error.doc) - _LONGEST_LITERAL
