"""`Preference` → `EncodedPair`: each text tokenized once, the split into prompt and sides, masks, truncation."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from dpocli.config.options import DataOptions
from dpocli.data.chat_template import ChatTemplate
from dpocli.data.formats import BadRowError, to_preference
from dpocli.data.pair_tokens import PairTokens, canonical, common_prefix_length, pair_id, side_mask, truncate
from dpocli.data.preference import EncodedPair, Preference, Skipped, SkipReason, TokenIds, TokenMask
from dpocli.data.rendering import REWRITTEN, Draft, MessageDrafter, SideText, draft_text, is_empty, num_turns
from dpocli.data.row_file import RawRow
from dpocli.data.sources import SourceRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

__all__ = ["Encoder", "encode_rows", "pair_id"]

ROWS_AT_ONCE = 64
"""Rows whose texts go to the tokenizer in one call: fast tokenizers share them among their threads."""

TEXT_FOR_A_CHAT_MODEL = (
    "The rows are text and are taken as they stand, but the tokenizer has a chat template. If the model is a chat "
    "model, it never saw text like this: give --text-as messages to wrap them as user and assistant turns."
)

NO_EOS = "The tokenizer has no EOS token, so no answer ends with one."


class Encoder:
    """Turns preferences into tokens, one way for all commands.

    Args:
        tokenizer: any transformers tokenizer, fast or slow.
        options: length, truncation, scored turns and template date.

    Attributes:
        notices: sentences that the user should see once, with how often each holds.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", options: DataOptions):
        self.notices: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._options = options
        self._has_template = bool(tokenizer.chat_template)
        self._drafter = MessageDrafter(
            ChatTemplate(tokenizer, options.template_date), options.scored_turns == "all", self.notices
        )
        self._end_tokens = np.array(list(tokenizer.added_tokens_decoder), dtype=np.int32)
        self._leading = self._find_leading()
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos = self._leading if bos is None else np.array([bos], dtype=np.int32)
        self._eos = np.array([] if eos is None else [eos], dtype=np.int32)

    def encode(self, preference: Preference) -> EncodedPair | Skipped:
        """The tokens of one preference, or why it is left out.

        Raises:
            BadRowError: the chat template refuses the conversation.
            UsageError: a row of messages, and the tokenizer has no chat template.
        """
        return self.finish([self.draft(preference)])[0]

    def draft(self, preference: Preference) -> Draft | Skipped:
        """The first half of `encode`: the texts to tokenize."""
        if is_empty(preference):
            return Skipped(preference.row, preference.where, SkipReason.EMPTY)
        if not preference.is_text:
            return self._drafter.draft(preference)
        if self._has_template:
            self.notices[TEXT_FOR_A_CHAT_MODEL] += 1
        return draft_text(preference)

    def finish(self, drafts: Sequence[Draft | Skipped]) -> list[EncodedPair | Skipped]:
        """The second half of `encode`, for many at once: one call of the tokenizer."""
        texts = [text for draft in drafts if isinstance(draft, Draft) for text in draft.texts]
        ids = iter(self._tokenize(texts))
        return [
            draft if isinstance(draft, Skipped) else self._assemble(draft, list(islice(ids, len(draft.texts))))
            for draft in drafts
        ]

    def _tokenize(self, texts: list[str]) -> list[TokenIds]:
        if not texts:
            return []
        # verbose=False: the warning about a model's maximum length does not hold before truncation
        encoded = self._tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        return [np.array(ids, dtype=np.int32) for ids in encoded["input_ids"]]

    def _find_leading(self) -> TokenIds:
        """What the tokenizer by itself puts in front of a text: BOS, or nothing."""
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        starts = [start for start in range(len(whole)) if plain and whole[start : start + len(plain)] == plain]
        return np.array(whole[: starts[0]] if starts else [], dtype=np.int32)

    def _assemble(self, draft: Draft, ids: list[TokenIds]) -> EncodedPair | Skipped:
        preference = draft.preference
        if preference.is_text:
            ids = [_with_prefix(self._leading, text_ids) for text_ids in ids]
        prompt, chosen, rejected, *marks = ids
        chosen, rejected = self._with_eos(draft.chosen, chosen), self._with_eos(draft.rejected, rejected)
        # A token that merges over the boundary is not the prompt's: it belongs to the sides.
        num_prompt = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
        tokens = PairTokens(
            prompt[:num_prompt],
            chosen,
            rejected,
            self._mask(draft.chosen, chosen, marks[: draft.chosen.num_marks], num_prompt),
            self._mask(draft.rejected, rejected, marks[draft.chosen.num_marks :], num_prompt),
        )
        outcome = self._check_and_truncate(self._without_prompt(tokens))
        if isinstance(outcome, SkipReason):
            return Skipped(preference.row, preference.where, outcome, _lengths(tokens))
        return _pair(preference, outcome)

    def _mask(self, side: SideText, ids: TokenIds, marks: list[TokenIds], num_prompt: int) -> TokenMask | None:
        mask, num_uncertain = side_mask(side, ids, marks, num_prompt, self._end_tokens)
        if num_uncertain:
            self.notices[REWRITTEN] += 1
        return mask

    def _with_eos(self, side: SideText, ids: TokenIds) -> TokenIds:
        if not side.needs_eos:
            return ids
        if not len(self._eos):
            self.notices[NO_EOS] += 1
        return ids if len(ids) and np.array_equal(ids[-1:], self._eos) else np.concatenate([ids, self._eos])

    def _without_prompt(self, tokens: PairTokens) -> PairTokens:
        """The sides without the prompt that they begin with; a prompt without tokens becomes BOS."""
        num_prompt, prompt = len(tokens.prompt), tokens.prompt
        if num_prompt == 0:
            prompt = self._bos
            # A template may begin every conversation with BOS: that one is the prompt then.
            if _begins(tokens.chosen, prompt) and _begins(tokens.rejected, prompt):
                num_prompt = len(prompt)
        return PairTokens(
            prompt,
            tokens.chosen[num_prompt:],
            tokens.rejected[num_prompt:],
            None if tokens.chosen_mask is None else canonical(tokens.chosen_mask[num_prompt:]),
            None if tokens.rejected_mask is None else canonical(tokens.rejected_mask[num_prompt:]),
        )

    def _check_and_truncate(self, tokens: PairTokens) -> PairTokens | SkipReason:
        if not len(tokens.prompt):
            return SkipReason.NO_PROMPT
        if not tokens.both_count:
            return SkipReason.EMPTY
        if np.array_equal(tokens.chosen, tokens.rejected):
            return SkipReason.IDENTICAL
        num_bos = len(self._bos) if _begins(tokens.prompt, self._bos) else 0
        shorter = truncate(tokens, self._options.max_length, self._options.truncation, num_bos)
        if isinstance(shorter, SkipReason):
            return shorter
        if not shorter.both_count:
            return SkipReason.TRUNCATED_AWAY
        return SkipReason.IDENTICAL if np.array_equal(shorter.chosen, shorter.rejected) else shorter


def encode_rows(
    rows: SourceRows, encoder: Encoder, options: DataOptions, start: int, stop: int
) -> Iterator[EncodedPair | Skipped]:
    """Rows [start, stop), in order, one result each.

    Raises:
        BadRowError: a row cannot be read, and `--on-bad-row` is error.
        DataError: a file is damaged.
        UsageError: a row of messages, and the tokenizer has no chat template.
    """
    raw_rows = rows.read(start, stop)
    while raws := list(islice(raw_rows, ROWS_AT_ONCE)):
        yield from encoder.finish([_draft(raw, encoder, options) for raw in raws])


def _draft(raw: RawRow, encoder: Encoder, options: DataOptions) -> Draft | Skipped:
    try:
        return encoder.draft(to_preference(raw, options))
    except BadRowError as error:
        if options.on_bad_row == "error":
            raise
        return Skipped(raw.row, raw.where, SkipReason.UNREADABLE, str(error))


def _pair(preference: Preference, tokens: PairTokens) -> EncodedPair:
    lists = (tokens.prompt, tokens.chosen, tokens.rejected, tokens.chosen_mask, tokens.rejected_mask)
    return EncodedPair(
        preference.row,
        pair_id(*lists),
        *lists,
        source=preference.source,
        weight=preference.weight,
        num_turns=num_turns(preference),
        truncated=tokens.truncated,
        prompt_hash=prompt_hash(preference),
        kept=preference.kept,
    )


def prompt_hash(preference: Preference) -> int:
    """The first 64 bits of a hash of what the prompt says: what a split by prompt goes by, on every machine alike.

    A lone question hashes as its text, so that it is the same in whatever form a row holds it.
    """
    prompt = preference.prompt
    if not isinstance(prompt, str):
        turns = [(str(message.get("role")), _text_of(message.get("content"))) for message in prompt]
        spoken = [turn for turn in turns if turn[0] != "system"]
        prompt = spoken[0][1] if len(spoken) == 1 else json.dumps(spoken, ensure_ascii=False)
    content = prompt.strip().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _text_of(content: object) -> str:
    """Content that is a list of typed parts, as one text."""
    if not isinstance(content, list):
        return str(content)
    return "".join(str(part.get("text", part)) if isinstance(part, Mapping) else str(part) for part in content)


def _begins(ids: TokenIds, prefix: TokenIds) -> bool:
    return bool(len(prefix)) and np.array_equal(ids[: len(prefix)], prefix)


def _with_prefix(prefix: TokenIds, ids: TokenIds) -> TokenIds:
    return ids if _begins(ids, prefix) or not len(prefix) else np.concatenate([prefix, ids])


def _lengths(whole: PairTokens) -> str:
    prompt, chosen, rejected = len(whole.prompt), len(whole.chosen), len(whole.rejected)
    return f"tokens: prompt {prompt}, chosen {chosen - prompt}, rejected {rejected - prompt}"
