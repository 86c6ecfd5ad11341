"""Made the frozen cache that lies beside it, and makes small caches for the other tests.

The frozen files were written once, with format 1, and are never written again: every later version has to read them.
Run with a directory to see what the present version would write: `python -m
tests.cache.frozen_cache_v1.make_frozen_cache DIRECTORY`.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpocli.cache.fingerprint import Fingerprint
from dpocli.cache.kept_columns import KeptType
from dpocli.cache.writer import CacheWriter
from dpocli.data.pair_tokens import pair_id
from dpocli.data.preference import EncodedPair, ReferenceLogps, Skipped, SkipReason
from dpocli.data.row_file import ContentPart
from dpocli.model.identity import ModelIdentity
from dpocli.model.tokenizer_identity import TokenizerIdentity

TOTAL_ROWS, ROWS_PER_PART = 10, 6
KEPT: Mapping[str, KeptType] = {
    "origin": "string",
    "votes": "int",
    "score": "float",
    "checked": "bool",
    "extra": "json",
}
SKIPPED_ROWS = (2, 7)
REFERENCE = ModelIdentity(
    weights={"model.safetensors": "b" * 64},
    config={"model_type": "llama", "hidden_size": 8},
    code={},
    adapter=None,
    quantization=None,
)


def make_fingerprint(
    total_rows: int = TOTAL_ROWS, rows_per_part: int = ROWS_PER_PART, *, scored: bool = True, **settings: Any
) -> Fingerprint:
    digests = {name: f"{number:064x}" for number, name in enumerate(("vocabulary", "model", "merges"))}
    tokenizer = TokenizerIdentity(
        num_ids=100,
        **digests,
        normalizer="0" * 64,
        pre_tokenizer="0" * 64,
        added_tokens="0" * 64,
        affixes=((1,), ()),
        bos_token_id=1,
        eos_token_id=2,
        chat_template={"default": "line 1\nline 2"},
    )
    return Fingerprint(
        tokenizer=tokenizer,
        content=(ContentPart("prefs.jsonl", "a" * 64, total_rows),),
        settings={"max_length": 64, **settings, "total_rows": total_rows, "rows_per_part": rows_per_part},
        reference=REFERENCE if scored else None,
        dtype="float32" if scored else None,
        information={"device": "cpu"},
    )


def make_pair(row: int, *, scored: bool = True, longest: int = 9) -> EncodedPair:
    """A pair of random tokens that depends on its row alone; every third row has masks."""
    generator = np.random.default_rng(row)
    prompt, chosen, rejected = (
        generator.integers(3, 100, generator.integers(1, longest), dtype=np.int32) for _ in range(3)
    )
    masks = [generator.random(len(side)) < 0.5 if row % 3 == 0 else None for side in (chosen, rejected)]
    logps = [-generator.exponential(2.0, len(side)).astype(np.float32) for side in (chosen, rejected)]
    return EncodedPair(
        row=row,
        pair_id=pair_id(prompt, chosen, rejected, *masks),
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_mask=masks[0],
        rejected_mask=masks[1],
        source=("web", "books", "")[row % 3],
        weight=1.0 + row % 2,
        num_turns=1 + row % 4,
        truncated=row % 5 == 0,
        prompt_hash=2**64 - 1 - row // 2,
        kept={
            "origin": f"naïve {row}",
            "votes": row,
            "score": row / 4,
            "checked": row % 2 == 0,
            "extra": {"tags": ["a", row]} if row % 2 else None,
        },
        reference=ReferenceLogps(*logps) if scored else None,
    )


def fill(
    directory: Path,
    total_rows: int = TOTAL_ROWS,
    rows_per_part: int = ROWS_PER_PART,
    *,
    skipped_rows: Sequence[int] = SKIPPED_ROWS,
    scored: bool = True,
    **settings: Any,
) -> CacheWriter:
    """Write whatever is missing of a small cache."""
    fingerprint = make_fingerprint(total_rows, rows_per_part, scored=scored, **settings)
    writer = CacheWriter(directory, fingerprint, KEPT)
    writer.check()
    writer.prepare()
    for tile in writer.missing():
        rows = range(tile.start, tile.stop)
        pairs = [make_pair(row, scored=scored) for row in rows if row not in skipped_rows]
        skips = [Skipped(row, f"prefs.jsonl:{row + 1}", SkipReason.IDENTICAL) for row in rows if row in skipped_rows]
        writer.write(tile, pairs, skips)
    return writer


def describe(pair: EncodedPair) -> dict[str, Any]:
    """All of a pair, as JSON can hold it (float32 values exactly)."""
    reference = pair.reference
    return {
        "row": pair.row,
        "pair_id": pair.pair_id,
        "prompt_ids": pair.prompt_ids.tolist(),
        "chosen_ids": pair.chosen_ids.tolist(),
        "rejected_ids": pair.rejected_ids.tolist(),
        "chosen_mask": None if pair.chosen_mask is None else pair.chosen_mask.tolist(),
        "rejected_mask": None if pair.rejected_mask is None else pair.rejected_mask.tolist(),
        "source": pair.source,
        "weight": pair.weight,
        "num_turns": pair.num_turns,
        "truncated": pair.truncated,
        "prompt_hash": pair.prompt_hash,
        "kept": dict(pair.kept),
        "chosen_logps": None if reference is None else reference.chosen.tolist(),
        "rejected_logps": None if reference is None else reference.rejected.tolist(),
    }


if __name__ == "__main__":
    destination = Path(sys.argv[1])
    fill(destination)
    expected = [describe(make_pair(row)) for row in range(TOTAL_ROWS) if row not in SKIPPED_ROWS]
    (destination / "expected.json").write_text(json.dumps(expected, ensure_ascii=False) + "\n", encoding="utf-8")
