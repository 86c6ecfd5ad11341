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
    "side, those whose place is uncertain for that are not scored."
)


@dataclass(frozen=True, slots=True)
class TurnText:
    """A turn of the assistant inside a side, told by the conversation rendered up to it and up to its end."""

    start: str | None
    """The text before its words, header included; None for a turn that begins where the side does."""
    end: str | None
    """The text to its end-of-turn token; None for the turn that ends where the side does."""
    bounded: bool = False
    """Whether the turn that is next in `SideText.turns` is the assistant's next turn: this one ends before it."""


@dataclass(frozen=True, slots=True)
class SideText:
    """The prompt and one side in one text."""

    text: str
    needs_eos: bool
    turns: tuple[TurnText, ...] | None = None
    """The turns that count; None where all of the side does."""

    @property
    def marks(self) -> list[str]:
        """The texts whose tokens tell where turns begin and end."""
        return [text for turn in self.turns or () for text in (turn.start, turn.end) if text is not None]

    @property
    def num_marks(self) -> int:
        return len(self.marks)


@dataclass(frozen=True, slots=True)
class Draft:
    """A preference as the texts to tokenize."""

    preference: Preference
    prompt: str
    chosen: SideText
    rejected: SideText

    @property
    def texts(self) -> list[str]:
        """All of them: prompt, chosen and rejected in full, then the marks of the chosen and the rejected side."""
        return [self.prompt, self.chosen.text, self.rejected.text, *self.chosen.marks, *self.rejected.marks]


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


def draft_text(preference: Preference) -> Draft:
    """A text row, joined as it stands."""
    prompt, chosen, rejected = preference.prompt, preference.chosen, preference.rejected
    assert isinstance(prompt, str)
    assert isinstance(chosen, str)
    assert isinstance(rejected, str)
    return Draft(preference, prompt, SideText(prompt + chosen, True), SideText(prompt + rejected, True))


class MessageDrafter:
    """Message rows → text. A side of one message takes one rendering, and no more.

    Args:
        template: the chat template.
        all_turns: every turn of a side counts, not only the assistant's.
        notices: takes the sentences of this module, with how often they hold.
    """

    def __init__(self, template: ChatTemplate, all_turns: bool, notices: Counter[str]):
        self._template = template
        self._all_turns = all_turns
        self._notices = notices

    def draft(self, preference: Preference) -> Draft:
        """The texts of a message row.

        Raises:
            BadRowError: the template refuses the conversation.
            UsageError: there is no chat template.
        """
        prompt = self._template.render(preference, _messages(preference.prompt), generation_prompt=True)
        chosen = self._draft_side(preference, _messages(preference.chosen))
        rejected = self._draft_side(preference, _messages(preference.rejected))
        answers = ((chosen.text, preference.chosen), (rejected.text, preference.rejected))
        if any(_messages(side)[0]["role"] == "assistant" and not text.startswith(prompt) for text, side in answers):
            self._notices[NOT_A_PREFIX] += 1
        return Draft(preference, prompt, chosen, rejected)

    def _draft_side(self, preference: Preference, side: Sequence[Message]) -> SideText:
        rendered = self._template.render(preference, [*_messages(preference.prompt), *side])
        text, ended = self._template.end_turn(preference, rendered)
        only_assistant = len(side) == 1 and side[0]["role"] == "assistant"
        turns = None if self._all_turns or only_assistant else self._turns(preference, side, rendered)
        return SideText(text, needs_eos=not ended and side[-1]["role"] == "assistant", turns=turns)

    def _turns(self, preference: Preference, side: Sequence[Message], rendered: str) -> tuple[TurnText, ...]:
        indices = [index for index, message in enumerate(side) if message["role"] == "assistant"]
        turns = [self._turn(preference, side, index, rendered) for index in indices]
        if None in turns:
            self._notices[REWRITTEN] += 1
        pairs = zip(turns, [*turns[1:], None], strict=True)
        return tuple(replace(turn, bounded=following is not None) for turn, following in pairs if turn is not None)

    def _turn(self, preference: Preference, side: Sequence[Message], index: int, rendered: str) -> TurnText | None:
        """The texts that tell the place of a turn, None where it is uncertain."""
        try:
            start = self._start(preference, side[:index], rendered)
            end = None if index == len(side) - 1 else self._end(preference, side[: index + 1])
        except BadRowError:
            return None  # a template may take the whole conversation and refuse to stop in its middle
        return None if start is None and index > 0 else TurnText(start, end)

    def _start(self, preference: Preference, before: Sequence[Message], rendered: str) -> str | None:
        """The text that asks for the turn after `before`, None where the side begins or its place is uncertain."""
        if not before:
            return None
        messages = [*_messages(preference.prompt), *before]
        asking = self._template.render(preference, messages, generation_prompt=True)
        if rendered.startswith(asking):
            return asking
        # As with <think>: what differs may be the generation prompt, but nothing before it.
        return asking if rendered.startswith(self._template.render(preference, messages)) else None

    def _end(self, preference: Preference, upto: Sequence[Message]) -> str:
        return self._template.end_turn(
            preference, self._template.render(preference, [*_messages(preference.prompt), *upto])
        )[0]


def _messages(part: str | Sequence[Message]) -> Sequence[Message]:
    assert not isinstance(part, str)
    return part
