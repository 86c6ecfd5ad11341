"""The oracle: log-probs by the model's own forward pass, which every layout is judged against.

One sequence a pass, without padding, with the model's full logits and its own attention: nothing of this package takes part
but the choice of tokens. Any prefix of a causal sequence is valid, so long sequences are cut.
"""

from collections.abc import Iterator, Mapping, Sequence
from math import sqrt

import torch
from torch import Tensor

from dpocli.data.preference import EncodedPair, TokenIds
from dpocli.errors import UsageError, brief_message, is_out_of_memory
from dpocli.scoring.scorer import PairScorer

MAX_TOKENS = 2048
MAX_LOGITS_BYTES = 1e9

EDGE = 8
"""Tokens of the first and of the last region of a side, where errors of layouts accumulate."""

REGION_ERRORS = 3.0
"""Standard errors by which the mean of a region may exceed the limit of a long one."""

SideLogps = tuple[Tensor, Tensor]
"""Log-probs of the chosen and the rejected tokens of a pair, float32, on the CPU; a prefix of them from the oracle."""


def oracle_logps(scorer: PairScorer, pairs: Sequence[EncodedPair]) -> list[SideLogps]:
    """Log-probs of both sides of each pair, as far as `MAX_TOKENS` and the memory for logits reach.

    Args:
        scorer: its model computes, without dropout; every process that shares it makes the same call.
        pairs: as they are scored.

    Raises:
        UsageError: the model's own forward pass fails.
    """
    limit = min(MAX_TOKENS, max(2, int(MAX_LOGITS_BYTES / (8 * scorer.num_embeddings))))
    with torch.no_grad():
        return [
            (
                _side(scorer, pair.prompt_ids, pair.chosen_ids, limit),
                _side(scorer, pair.prompt_ids, pair.rejected_ids, limit),
            )
            for pair in pairs
        ]


def _side(scorer: PairScorer, prompt: TokenIds, side: TokenIds, limit: int) -> Tensor:
    ids = torch.tensor([*prompt, *side], dtype=torch.long)[:limit]
    start = min(len(prompt), len(ids))
    try:
        logits = scorer(ids)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        config = scorer.model.config
        raise UsageError(
            f"--model: the forward pass of {config.model_type} fails in transformers, in {scorer.compute_dtype} on "
            f"{scorer.device.type} ({brief_message(error)}). Try another --dtype or another version of transformers."
        ) from error
    scored = logits[start - 1 : len(ids) - 1].float().log_softmax(dim=-1)
    found: Tensor = scored.gather(1, ids[start:, None].to(scored.device))[:, 0].cpu()
    return found


def regions(sides: Sequence[SideLogps], is_first_in_row: Sequence[bool]) -> Mapping[str, Tensor]:
    """Values of all pairs by region: first, last and other tokens of each side, of the first and of later pairs of a row.

    Args:
        sides: values per token of each pair.
        is_first_in_row: of each pair.
    """
    found: dict[str, list[Tensor]] = {}
    for pair, is_first in zip(sides, is_first_in_row, strict=True):
        place = "first pair of a row" if is_first else "later pairs of a row"
        for side, values in zip(("chosen", "rejected"), pair, strict=True):
            for name, part in _parts(values):
                found.setdefault(f"{name} of the {side} side, {place}", []).append(part)
    return {name: torch.cat(parts) for name, parts in found.items()}


def _parts(values: Tensor) -> Iterator[tuple[str, Tensor]]:
    if len(values):
        yield f"first {EDGE} tokens", values[:EDGE]
    if len(values) > EDGE:
        yield f"last {EDGE} tokens", values[EDGE:][-EDGE:]
    if len(values) > 2 * EDGE:
        yield "other tokens", values[EDGE:-EDGE]


def worst_region(
    differences: Sequence[SideLogps], noise: Sequence[SideLogps], is_first_in_row: Sequence[bool], limit: float
) -> str | None:
    """The region whose mean |difference| is beyond what rounding explains, as a phrase; None if there is none.

    The limit of a region is the larger of `limit` and twice the measured noise there, raised by the error of a mean over few
    tokens.

    Args:
        differences: per token.
        noise: differences between two ways of computing that are both right, per token.
        is_first_in_row: of each pair.
        limit: nats per token, for the mean of |difference| over many tokens.
    """
    by_chance = regions(noise, is_first_in_row)
    worst, most = None, 1.0
    for name, values in regions(differences, is_first_in_row).items():
        mean = float(values.abs().mean())
        allowed = max(limit, 2 * float(by_chance[name].abs().mean())) * (1 + REGION_ERRORS / sqrt(len(values)))
        # NaN compares false, and is beyond any limit.
        if not mean / allowed <= most:
            worst, most = f"{name}: {mean:.2g} nats per token (allowed {allowed:.2g})", mean / allowed
    return worst
