"""Pairs of random tokens, for tests that care about numbers and not about text."""

import numpy as np

from dpocli.data.preference import EncodedPair, ReferenceLogps, TokenMask
from tests.support.tiny_models import VOCABULARY


def random_pair(
    generator: np.random.Generator, row: int = 0, *, longest: int = 12, masked: bool = False, reference: bool = False
) -> EncodedPair:
    prompt, chosen, rejected = (
        generator.integers(3, VOCABULARY, size=generator.integers(1, longest), dtype=np.int32) for _ in range(3)
    )
    return EncodedPair(
        row=row,
        pair_id=f"{row:032x}",
        prompt_ids=prompt,
        chosen_ids=chosen,
        rejected_ids=rejected,
        chosen_mask=_mask(generator, len(chosen)) if masked else None,
        rejected_mask=_mask(generator, len(rejected)) if masked else None,
        reference=ReferenceLogps(
            -generator.exponential(2.0, len(chosen)).astype(np.float32),
            -generator.exponential(2.0, len(rejected)).astype(np.float32),
        )
        if reference
        else None,
    )


def random_pairs(count: int, seed: int = 0, **options: bool | int) -> list[EncodedPair]:
    generator = np.random.default_rng(seed)
    return [random_pair(generator, row, **options) for row in range(count)]  # type: ignore[arg-type]


def _mask(generator: np.random.Generator, length: int) -> TokenMask:
    mask = generator.random(length) < 0.7
    mask[0] = True
    return mask
