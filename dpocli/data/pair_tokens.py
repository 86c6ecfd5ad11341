"""The tokens of a pair: common prefixes, masks, truncation, and the pair id."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from dpocli.data.preference import SkipReason, TokenIds, TokenMask
from dpocli.data.rendering import RenderedSide, TurnPrefixes

_NO_MASK = (2**64 - 1).to_bytes(8, "little")
"""Hashed in place of the length of a mask: no mask is that long."""


@dataclass(frozen=True, slots=True)
class PairTokens:
    """The tokens of a pair; masks as in `EncodedPair`."""

    prompt: TokenIds
    chosen: TokenIds
    rejected: TokenIds
    chosen_mask: TokenMask | None = None
    rejected_mask: TokenMask | None = None
    truncated: bool = False

    @property
    def num_longer_side(self) -> int:
        return max(len(self.chosen), len(self.rejected))

    @property
    def both_sides_count(self) -> bool:
        """Whether each side has a token that counts."""
        sides = ((self.chosen, self.chosen_mask), (self.rejected, self.rejected_mask))
        return all(len(ids) and (mask is None or mask.any()) for ids, mask in sides)


def common_prefix_length(first: TokenIds, second: TokenIds) -> int:
    """How many leading tokens the two have in common."""
    length = min(len(first), len(second))
    differs = first[:length] != second[:length]
    return int(differs.argmax()) if differs.any() else length


def none_if_all(mask: TokenMask) -> TokenMask | None:
    """The mask, or None where all tokens count, so that equal masks have one form (and one `pair_id`)."""
    return None if mask.all() else mask


def truncate(tokens: PairTokens, max_length: int, truncation: str, num_bos: int) -> PairTokens | SkipReason:
    """The pair within `max_length` tokens of prompt + longer side, or why it must be skipped.

    keep-start cuts the ends of the sides. keep-end cuts the prompt after its `num_bos` leading tokens; where no other
    token of the prompt would be left, the pair is skipped (an answer without its question is no preference). drop skips.
    """
    excess = len(tokens.prompt) + tokens.num_longer_side - max_length
    if excess <= 0:
        return tokens
    if truncation == "drop":
        return SkipReason.TOO_LONG
    if truncation == "keep-end":
        if excess >= len(tokens.prompt) - num_bos:
            return SkipReason.TOO_LONG
        kept = np.concatenate([tokens.prompt[:num_bos], tokens.prompt[num_bos + excess :]])
        return replace(tokens, prompt=kept, truncated=True)
    room = max_length - len(tokens.prompt)
    if room <= 0:
        return SkipReason.PROMPT_TOO_LONG
    return replace(
        tokens,
        chosen=tokens.chosen[:room],
        rejected=tokens.rejected[:room],
        chosen_mask=None if tokens.chosen_mask is None else none_if_all(tokens.chosen_mask[:room]),
        rejected_mask=None if tokens.rejected_mask is None else none_if_all(tokens.rejected_mask[:room]),
        truncated=True,
    )


def pair_id(
    prompt_ids: TokenIds,
    chosen_ids: TokenIds,
    rejected_ids: TokenIds,
    chosen_mask: TokenMask | None = None,
    rejected_mask: TokenMask | None = None,
) -> str:
    """128-bit hash (32 hexadecimal digits) of the id lists, shape (tokens,), and masks; each with its length."""
    digest = hashlib.blake2b(digest_size=16)
    for ids in (prompt_ids, chosen_ids, rejected_ids):
        digest.update(len(ids).to_bytes(8, "little"))
        digest.update(ids.astype("<i4").tobytes())
    for mask in (chosen_mask, rejected_mask):
        digest.update(_NO_MASK if mask is None else len(mask).to_bytes(8, "little"))
        if mask is not None:
            digest.update(mask.tobytes())
    return digest.hexdigest()


def side_mask(
    side: RenderedSide, ids: TokenIds, prefixes: Sequence[TokenIds], num_prompt: int, end_tokens: TokenIds
) -> tuple[TokenMask | None, int]:
    """Which tokens of a side count: the assistant's turns.

    A turn is located as the prompt is: by the tokens that a prefix and the whole conversation begin with. A token that
    merges over the start of a turn belongs to the turn; one that merges over its end does not.

    Args:
        side: the texts.
        ids: tokens of prompt and side, shape (tokens,).
        prefixes: tokens of `side.prefixes`.
        num_prompt: how many of `ids` are the prompt.
        end_tokens: the tokens that may end a turn.

    Returns:
        (mask of shape (tokens,), or None where the whole side counts; number of turns that are masked because their end
        is uncertain).
    """
    if side.turns is None:
        return None, 0
    left = iter(prefixes)
    starts, ends = [], []
    for turn in side.turns:
        starts.append(num_prompt if turn.start is None else common_prefix_length(next(left), ids))
        ends.append(None if turn.end is None else next(left))
    mask = np.zeros(len(ids), dtype=np.bool_)
    num_uncertain = 0
    for turn, start, end_ids, following in zip(side.turns, starts, ends, [*starts[1:], 0], strict=True):
        limit = following if turn.bounded else start
        stop = len(ids) if end_ids is None else _end(side.text, ids, turn, end_ids, start, limit, end_tokens)
        mask[start : stop or start] = True
        num_uncertain += stop is None
    return mask, num_uncertain


def _end(
    text: str, ids: TokenIds, turn: TurnPrefixes, end_ids: TokenIds, start: int, limit: int, end_tokens: TokenIds
) -> int | None:
    """The end of a turn in the middle of a side, None where it is uncertain."""
    shared = common_prefix_length(end_ids, ids)
    if turn.end is not None and text.startswith(turn.end):
        return shared
    # The template may end the last turn of a conversation with another token than earlier turns (gpt-oss).
    if shared == len(end_ids) - 1 and shared < len(ids) and ids[shared] in end_tokens:
        return shared + 1
    # It may print the last turn differently (Qwen3: with a think block) and end it the same way.
    if end_ids[-1] in end_tokens and len(ends := np.flatnonzero(ids[start:limit] == end_ids[-1])):
        return start + int(ends[0]) + 1
    return None
