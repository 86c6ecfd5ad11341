"""`Preference` → text to tokenize: the prompt, each side in full, and where the assistant's turns begin and end."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dpocli.data.chat_template import ChatTemplate
from dpocli.data.formats import BadRowError
from dpocli.data.messages import HUMAN, says_something
from dpocli.data.preference import Message, Preference

NOT_A_PREFIX = (
    "The chat template prints other text before an answer than it prints to ask for one (as with <think>); the part "
    "that both share is the prompt, the rest is scored with the answer."
)

REWRITTEN = (
    "The chat template prints earlier turns differently once others follow them. Of the assistant's turns inside a "
    "side, those whose place is uncertain for that reason are not scored."
)


@dataclass(frozen=True, slots=True)
class TurnPrefixes:
    """A turn of the assistant inside a side, located by two prefixes of the rendered conversation."""

    start: str | None
    """Ends before the words of the turn, header included; None for a turn that begins where the side does."""
    end: str | None
    """Ends with the turn's end-of-turn token; None for the turn that ends where the side does."""
    bounded: bool = False
    """Whether the assistant's next turn is next in `RenderedSide.turns`, so that this one ends before it."""


@dataclass(frozen=True, slots=True)
class RenderedSide:
    """The prompt and one side as one text."""

    text: str
    needs_eos: bool
    turns: tuple[TurnPrefixes, ...] | None = None
    """The turns that count; None where the whole side does."""

    @property
    def prefixes(self) -> list[str]:
        """The texts whose tokens locate the turns."""
        return [text for turn in self.turns or () for text in (turn.start, turn.end) if text is not None]


@dataclass(frozen=True, slots=True)
class RenderedPair:
    """A preference as the texts to tokenize."""

    preference: Preference
    prompt: str
    chosen: RenderedSide
    rejected: RenderedSide

    @property
    def texts(self) -> list[str]:
        """Prompt, chosen and rejected in full, then the prefixes of the chosen and of the rejected side."""
        return [self.prompt, self.chosen.text, self.rejected.text, *self.chosen.prefixes, *self.rejected.prefixes]


def is_empty(preference: Preference) -> bool:
    """Whether a side has nothing that the model would write."""
    sides = (preference.chosen, preference.rejected)
    return any(not side if isinstance(side, str) else not says_something(side) for side in sides)


def num_turns(preference: Preference) -> int:
    """User turns of the prompt, and 1 at least: which turn of the conversation the answers are."""
    prompt = preference.prompt
    if isinstance(prompt, str):
        return max(prompt.count(HUMAN), 1)
    return max(sum(1 for message in prompt if message["role"] == "user"), 1)


def render_text(preference: Preference) -> RenderedPair:
    """A text row: prompt and side joined without any change."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, str)
    assert isinstance(chosen, str)
    assert isinstance(rejected, str)
    return RenderedPair(preference, prompt, RenderedSide(prompt + chosen, True), RenderedSide(prompt + rejected, True))


class MessageRenderer:
    """Message rows → text. A side of one message is rendered once; other sides once more for each of their turns.

    Args:
        template: the chat template.
        all_turns: whether every turn of a side counts, not only the assistant's.
        notices: counts how often each notice of this module applies.
    """

    def __init__(self, template: ChatTemplate, all_turns: bool, notices: Counter[str]):
        self._template = template
        self._all_turns = all_turns
        self._notices = notices

    def render(self, preference: Preference) -> RenderedPair:
        """The texts of a message row.

        Raises:
            BadRowError: the template refuses the conversation.
            UsageError: there is no chat template.
        """
        prompt = self._template.render(preference, _messages(preference.prompt), generation_prompt=True)
        chosen = self._side(preference, _messages(preference.chosen))
        rejected = self._side(preference, _messages(preference.rejected))
        answers = ((chosen.text, preference.chosen), (rejected.text, preference.rejected))
        if any(_messages(side)[0]["role"] == "assistant" and not text.startswith(prompt) for text, side in answers):
            self._notices[NOT_A_PREFIX] += 1
        return RenderedPair(preference, prompt, chosen, rejected)

    def _side(self, preference: Preference, side: Sequence[Message]) -> RenderedSide:
        rendered = self._template.render(preference, [*_messages(preference.prompt), *side])
        text, ended = self._template.end_turn(preference, rendered)
        only_assistant = len(side) == 1 and side[0]["role"] == "assistant"
        turns = None if self._all_turns or only_assistant else self._turns(preference, side, rendered)
        return RenderedSide(text, needs_eos=not ended and side[-1]["role"] == "assistant", turns=turns)

    def _turns(self, preference: Preference, side: Sequence[Message], rendered: str) -> tuple[TurnPrefixes, ...]:
        indices = [index for index, message in enumerate(side) if message["role"] == "assistant"]
        turns = [self._turn(preference, side, index, rendered) for index in indices]
        if None in turns:
            self._notices[REWRITTEN] += 1
        pairs = zip(turns, [*turns[1:], None], strict=True)
        return tuple(replace(turn, bounded=following is not None) for turn, following in pairs if turn is not None)

    def _turn(self, preference: Preference, side: Sequence[Message], index: int, rendered: str) -> TurnPrefixes | None:
        """The prefixes of one turn, None where its place is uncertain."""
        try:
            start = self._start(preference, side[:index], rendered)
            end = None if index == len(side) - 1 else self._end(preference, side[: index + 1])
        except BadRowError:
            return None  # a template may accept the whole conversation and refuse a part of it
        return None if start is None and index > 0 else TurnPrefixes(start, end)

    def _start(self, preference: Preference, before: Sequence[Message], rendered: str) -> str | None:
        """The text that asks for the turn after `before`, None where the side begins or its place is uncertain."""
        if not before:
            return None
        messages = [*_messages(preference.prompt), *before]
        asking = self._template.render(preference, messages, generation_prompt=True)
        if rendered.startswith(asking):
            return asking
        # As with <think>: the generation prompt may differ, but nothing before it.
        return asking if rendered.startswith(self._template.render(preference, messages)) else None

    def _end(self, preference: Preference, upto: Sequence[Message]) -> str:
        rendered = self._template.render(preference, [*_messages(preference.prompt), *upto])
        return self._template.end_turn(preference, rendered)[0]


def _messages(part: str | Sequence[Message]) -> Sequence[Message]:
    assert not isinstance(part, str)
    return part
