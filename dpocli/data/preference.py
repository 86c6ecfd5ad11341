"""The types of `data`: a preference as written, and the same preference as tokens."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np
from numpy.typing import NDArray

Message = Mapping[str, Any]
"""A chat message for templates: `role`, `content`, `tool_calls`, and other keys that the template reads."""

TokenIds = NDArray[np.int32]

TokenMask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class Preference:
    """One row of the input: a prompt and the two answers to it.

    Either all three of prompt, chosen and rejected are text, or all three are messages (the prompt may be empty).
    """

    row: int
    """Index in the whole data set, counted over all files in the order given."""
    where: str
    """File and line (`prefs.jsonl:17`) for messages to the user."""
    prompt: str | Sequence[Message]
    chosen: str | Sequence[Message]
    rejected: str | Sequence[Message]
    tools: Sequence[Mapping[str, Any]] | None = None
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    source: str = ""
    weight: float = 1.0
    kept: Mapping[str, Any] = field(default_factory=dict)
    """The columns named by `--keep-columns`, unchanged."""

    @property
    def is_text(self) -> bool:
        return isinstance(self.prompt, str)


class SkipReason(StrEnum):
    """Why a row gave no pair. Footers, summaries and messages hold the values."""

    EMPTY = "a side is empty"
    IDENTICAL = "the sides are identical"
    TOO_LONG = "longer than --max-length"
    PROMPT_TOO_LONG = "the prompt fills --max-length"
    TRUNCATED_AWAY = "a side was truncated to nothing"
    NO_PROMPT = "no prompt, and the tokenizer has no BOS"
    UNREADABLE = "the row cannot be read"


@dataclass(frozen=True, slots=True)
class Skipped:
    """A row that gave no pair, and why. Footers of cache parts list the first ones."""

    row: int
    where: str
    reason: str
    """A `SkipReason`, or one of another version of dpocli, read from a footer."""
    detail: str = ""


@dataclass(frozen=True, slots=True)
class ReferenceLogps:
    """Log-probs (nats) of every token of the two sides under the frozen reference, masked tokens included."""

    chosen: NDArray[np.float32]
    """Shape (chosen tokens,)."""
    rejected: NDArray[np.float32]
    """Shape (rejected tokens,)."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """One preference as tokens. The sequences scored are prompt + chosen and prompt + rejected.

    A mask selects the tokens of a side that count (what the assistant wrote); None where all do.
    """

    row: int
    pair_id: str
    prompt_ids: TokenIds
    chosen_ids: TokenIds
    rejected_ids: TokenIds
    chosen_mask: TokenMask | None = None
    rejected_mask: TokenMask | None = None
    source: str = ""
    weight: float = 1.0
    num_turns: int = 1
    truncated: bool = False
    prompt_hash: int = 0
    """64 bits of a hash of the prompt's text, so that truncation does not change it."""
    kept: Mapping[str, Any] = field(default_factory=dict)
    reference: ReferenceLogps | None = None
    """None until a reference has scored the pair, and for reference-free training."""

    @property
    def num_chosen_tokens(self) -> int:
        """Tokens of the chosen side that count."""
        return len(self.chosen_ids) if self.chosen_mask is None else int(self.chosen_mask.sum())

    @property
    def num_rejected_tokens(self) -> int:
        """Tokens of the rejected side that count."""
        return len(self.rejected_ids) if self.rejected_mask is None else int(self.rejected_mask.sum())

    @property
    def num_tokens_longer(self) -> int:
        """Tokens of prompt + the longer side, which `--max-length` bounds."""
        return len(self.prompt_ids) + max(len(self.chosen_ids), len(self.rejected_ids))

    @property
    def all_ids(self) -> tuple[TokenIds, TokenIds, TokenIds]:
        """Prompt, chosen and rejected."""
        return self.prompt_ids, self.chosen_ids, self.rejected_ids

    @property
    def reference_sums(self) -> tuple[float, float]:
        """Reference log-probs of the chosen and the rejected side (nats), summed in float64 over the tokens that count."""
        assert self.reference is not None
        return _counted_sum(self.reference.chosen, self.chosen_mask), _counted_sum(
            self.reference.rejected, self.rejected_mask
        )


def _counted_sum(token_logps: NDArray[np.float32], mask: TokenMask | None) -> float:
    counted = token_logps if mask is None else token_logps[mask]
    return float(counted.sum(dtype=np.float64))
