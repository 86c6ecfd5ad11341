"""Which tokens of a side the assistant wrote."""

from collections.abc import Sequence

import numpy as np

from dpocli.data.drafts import SideText, TurnText
from dpocli.data.preference import TokenIds, TokenMask
from dpocli.data.tokens import common_prefix_length


def side_mask(
    side: SideText, ids: TokenIds, marks: Sequence[TokenIds], num_prompt: int, end_tokens: TokenIds
) -> tuple[TokenMask | None, int]:
    """(mask of `ids`, number of turns that stay masked because their end is uncertain).

    Places are found as the prompt is: by the tokens that a text and the whole conversation begin with. A token that
    merges over the start of a turn is the turn's; one that merges over its end is not.

    Args:
        side: the texts.
        ids: tokens of prompt and side, shape (tokens,).
        marks: tokens of `side.marks`.
        num_prompt: how many of `ids` are the prompt.
        end_tokens: the tokens that may end a turn.

    Returns:
        The mask, shape (tokens,), None where all of the side counts.
    """
    if side.turns is None:
        return None, 0
    left = iter(marks)
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
    text: str, ids: TokenIds, turn: TurnText, end_ids: TokenIds, start: int, limit: int, end_tokens: TokenIds
) -> int | None:
    """Where a turn in the middle of a side ends, None where that is uncertain."""
    shared = common_prefix_length(end_ids, ids)
    if turn.end is not None and text.startswith(turn.end):
        return shared
    # The template may end the last turn of a conversation with another token than the turns before (gpt-oss).
    if shared == len(end_ids) - 1 and shared < len(ids) and ids[shared] in end_tokens:
        return shared + 1
    # It may print the words otherwise where they come last (Qwen3: with a think block), and end the turn alike.
    if end_ids[-1] in end_tokens and len(ends := np.flatnonzero(ids[start:limit] == end_ids[-1])):
        return start + int(ends[0]) + 1
    return None
