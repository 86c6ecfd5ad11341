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
from dpocli.data.pair_tokens import PairTokens, common_prefix_length, none_if_all, pair_id, side_mask, truncate
from dpocli.data.preference import EncodedPair, Preference, Skipped, SkipReason, TokenIds, TokenMask
from dpocli.data.rendering import (
    REWRITTEN,
    MessageRenderer,
    RenderedPair,
    RenderedSide,
    is_empty,
    num_turns,
    render_text,
)
from dpocli.data.row_file import RawRow
from dpocli.data.sources import SourceRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS_AT_ONCE = 64
"""Rows per call of the tokenizer: fast tokenizers spread them over their threads."""

TEXT_FOR_A_CHAT_MODEL = (
    "The rows are text and are used without a template, but the tokenizer has a chat template. If the model is a chat "
    "model, it was not trained on text like this: give --text-as messages to wrap them as user and assistant turns."
)

NO_EOS = "The tokenizer has no EOS token, so no answer ends with one."


class Encoder:
    """Turns preferences into tokens, the same way for all commands.

    Args:
        tokenizer: any transformers tokenizer, fast or slow.
        options: length, truncation, scored turns, template date, and what to do with bad rows.

    Attributes:
        notices: sentences that the user should see once, with how often each applies.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", options: DataOptions):
        self.notices: Counter[str] = Counter()
        self._tokenizer = tokenizer
        self._options = options
        self._has_template = bool(tokenizer.chat_template)
        self._renderer = MessageRenderer(
            ChatTemplate(tokenizer, options.template_date), options.scored_turns == "all", self.notices
        )
        self._end_tokens = np.array(list(tokenizer.added_tokens_decoder), dtype=np.int32)
        self._leading = self._leading_tokens()
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        self._bos = self._leading if bos is None else np.array([bos], dtype=np.int32)
        self._eos = np.array([] if eos is None else [eos], dtype=np.int32)

    def encode(self, preference: Preference) -> EncodedPair | Skipped:
        """The tokens of one preference, or why it is left out.

        Raises:
            BadRowError: the chat template refuses the conversation.
            UsageError: a row of messages, and the tokenizer has no chat template.
        """
        return self._encode([self._render(preference)])[0]

    def encode_rows(self, rows: SourceRows, start: int, stop: int) -> Iterator[EncodedPair | Skipped]:
        """Rows [start, stop), in order, one result each.

        Raises:
            BadRowError: a row cannot be read, and `--on-bad-row` is error.
            DataError: a file is damaged.
            UsageError: a row of messages, and the tokenizer has no chat template.
        """
        raw_rows = rows.read(start, stop)
        while batch := list(islice(raw_rows, ROWS_AT_ONCE)):
            yield from self._encode([self._render_row(raw) for raw in batch])

    def _render_row(self, raw: RawRow) -> RenderedPair | Skipped:
        try:
            return self._render(to_preference(raw, self._options))
        except BadRowError as error:
            if self._options.on_bad_row == "error":
                raise
            return Skipped(raw.row, raw.where, SkipReason.UNREADABLE, str(error))

    def _render(self, preference: Preference) -> RenderedPair | Skipped:
        if is_empty(preference):
            return Skipped(preference.row, preference.where, SkipReason.EMPTY)
        if not preference.is_text:
            return self._renderer.render(preference)
        if self._has_template:
            self.notices[TEXT_FOR_A_CHAT_MODEL] += 1
        return render_text(preference)

    def _encode(self, rows: Sequence[RenderedPair | Skipped]) -> list[EncodedPair | Skipped]:
        """Many rows with one call of the tokenizer."""
        texts = [text for row in rows if isinstance(row, RenderedPair) for text in row.texts]
        ids = iter(self._tokenize(texts))
        return [
            row if isinstance(row, Skipped) else self._assemble(row, list(islice(ids, len(row.texts)))) for row in rows
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

    def _leading_tokens(self) -> TokenIds:
        """What the tokenizer adds in front of a text: BOS, or nothing."""
        plain = self._tokenizer("a", add_special_tokens=False)["input_ids"]
        whole = self._tokenizer("a")["input_ids"]
        starts = [start for start in range(len(whole)) if plain and whole[start : start + len(plain)] == plain]
        return np.array(whole[: starts[0]] if starts else [], dtype=np.int32)

    def _assemble(self, rendered: RenderedPair, ids: list[TokenIds]) -> EncodedPair | Skipped:
        """One pair from the tokens of its `texts`."""
        preference = rendered.preference
        if preference.is_text:
            ids = [_with_prefix(self._leading, text_ids) for text_ids in ids]
        prompt, chosen, rejected, *prefixes = ids
        chosen, rejected = self._with_eos(rendered.chosen, chosen), self._with_eos(rendered.rejected, rejected)
        # A token that merges over the boundary belongs to the sides.
        num_prompt = min(common_prefix_length(prompt, chosen), common_prefix_length(prompt, rejected))
        num_of_chosen = len(rendered.chosen.prefixes)
        tokens = PairTokens(
            prompt[:num_prompt],
            chosen,
            rejected,
            self._mask(rendered.chosen, chosen, prefixes[:num_of_chosen], num_prompt),
            self._mask(rendered.rejected, rejected, prefixes[num_of_chosen:], num_prompt),
        )
        outcome = self._check_and_truncate(self._without_prompt(tokens))
        if isinstance(outcome, SkipReason):
            return Skipped(preference.row, preference.where, outcome, _lengths(tokens))
        return _pair(preference, outcome)

    def _mask(self, side: RenderedSide, ids: TokenIds, prefixes: list[TokenIds], num_prompt: int) -> TokenMask | None:
        mask, num_uncertain = side_mask(side, ids, prefixes, num_prompt, self._end_tokens)
        if num_uncertain:
            self.notices[REWRITTEN] += 1
        return mask

    def _with_eos(self, side: RenderedSide, ids: TokenIds) -> TokenIds:
        if not side.needs_eos:
            return ids
        if not len(self._eos):
            self.notices[NO_EOS] += 1
        return ids if len(ids) and np.array_equal(ids[-1:], self._eos) else np.concatenate([ids, self._eos])

    def _without_prompt(self, tokens: PairTokens) -> PairTokens:
        """Cut the prompt from the sides; a prompt without tokens becomes BOS."""
        num_prompt, prompt = len(tokens.prompt), tokens.prompt
        if num_prompt == 0:
            prompt = self._bos
            # A template may begin every conversation with BOS, which is the prompt then.
            if _begins(tokens.chosen, prompt) and _begins(tokens.rejected, prompt):
                num_prompt = len(prompt)
        return PairTokens(
            prompt,
            tokens.chosen[num_prompt:],
            tokens.rejected[num_prompt:],
            None if tokens.chosen_mask is None else none_if_all(tokens.chosen_mask[num_prompt:]),
            None if tokens.rejected_mask is None else none_if_all(tokens.rejected_mask[num_prompt:]),
        )

    def _check_and_truncate(self, tokens: PairTokens) -> PairTokens | SkipReason:
        if not len(tokens.prompt):
            return SkipReason.NO_PROMPT
        if not tokens.both_sides_count:
            return SkipReason.EMPTY
        if np.array_equal(tokens.chosen, tokens.rejected):
            return SkipReason.IDENTICAL
        num_bos = len(self._bos) if _begins(tokens.prompt, self._bos) else 0
        shorter = truncate(tokens, self._options.max_length, self._options.truncation, num_bos)
        if isinstance(shorter, SkipReason):
            return shorter
        if not shorter.both_sides_count:
            return SkipReason.TRUNCATED_AWAY
        return SkipReason.IDENTICAL if np.array_equal(shorter.chosen, shorter.rejected) else shorter


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
    """The first 64 bits of a hash of the prompt's text, by which pairs are split by prompt.

    A prompt of one question hashes as its text, so that all row formats give it the same hash.
    """
    prompt = preference.prompt
    if not isinstance(prompt, str):
        turns = [(str(message.get("role")), _text_of(message.get("content"))) for message in prompt]
        spoken = [turn for turn in turns if turn[0] != "system"]
        prompt = spoken[0][1] if len(spoken) == 1 else json.dumps(spoken, ensure_ascii=False)
    content = prompt.strip().encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def _text_of(content: object) -> str:
    """The text of a message; typed parts are joined."""
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
