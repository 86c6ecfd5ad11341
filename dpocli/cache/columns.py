"""The small columns of all pairs of a cache, in memory."""

from collections.abc import Iterable
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class PairColumns:
    """The small columns as arrays of shape (pairs,), in order of source rows."""

    rows: NDArray[np.int64]
    pair_ids: NDArray[np.uint8]
    """Shape (pairs, 16)."""
    sources: NDArray[np.object_]
    """The label of each pair; equal labels of a part share one string."""
    weights: NDArray[np.float32]
    num_turns: NDArray[np.int16]
    prompt_tokens: NDArray[np.int32]
    chosen_tokens: NDArray[np.int32]
    rejected_tokens: NDArray[np.int32]
    truncated: NDArray[np.bool_]
    prompt_hashes: NDArray[np.uint64]
    """Equal for equal prompts, the same on every machine."""
    reference_chosen: NDArray[np.float64]
    """Nats, summed over the tokens that count; NaN without a reference."""
    reference_rejected: NDArray[np.float64]

    @classmethod
    def of(cls, table: pa.Table) -> "PairColumns":
        """From a table with the columns of SMALL_COLUMNS."""
        labels = table["source"].combine_chunks().dictionary_encode()
        return cls(
            rows=table["row"].to_numpy(),
            pair_ids=np.frombuffer(bytes.fromhex("".join(table["pair_id"].to_pylist())), np.uint8).reshape(-1, 16),
            sources=np.array(labels.dictionary.to_pylist(), dtype=object)[labels.indices.to_numpy()],
            weights=table["weight"].to_numpy(),
            num_turns=table["num_turns"].to_numpy(),
            prompt_tokens=table["prompt_tokens"].to_numpy(),
            chosen_tokens=table["chosen_tokens"].to_numpy(),
            rejected_tokens=table["rejected_tokens"].to_numpy(),
            truncated=table["truncated"].to_numpy(),
            prompt_hashes=table["prompt_hash"].to_numpy(),
            reference_chosen=table["ref_chosen_logps"].to_numpy(),
            reference_rejected=table["ref_rejected_logps"].to_numpy(),
        )

    @classmethod
    def concatenate(cls, parts: Iterable["PairColumns"], at_most: int) -> "PairColumns":
        """The columns of all parts, at least one, with at most that many pairs. Each part is freed once it is copied."""
        arrays: dict[str, NDArray[Any]] = {}
        count = 0
        for part in parts:
            stop = count + len(part.rows)
            for name in (field.name for field in fields(cls)):
                values = getattr(part, name)
                if name not in arrays:
                    arrays[name] = np.empty((at_most, *values.shape[1:]), values.dtype)
                arrays[name][count:stop] = values
            count = stop
        return cls(**{name: array[:count] for name, array in arrays.items()})

    def fields_of(self, position: int) -> dict[str, Any]:
        """The fields of an `EncodedPair` that are stored here."""
        return {
            "row": int(self.rows[position]),
            "pair_id": self.pair_ids[position].tobytes().hex(),
            "source": self.sources[position],
            "weight": float(self.weights[position]),
            "num_turns": int(self.num_turns[position]),
            "truncated": bool(self.truncated[position]),
            "prompt_hash": int(self.prompt_hashes[position]),
        }

    def matches(self, other: "PairColumns", start: int) -> bool:
        """Whether `other` equals the rows of these columns that begin at `start`."""
        stop = start + len(other.rows)
        arrays = ((getattr(self, field.name)[start:stop], getattr(other, field.name)) for field in fields(self))
        return all(
            mine.tobytes() == theirs.tobytes() if mine.dtype != object else (mine == theirs).all()
            for mine, theirs in arrays
        )
