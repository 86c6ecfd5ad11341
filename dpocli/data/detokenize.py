"""Token ids → the text of each token; the texts joined are the text of all."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dpocli.data.messages import common_prefix

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What decoders write for bytes of an incomplete character."""

_CONTEXT = 8
"""Tokens decoded before the first one, for decoders that look back (a leading space) and incomplete characters."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """The text of a token, or of a few that share a character."""

    text: str
    start: int
    stop: int
    """The tokens: start to stop - 1."""


def decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of some tokens, special ones included, without clean-up."""
    # Ids beyond the vocabulary decode to nothing; no cache that passed the tokenizer check has them.
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_texts(tokenizer: "PreTrainedTokenizerBase", before: Sequence[int], ids: Sequence[int]) -> list[TokenText]:
    """Split the text of `ids` at token boundaries.

    Tokens cannot be decoded alone: byte-level tokens may be parts of a character, and some decoders drop a leading space.
    So the text of a token is what decoding up to it adds to decoding before it. Tokens inside a character are merged.

    Args:
        tokenizer: of the tokens.
        before: the tokens before them, perhaps none.
        ids: the tokens.
    """
    known = [*before[-_CONTEXT:], *ids]
    first = len(known) - len(ids)
    texts: list[TokenText] = []
    # A window of a few tokens, so that the time per token does not grow with the text.
    window, start = 0, first
    earlier = decoded(tokenizer, known[window:start])
    for stop in range(first + 1, len(known) + 1):
        now = decoded(tokenizer, known[window:stop])
        if now.endswith(_UNFINISHED) and stop < len(known):
            continue
        shared = len(common_prefix(earlier, now))
        texts.append(TokenText(now[shared:], start - first, stop - first))
        window, start = max(window, start - _CONTEXT // 2), stop
        earlier = decoded(tokenizer, known[window:start])
    return texts
