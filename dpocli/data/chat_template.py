"""Rendering conversations with the tokenizer's chat template, and where in the text the assistant's turns end."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import TYPE_CHECKING, Any

from dpocli.data.formats import BadRowError
from dpocli.data.preference import Message, Preference
from dpocli.errors import UsageError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "dpocliprobe"


@dataclass(frozen=True, slots=True)
class TurnEnd:
    """What the template prints after the content of the last message."""

    tokens: str
    """The special tokens that end the turn, usually one; empty where the template prints none."""
    rest: str
    """What follows them; the model does not have to write it."""


class ChatTemplate:
    """The chat template of a tokenizer, with the date that it prints fixed.

    Args:
        tokenizer: any transformers tokenizer.
        template_date: the date that templates print; the time is midnight.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", template_date: date):
        self._tokenizer = tokenizer
        self._date_string = template_date.strftime("%d %b %Y")  # as Llama 3's template takes it
        self._clock = _fixed_clock(template_date)
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values() if str(token).strip()}
        longest_first = sorted(added, key=len, reverse=True)
        self._run = re.compile(f"(?:{'|'.join(map(re.escape, longest_first)) or '(?!)'})+")
        self._special = tuple(mark for mark in added if added[mark])
        self._turn_ends: dict[str, TurnEnd | None] = {}

    def render(self, preference: Preference, messages: Sequence[Message], generation_prompt: bool = False) -> str:
        """The conversation as text; `generation_prompt` adds the header of the assistant's next turn.

        Raises:
            BadRowError: the template refuses the conversation.
            UsageError: there is no chat template, or it is no valid one.
        """
        return self._render(self._template(preference), preference, messages, generation_prompt) if messages else ""

    def end_turn(self, preference: Preference, rendered: str) -> tuple[str, bool]:
        """(the text up to and including its end-of-turn token, whether there is one).

        A probe finds what ends a turn, since templates may print another token after it (Phi-3). A row with another end
        (a tool call in Llama 3) ends with its last special token.
        """
        turn_end = self._turn_end(preference)
        if turn_end and not turn_end.tokens:
            return rendered, False
        if turn_end and rendered.endswith(turn_end.tokens + turn_end.rest):
            return rendered[: len(rendered) - len(turn_end.rest)], True
        stripped = rendered.rstrip()
        return (stripped, True) if stripped.endswith(self._special) else (rendered, False)

    def _turn_end(self, preference: Preference) -> TurnEnd | None:
        template = self._template(preference)
        if template not in self._turn_ends:
            self._turn_ends[template] = self._probe(template, preference)
        return self._turn_ends[template]

    def _probe(self, template: str, preference: Preference) -> TurnEnd | None:
        messages = [{"role": "user", "content": _PROBE}, {"role": "assistant", "content": _PROBE}]
        try:
            rendered = self._render(template, preference, messages, generation_prompt=False)
        except BadRowError:
            return None  # a template with unusual demands: `end_turn` uses the end of each row
        _, found, tail = rendered.rpartition(_PROBE)
        if not found:
            return None
        # The first run of special tokens after the content (Command R7B prints two).
        end = self._run.search(tail)
        return TurnEnd(end.group(), tail[end.end() :]) if end else TurnEnd("", "")

    def _template(self, preference: Preference) -> str:
        try:
            return str(self._tokenizer.get_chat_template(None, preference.tools))
        except ValueError as error:
            raise UsageError(
                f"{preference.where}: the row holds chat messages, but the tokenizer of --model has no chat template "
                "to render them. Give a model whose tokenizer has one (an instruct model), or rows of text "
                '({"prompt": "…", "chosen": "…", "rejected": "…"}).'
            ) from error

    def _render(
        self, template: str, preference: Preference, messages: Sequence[Message], generation_prompt: bool
    ) -> str:
        from jinja2 import TemplateError, TemplateSyntaxError

        kwargs: dict[str, Any] = {"date_string": self._date_string, **preference.chat_template_kwargs}
        try:
            rendered = self._tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=None if preference.tools is None else [dict(tool) for tool in preference.tools],
                chat_template=self._clock(template),
                add_generation_prompt=generation_prompt,
                tokenize=False,
                **kwargs,
            )
        except TemplateSyntaxError as error:
            raise UsageError(
                f"The chat template of the tokenizer of --model is not valid (line {error.lineno}: {error.message}). "
                "Fix chat_template.jinja, or the template in tokenizer_config.json, beside the model."
            ) from error
        except (
            TemplateError,
            ArithmeticError,
            AttributeError,
            LookupError,
            RecursionError,
            TypeError,
            ValueError,
        ) as error:
            raise BadRowError(
                preference.where, "messages", f"the chat template refuses the conversation: {str(error).rstrip('.')}"
            ) from error
        return str(rendered)


def _fixed_clock(day: date) -> Callable[[str], str]:
    """Add a macro `strftime_now` of that day, at midnight, to templates that use it.

    The function of this name in transformers reads the clock, and arguments cannot replace it; a macro can.
    """
    values = {f"%{letter}": day.strftime(f"%{letter}") for letter in "aAbBcdfHIjmMpSUwWxXyY"}
    values |= {f"%-{letter}": day.strftime(f"%{letter}").lstrip("0") or "0" for letter in "dHIjmMS"}
    values |= {"%F": day.isoformat(), "%T": "00:00:00", "%e": f"{day.day:2}", "%Z": "", "%z": "", "%%": "%"}
    replacements = "".join(f".replace({code!r}, {value!r})" for code, value in values.items())
    macro = f"{{%- macro strftime_now(format) -%}}{{{{ format{replacements} }}}}{{%- endmacro +%}}"
    return lambda template: macro + template if "strftime_now" in template else template
