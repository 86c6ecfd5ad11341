"""Pairs whose lengths a test chooses; their tokens are random."""

import numpy as np

from dpocli.data.preference import EncodedPair
from tests.support.tiny_models import VOCABULARY

Sizes = tuple[int, int, int]
"""Tokens of prompt, chosen and rejected."""


def pairs_of(*sizes: Sizes, seed: int = 0) -> list[EncodedPair]:
    generator = np.random.default_rng(seed)

    def tokens(count: int) -> np.ndarray:
        return generator.integers(3, VOCABULARY, size=count, dtype=np.int32)

    return [
        EncodedPair(
            row=row,
            pair_id=f"{row:032x}",
            prompt_ids=tokens(prompt),
            chosen_ids=tokens(chosen),
            rejected_ids=tokens(rejected),
        )
        for row, (prompt, chosen, rejected) in enumerate(sizes)
    ]
