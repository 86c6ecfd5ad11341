"""The tokens of a cache, read by row group when asked for; the groups used last stay in memory."""

import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpocli.cache.columns import PairColumns
from dpocli.cache.part import OpenPart, open_part
from dpocli.cache.schema import ROWS_PER_GROUP, DamagedPartError
from dpocli.cache.table import RowGroup
from dpocli.data.preference import EncodedPair
from dpocli.errors import CacheError

MAX_OPEN_PARTS = 64

RERUN = "Run the command that made it again: it writes what is missing or damaged and keeps the rest."


class RowGroups:
    """The pairs of a store by position. May be used by several threads.

    Args:
        paths: of the parts.
        digests: of the parts, when the store was opened.
        sizes: pairs in each part.
        columns: small columns of all pairs, when the store was opened.
        memory_bytes: bound of the memory for row groups; the last one is kept even if it is larger.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        digests: Sequence[bytes],
        sizes: Sequence[int],
        columns: PairColumns,
        memory_bytes: int,
    ) -> None:
        self._paths, self._digests, self._columns = paths, list(digests), columns
        self._starts = np.cumsum([0, *sizes])
        """Position of the first pair of each part."""
        self._verified: list[set[int]] = [set() for _ in paths]
        """Of each part, the row groups whose small columns, verified by their digest, equal `columns`."""
        self._parts: OrderedDict[int, OpenPart] = OrderedDict()
        self._groups: OrderedDict[tuple[int, int], RowGroup] = OrderedDict()
        self._memory_bytes, self._used_bytes = memory_bytes, 0
        self._lock = threading.Lock()

    def pair(self, position: int) -> EncodedPair:
        """The pair at a position of the store.

        Raises:
            CacheError: the part is missing, damaged, or changed since the store was opened.
        """
        part = int(np.searchsorted(self._starts, position, side="right")) - 1
        group, index = divmod(position - int(self._starts[part]), ROWS_PER_GROUP)
        return self._group(part, group).pair(index)

    def _group(self, part: int, group: int) -> RowGroup:
        with self._lock:
            key = (part, group)
            if key not in self._groups:
                self._groups[key] = self._read(part, group)
                self._used_bytes += self._groups[key].num_bytes
                while len(self._groups) > 1 and self._used_bytes > self._memory_bytes:
                    _, dropped = self._groups.popitem(last=False)
                    self._used_bytes -= dropped.num_bytes
            self._groups.move_to_end(key)
            return self._groups[key]

    def _read(self, part: int, group: int) -> RowGroup:
        opened = self._open(part)
        start = int(self._starts[part]) + group * ROWS_PER_GROUP
        if group in self._verified[part]:
            table = opened.read_group(group, opened.token_columns)
        else:
            table = opened.read_group(group)
            if not self._columns.matches(PairColumns.of(table), start):
                raise DamagedPartError(opened.path, f"row group {group} has changed since the cache was opened")
            self._verified[part].add(group)
        return RowGroup(table, self._columns, start, opened.path)

    def _open(self, part: int) -> OpenPart:
        if part not in self._parts:
            opened = self._parts[part] = open_known(self._paths[part])
            if opened.digest != self._digests[part]:
                self._digests[part] = opened.digest
                self._verified[part].clear()
            if len(self._parts) > MAX_OPEN_PARTS:
                self._parts.popitem(last=False)
        self._parts.move_to_end(part)
        return self._parts[part]


def open_known(path: Path) -> OpenPart:
    """Open a part that existed before.

    Raises:
        CacheError: it is missing or damaged.
    """
    try:
        return open_part(path)
    except FileNotFoundError:
        raise CacheError(f"The part {path} has disappeared. {RERUN}") from None
