"""A row group of a part in memory, and the pairs that it holds."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpocli.cache.columns import PairColumns
from dpocli.cache.schema import TOKEN_COLUMNS, DamagedPartError, kept_columns
from dpocli.data.encoder import pair_id
from dpocli.data.preference import EncodedPair, ReferenceLogps


@dataclass(frozen=True, slots=True)
class Ragged:
    """A list column: one array a row, or None."""

    values: NDArray[Any]
    offsets: NDArray[np.int32]
    is_valid: NDArray[np.bool_]

    @classmethod
    def of(cls, column: pa.ChunkedArray) -> "Ragged":
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


class RowGroup:
    """A row group in memory.

    Args:
        table: its columns; the small ones are not looked at.
        columns: the small columns of all pairs of the store.
        start: the position of its first pair there.
        path: of the part.
    """

    def __init__(self, table: pa.Table, columns: PairColumns, start: int, path: Path) -> None:
        self._columns, self._start, self._path = columns, start, path
        kept = kept_columns(table.schema)
        self._kept = {name: (table[name].to_pylist(), is_json) for name, is_json in kept.items()}
        self._ragged = {name: Ragged.of(table[name]) for name in TOKEN_COLUMNS.names}
        self.num_bytes = table.select([*TOKEN_COLUMNS.names, *kept]).nbytes

    def pair(self, row: int) -> EncodedPair:
        """The pair at a place of the group, its tokens checked against their hash."""
        tokens = {name: ragged[row] for name, ragged in self._ragged.items()}
        chosen_logps, rejected_logps = tokens.pop("ref_chosen_token_logps"), tokens.pop("ref_rejected_token_logps")
        known = self._columns.of_pair(self._start + row)
        if pair_id(**tokens) != known["pair_id"]:
            raise DamagedPartError(
                self._path, f"the tokens of row {known['row']} do not have the hash that stands beside them"
            )
        kept = {name: _decode(values[row], is_json) for name, (values, is_json) in self._kept.items()}
        reference = None if chosen_logps is None else ReferenceLogps(chosen_logps, rejected_logps)
        return EncodedPair(**known, **tokens, kept=kept, reference=reference)


def _decode(value: Any, is_json: bool) -> Any:
    return json.loads(value) if is_json and value is not None else value
