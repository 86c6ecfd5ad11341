"""The on-disk format of a reference cache, version 1: parts and their names, columns, and the footer.

A cache is a directory of parts `rows-START-STOP.parquet`, one for each tile of source rows, written in row groups of 64
pairs. A part is a Parquet file that any reader of Parquet opens. Its key-value metadata holds the footer (key `dpocli`,
JSON of `PartFooter`) and the seal (key `dpocli_seal`), digests that cover every byte (see `part`).
"""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import pyarrow as pa

from dpocli.cache.fingerprint import Fingerprint
from dpocli.cache.kept_columns import KeptType, kept_field
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.errors import CacheError, UsageError

FORMAT_VERSION = 1

ROWS_PER_GROUP = 64

MAX_LISTED_SKIPS = 256
"""Skipped rows that a part lists; all of them are counted."""

FOOTER_KEY, SEAL_KEY = b"dpocli", b"dpocli_seal"

_IDS, _MASK, _LOGPS = pa.list_(pa.int32()), pa.list_(pa.bool_()), pa.list_(pa.float32())

SMALL_COLUMNS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),  # index in the whole data set, from 0
        pa.field("pair_id", pa.string(), nullable=False),  # 128-bit hash of tokens and masks, 32 hexadecimal digits
        pa.field("source", pa.string(), nullable=False),  # label of the row; "" without one
        pa.field("weight", pa.float32(), nullable=False),  # of the pair in the loss
        pa.field("num_turns", pa.int16(), nullable=False),  # user turns of the prompt, at least 1
        pa.field("prompt_tokens", pa.int32(), nullable=False),  # number of tokens, masked ones included
        pa.field("chosen_tokens", pa.int32(), nullable=False),
        pa.field("rejected_tokens", pa.int32(), nullable=False),
        pa.field("truncated", pa.bool_(), nullable=False),  # whether --max-length cut the pair
        pa.field("prompt_hash", pa.uint64(), nullable=False),  # of the prompt's text, not changed by truncation
        pa.field("ref_chosen_logps", pa.float64()),  # nats, summed over the tokens that count; null if unscored
        pa.field("ref_rejected_logps", pa.float64()),
    ]
)
"""What readers load when they open a cache. First in each row group, so that one short read fetches them."""

TOKEN_COLUMNS = pa.schema(
    [
        pa.field("prompt_ids", _IDS, nullable=False),  # token ids
        pa.field("chosen_ids", _IDS, nullable=False),
        pa.field("rejected_ids", _IDS, nullable=False),
        pa.field("chosen_mask", _MASK),  # which tokens of the side count; null where all do
        pa.field("rejected_mask", _MASK),
        pa.field("ref_chosen_token_logps", _LOGPS),  # nats per token, masked ones included; null if unscored
        pa.field("ref_rejected_token_logps", _LOGPS),
    ]
)
"""One list per pair, as long as the side (the prompt) has tokens."""


class DamagedPartError(CacheError):
    """A part whose bytes are not those that were written."""

    def __init__(self, path: Path, found: str) -> None:
        super().__init__(
            f"The part {path.name} of the reference cache {path.parent} is damaged: {found}. Run the command that made "
            f"the cache again; it rewrites this part and keeps the others."
        )


class NewerFormatError(CacheError):
    """A part that a later version of dpocli wrote."""

    def __init__(self, path: Path, version: int) -> None:
        super().__init__(
            f"The reference cache {path.parent} has format {version}; this dpocli reads formats up to {FORMAT_VERSION}. "
            "Update dpocli, or rebuild the cache with this one."
        )


@dataclass(frozen=True, slots=True)
class Tile:
    """Source rows [start, stop), which make one part."""

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
    """The tiles of [0, total_rows) at multiples of `rows_per_part`, whatever the number of workers."""
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
    return pa.schema([*own, *(kept_field(name, kind) for name, kind in kept.items())])


def kept_columns(schema: pa.Schema) -> list[pa.Field]:
    """The kept columns of a part."""
    own = {*SMALL_COLUMNS.names, *TOKEN_COLUMNS.names}
    return [column for column in schema if column.name not in own]


@dataclass(frozen=True, slots=True)
class PartFooter:
    """What a part says about itself."""

    tile: Tile
    total_rows: int
    num_pairs: int
    fingerprint: Fingerprint
    skipped: Mapping[str, int]
    """Number of skipped rows by reason."""
    skipped_rows: tuple[Skipped, ...]
    """The first MAX_LISTED_SKIPS of them."""
    counts: Mapping[str, int]
    """Sums over the pairs: `truncated` pairs, `prompt_tokens`, `chosen_tokens`, `rejected_tokens`."""

    @classmethod
    def of(
        cls, tile: Tile, fingerprint: Fingerprint, pairs: Sequence[EncodedPair], skipped: Sequence[Skipped]
    ) -> "PartFooter":
        """The footer of a part that is about to be written."""
        return cls(
            tile=tile,
            total_rows=fingerprint.total_rows,
            num_pairs=len(pairs),
            fingerprint=fingerprint,
            skipped=Counter(str(skip.reason) for skip in skipped),
            skipped_rows=tuple(sorted(skipped, key=lambda skip: skip.row)[:MAX_LISTED_SKIPS]),
            counts={
                "truncated": sum(pair.truncated for pair in pairs),
                "prompt_tokens": sum(len(pair.prompt_ids) for pair in pairs),
                "chosen_tokens": sum(len(pair.chosen_ids) for pair in pairs),
                "rejected_tokens": sum(len(pair.rejected_ids) for pair in pairs),
            },
        )

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
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for other text."""
        value = json.loads(text)
        return cls(
            tile=Tile(**value["tile"]),
            total_rows=value["total_rows"],
            num_pairs=value["num_pairs"],
            fingerprint=Fingerprint.from_json(value["fingerprint"]),
            skipped=Counter(value["skipped"]),
            skipped_rows=tuple(Skipped(**row) for row in value["skipped_rows"]),
            counts=Counter(value["counts"]),
        )
