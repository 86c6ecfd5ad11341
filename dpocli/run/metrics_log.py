"""`metrics.jsonl`: one object per logged step; a resumed run leaves no gap and no repeat."""

import json
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from dpocli.console.console import without_nan
from dpocli.run.files import write_atomically


class MetricsLog:
    """`metrics.jsonl`: rows are appended and flushed."""

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path = path
        self._enabled = enabled
        self._stream: TextIO | None = None
        self.num_rows = 0
        """Rows in the file since this log first wrote it; 0 where it is not `enabled`."""

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; NaN and infinity become null, since JSON has neither."""
        if not self._enabled:
            return
        if self._stream is None:
            self.truncate_after(sys.maxsize)
            self._stream = self.path.open("a", encoding="utf-8")
        self._stream.write(json.dumps(without_nan(row)) + "\n")
        self._stream.flush()
        self.num_rows += 1

    def sync(self) -> None:
        """Make the rows so far survive a power cut."""
        if self._stream is not None:
            os.fsync(self._stream.fileno())

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, which a resumed run repeats, and a torn last line."""
        self.num_rows = 0
        if not self._enabled or not self.path.exists():
            return
        self.close()
        text = self._text()
        kept = [json.dumps(row) + "\n" for row in _rows(text) if row.get("step", 0) <= step]
        if "".join(kept) != text:
            write_atomically(self.path, "".join(kept))
        self.num_rows = len(kept)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far, without a torn line."""
        return list(_rows(self._text())) if self.path.exists() else []

    def close(self) -> None:
        if self._stream:
            self._stream.close()
            self._stream = None

    def _text(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row
