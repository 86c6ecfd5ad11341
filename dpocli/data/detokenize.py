"""The text of each token, so that tokens side by side read as the text that they came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"
"""What decoders write for bytes that are no whole character (yet)."""

_CONTEXT = 8
"""Tokens decoded before the first one: enough for decoders that look back (a leading space) and for half a character."""


@dataclass(frozen=True, slots=True)
class TokenText:
    """The text of a token, or of a few that share a character."""

    text: str
    start: int
    stop: int
    """The tokens: start to stop - 1."""


def decoded(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    """The text of some tokens, special ones included, nothing tidied up."""
    # Ids beyond the tokenizer's decode to nothing; they are in no cache that the tokenizer was checked against.
    return str(tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))


def token_texts(tokenizer: "PreTrainedTokenizerBase", before: Sequence[int], ids: Sequence[int]) -> list[TokenText]:
    """Cuts the text of `ids` at the boundaries of tokens; put together, the pieces are the text.

    A token's own decoding will not do: byte-level tokens may be parts of a character, and some decoders drop the space
    at the beginning of what they are given. So a token's text is what the decoding of all up to it has more than the
    decoding of all before it, and tokens in the middle of a character wait for its end.

    Args:
        tokenizer: that made the tokens.
        before: the tokens that stand before them, perhaps none.
        ids: the tokens.
    """
    known = [*before[-_CONTEXT:], *ids]
    first = len(known) - len(ids)
    texts: list[TokenText] = []
    # The window begins a little before the piece at hand, so that a long text takes no longer per token than a short one.
    window, start = 0, first
    earlier = decoded(tokenizer, known[window:start])
    for stop in range(first + 1, len(known) + 1):
        now = decoded(tokenizer, known[window:stop])
        if now.endswith(_UNFINISHED) and stop < len(known):
            continue
        shared = _shared(earlier, now)
        texts.append(TokenText(now[shared:], start - first, stop - first))
        window, start = max(window, start - _CONTEXT // 2), stop
        earlier = decoded(tokenizer, known[window:start])
    return texts


def _shared(one: str, other: str) -> int:
    """Characters that two texts begin with in common."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((place for place, (mine, theirs) in pairs if mine != theirs), min(len(one), len(other)))
