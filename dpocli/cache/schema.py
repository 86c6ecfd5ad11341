"""How a reference cache lies on disk: tiles and their names, columns, the footer, and the seal over all of it.

Format 1. A part is a Parquet file that any reader of Parquet opens; what `dpocli` adds stands in its key-value
metadata: the footer (key `dpocli`) and the seal (key `dpocli_seal`), digests that leave no byte unguarded.
"""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa

from dpocli.cache.fingerprint import Fingerprint
from dpocli.errors import CacheError, UsageError

FORMAT_VERSION = 1

ROWS_PER_GROUP = 64

MAX_LISTED_SKIPS = 256
"""Skipped rows that a part lists; all of them are counted."""

FOOTER_KEY, SEAL_KEY = b"dpocli", b"dpocli_seal"

_IDS, _MASK, _LOGPS = pa.list_(pa.int32()), pa.list_(pa.bool_()), pa.list_(pa.float32())

SMALL_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("pair_id", pa.string(), nullable=False),
        pa.field("source", pa.string(), nullable=False),
        pa.field("weight", pa.float32(), nullable=False),
        pa.field("num_turns", pa.int16(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("chosen_tokens", pa.int32(), nullable=False),
        pa.field("rejected_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),
        pa.field("prompt_hash", pa.uint64(), nullable=False),
        pa.field("ref_chosen_logps", pa.float64()),
        pa.field("ref_rejected_logps", pa.float64()),
    ]
)
"""What readers load at start. They stand first in each row group, so that one short read fetches them."""

TOKEN_COLUMNS = pa.schema(
    [
        pa.field("prompt_ids", _IDS, nullable=False),
        pa.field("chosen_ids", _IDS, nullable=False),
        pa.field("rejected_ids", _IDS, nullable=False),
        pa.field("chosen_mask", _MASK),
        pa.field("rejected_mask", _MASK),
        pa.field("ref_chosen_token_logps", _LOGPS),
        pa.field("ref_rejected_token_logps", _LOGPS),
    ]
)

KeptType = Literal["string", "int", "float", "bool", "json"]

_KEPT_TYPES = {"string": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_(), "json": pa.string()}

_JSON_MARK = {b"dpocli": b"json"}


class DamagedPartError(CacheError):
    """A part that is not as it was written."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(
            f"The part {path.name} of the reference cache {path.parent} is damaged: {found}. Run the line that made "
            f"the cache again; it writes this part anew and keeps the others."
        )


class NewerFormatError(CacheError):
    """A part that a later version of dpocli wrote."""

    def __init__(self, path: Path, version: int) -> None:
        super().__init__(
            f"The reference cache {path.parent} has format {version}; this dpocli reads formats up to {FORMAT_VERSION}. "
            "Update dpocli, or make the cache anew with this one."
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """Source rows [start, stop) that make one part."""

    index: int
    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        return self.stop - self.start

    @property
    def file_name(self) -> str:
        return f"rows-{self.start:010d}-{self.stop:010d}.parquet"


def tiles(total_rows: int, rows_per_part: int) -> list[Tile]:
    """The tiling of [0, total_rows) at multiples of `rows_per_part`, whatever the number of workers."""
    starts = range(0, total_rows, rows_per_part)
    return [Tile(index, start, min(start + rows_per_part, total_rows)) for index, start in enumerate(starts)]


def cache_schema(kept: Mapping[str, KeptType]) -> pa.Schema:
    """All columns of a part, kept ones last.

    Raises:
        UsageError: a kept column has the name of a column of the cache.
    """
    own = [*SMALL_COLUMNS, *TOKEN_COLUMNS]
    if clash := sorted(kept.keys() & {column.name for column in own}):
        raise UsageError(
            f"--keep-columns {clash[0]}: the cache has a column of that name of its own. Rename the field in the data, "
            "or leave it out."
        )
    marks = {name: _JSON_MARK if kind == "json" else None for name, kind in kept.items()}
    return pa.schema([*own, *(pa.field(name, _KEPT_TYPES[kind], metadata=marks[name]) for name, kind in kept.items())])


def kept_columns(schema: pa.Schema) -> dict[str, bool]:
    """Names of the kept columns of a part, each with whether its values are JSON text."""
    own = {*SMALL_COLUMNS.names, *TOKEN_COLUMNS.names}
    return {column.name: (column.metadata or {}) == _JSON_MARK for column in schema if column.name not in own}


def kept_types(rows: Iterable[Mapping[str, Any]], names: Sequence[str]) -> dict[str, KeptType]:
    """The narrowest type that takes all values of each kept column (null where there are none but None: string).

    Every worker must be given the same rows (the first N of the data, say), so that all parts have one schema.
    """
    seen: dict[str, set[KeptType]] = {name: set() for name in names}
    for row in rows:
        for name in names:
            if (value := row.get(name)) is not None:
                seen[name].add(kept_type(value))
    return {name: _widest(kinds) for name, kinds in seen.items()}


def kept_type(value: Any) -> KeptType:
    """The narrowest type of a single value."""
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int" if -(2**63) <= value < 2**63 else "json"
    return "float" if isinstance(value, float) else "string" if isinstance(value, str) else "json"


def _widest(kinds: set[KeptType]) -> KeptType:
    if kinds == {"int", "float"}:
        return "float"
    return kinds.copy().pop() if len(kinds) == 1 else "json" if kinds else "string"


@dataclass(frozen=True, slots=True)
class SkippedRow:
    """A source row that gave no pair, as a footer lists it."""

    row: int
    where: str
    reason: str
    detail: str = ""


@dataclass(frozen=True, slots=True)
class PartFooter:
    """What a part says about itself."""

    tile: Tile
    total_rows: int
    num_pairs: int
    fingerprint: Fingerprint
    skipped: Mapping[str, int]
    """Number of skipped rows by reason."""
    skipped_rows: tuple[SkippedRow, ...]
    """The first of them."""
    counts: Mapping[str, int]
    """Sums over the pairs: `truncated` pairs, `prompt_tokens`, `chosen_tokens`, `rejected_tokens`."""

    def to_json(self) -> str:
        return json.dumps(
            {
                "format": FORMAT_VERSION,
                "tile": asdict(self.tile),
                "total_rows": self.total_rows,
                "num_pairs": self.num_pairs,
                "skipped": dict(self.skipped),
                "skipped_rows": [asdict(row) for row in self.skipped_rows],
                "counts": dict(self.counts),
                "fingerprint": self.fingerprint.to_json(),
            }
        )

    @classmethod
    def from_json(cls, text: bytes) -> "PartFooter":
        """What `to_json` wrote in this format. Raises KeyError, TypeError or ValueError for anything else."""
        value = json.loads(text)
        return cls(
            tile=Tile(**value["tile"]),
            total_rows=value["total_rows"],
            num_pairs=value["num_pairs"],
            fingerprint=Fingerprint.from_json(value["fingerprint"]),
            skipped=Counter(value["skipped"]),
            skipped_rows=tuple(SkippedRow(**row) for row in value["skipped_rows"]),
            counts=Counter(value["counts"]),
        )
