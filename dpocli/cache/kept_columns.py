"""Columns that `--keep-columns` carries along: their types, and their values in a part."""

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import pyarrow as pa

from dpocli.data.preference import EncodedPair
from dpocli.errors import DataError

KeptType = Literal["string", "int", "float", "bool", "json"]

_ARROW_TYPES = {
    "string": pa.string(),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
    "json": pa.string(),
}

_JSON_MARK = {b"dpocli": b"json"}


def kept_field(name: str, kind: KeptType) -> pa.Field:
    """The Arrow field of a kept column; JSON text is marked in its metadata."""
    return pa.field(name, _ARROW_TYPES[kind], metadata=_JSON_MARK if kind == "json" else None)


def is_json(field: pa.Field) -> bool:
    """Whether the values of a kept column are JSON text."""
    return (field.metadata or {}) == _JSON_MARK


def kept_types(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, KeptType]:
    """The narrowest type that holds all values of each column; string where all are None.

    All workers must pass the same rows (the first N of the data), so that all parts have one schema.
    """
    seen: dict[str, set[KeptType]] = {name: set() for name in names}
    for row in rows:
        for name in names:
            if (value := row.get(name)) is not None:
                seen[name].add(_type_of(value))
    return {name: _widest(kinds) for name, kinds in seen.items()}


def _type_of(value: Any) -> KeptType:
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    return "float" if isinstance(value, float) else "string" if isinstance(value, str) else "json"


def _widest(kinds: set[KeptType]) -> KeptType:
    if kinds == {"int", "float"}:
        return "float"
    return kinds.copy().pop() if len(kinds) == 1 else "json" if kinds else "string"


def encode_kept(pair: EncodedPair, name: str, kind: KeptType) -> Any:
    """The value of a kept column as the part stores it.

    Raises:
        DataError: it does not fit the type of the column.
    """
    value = pair.kept.get(name)
    if value is None:
        return None
    if kind == "json":
        return json.dumps(value, default=str)
    if (found := _type_of(value)) != kind and (found, kind) != ("int", "float"):
        raise DataError(
            f"Row {pair.row}: the kept column {name} holds {type(value).__name__} here and {kind} in the rows before. "
            "Make the column uniform, or leave it out of --keep-columns."
        )
    return float(value) if kind == "float" else to_utf8(value) if kind == "string" else value


def decode_kept(value: Any, field: pa.Field) -> Any:
    """The inverse of `encode_kept`."""
    return json.loads(value) if value is not None and is_json(field) else value


def to_utf8(text: str) -> str:
    """The text with `?` in place of lone surrogates, which JSON can hold and Parquet cannot."""
    return text.encode(errors="replace").decode()
