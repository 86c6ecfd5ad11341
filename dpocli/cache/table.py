"""Encoded pairs ↔ Arrow tables with the columns of a cache."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from dpocli.cache.columns import PairColumns
from dpocli.cache.kept_columns import KeptType, decode_kept, encode_kept, to_utf8
from dpocli.cache.schema import TOKEN_COLUMNS, DamagedPartError, cache_schema, kept_columns
from dpocli.data.pair_tokens import pair_id
from dpocli.data.preference import EncodedPair, ReferenceLogps


def to_table(pairs: Sequence[EncodedPair], kept: Mapping[str, KeptType]) -> pa.Table:
    """The pairs as a table of `cache_schema(kept)`.

    Raises:
        DataError: a kept value does not fit the type of its column.
    """
    references = [
        (None, None) if pair.reference is None else (pair.reference.chosen, pair.reference.rejected) for pair in pairs
    ]
    sums = [(None, None) if pair.reference is None else pair.reference_sums for pair in pairs]
    columns: dict[str, Any] = {
        "row": [pair.row for pair in pairs],
        "pair_id": [pair.pair_id for pair in pairs],
        "source": [to_utf8(pair.source) for pair in pairs],
        "weight": [pair.weight for pair in pairs],
        "num_turns": [min(pair.num_turns, np.iinfo(np.int16).max) for pair in pairs],
        "prompt_tokens": [len(pair.prompt_ids) for pair in pairs],
        "chosen_tokens": [len(pair.chosen_ids) for pair in pairs],
        "rejected_tokens": [len(pair.rejected_ids) for pair in pairs],
        "truncated": [pair.truncated for pair in pairs],
        "prompt_hash": np.array([pair.prompt_hash for pair in pairs], dtype=np.uint64),
        "ref_chosen_logps": [chosen for chosen, _ in sums],
        "ref_rejected_logps": [rejected for _, rejected in sums],
        "prompt_ids": _list_column([pair.prompt_ids for pair in pairs], np.int32),
        "chosen_ids": _list_column([pair.chosen_ids for pair in pairs], np.int32),
        "rejected_ids": _list_column([pair.rejected_ids for pair in pairs], np.int32),
        "chosen_mask": _list_column([pair.chosen_mask for pair in pairs], np.bool_),
        "rejected_mask": _list_column([pair.rejected_mask for pair in pairs], np.bool_),
        "ref_chosen_token_logps": _list_column([chosen for chosen, _ in references], np.float32),
        "ref_rejected_token_logps": _list_column([rejected for _, rejected in references], np.float32),
    }
    for name, kind in kept.items():
        columns[name] = [encode_kept(pair, name, kind) for pair in pairs]
    return pa.table(columns, schema=cache_schema(kept))


def _list_column(arrays: Sequence[NDArray[Any] | None], dtype: type[np.generic]) -> pa.ListArray:
    """A list column of one array per row; None becomes null."""
    lengths = [0 if array is None else len(array) for array in arrays]
    values = [np.empty(0, dtype), *(array.astype(dtype, copy=False) for array in arrays if array is not None)]
    return pa.ListArray.from_arrays(
        pa.array(np.cumsum([0, *lengths]), pa.int32()),
        pa.array(np.concatenate(values)),
        mask=pa.array([array is None for array in arrays], pa.bool_()),
    )


class RowGroup:
    """A row group in memory, whose pairs are made when asked for.

    Args:
        table: its columns; the small ones are not used.
        columns: the small columns of all pairs of the store.
        start: the position of its first pair in the store.
        path: of the part.
    """

    def __init__(self, table: pa.Table, columns: PairColumns, start: int, path: Path) -> None:
        self._columns, self._start, self._path = columns, start, path
        kept = kept_columns(table.schema)
        self._kept = [(field, table[field.name].to_pylist()) for field in kept]
        self._lists = {name: table[name].combine_chunks() for name in TOKEN_COLUMNS.names}
        self.num_bytes = table.select([*TOKEN_COLUMNS.names, *(field.name for field in kept)]).nbytes

    def pair(self, index: int) -> EncodedPair:
        """The pair at an index of the group; its tokens are checked against the pair id."""
        tokens = {name: _array(lists[index]) for name, lists in self._lists.items()}
        chosen_logps, rejected_logps = tokens.pop("ref_chosen_token_logps"), tokens.pop("ref_rejected_token_logps")
        known = self._columns.fields_of(self._start + index)
        if pair_id(**tokens) != known["pair_id"]:
            raise DamagedPartError(self._path, f"the tokens of row {known['row']} do not match their pair_id")
        kept = {field.name: decode_kept(values[index], field) for field, values in self._kept}
        reference = None if chosen_logps is None else ReferenceLogps(chosen_logps, rejected_logps)
        return EncodedPair(**known, **tokens, kept=kept, reference=reference)


def _array(values: pa.ListScalar) -> Any:
    """A copy, since torch needs writable memory and a view would keep the row group in memory."""
    return np.array(values.values) if values.is_valid else None
