"""Raw rows → `Preference`: every accepted row format, recognised by its fields."""

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from dpocli.config.options import DataOptions
from dpocli.data.messages import (
    FieldError,
    brief,
    parsed_json,
    read_messages,
    split_transcripts,
    transcript_as_messages,
    type_name,
    without_none,
)
from dpocli.data.preference import Message, Preference
from dpocli.data.row_file import RawRow
from dpocli.errors import DataError

MAX_NAMES = 8
"""Fields of a row that an error message lists."""

CONVERSATIONS = "conversations"

LARGEST_WEIGHT = 3.4e38
"""Just below the largest float32, the type of weights in caches."""

_OPTIONAL_FIELDS = ("system", "tools", "chat_template_kwargs", "source", "weight")

_RESERVED_ARGUMENTS = {
    *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
    *("tokenize", "tokenizer_kwargs", "padding", "truncation", "max_length", "sanitize_control_tokens"),
    *("return_tensors", "return_dict", "return_assistant_tokens_mask"),
}
"""Arguments that dpocli passes to the template or the tokenizer: a row that sets one would change what is scored."""

Messages = tuple[Message, ...]

TextParts = tuple[str, str, str]

MessageParts = tuple[Messages, Messages, Messages]
"""(prompt, chosen, rejected), as in `TextParts`."""


class BadRowError(DataError):
    """A row that cannot be read. The message is `where: field: problem`, and how to fix it."""

    def __init__(self, where: str, field: str | None, problem: str):
        super().__init__(": ".join(part for part in (where, field, problem) if part) + ".")
        self.where = where
        self.field = field


def required_field_names(options: DataOptions) -> list[str]:
    """The fields that every row must have, under the names given by options."""
    return [options.chosen_field, options.rejected_field, *options.keep_columns]


def field_names(options: DataOptions) -> list[str]:
    """All fields that are read, under the names given by options."""
    return [*required_field_names(options), options.prompt_field, CONVERSATIONS, *_OPTIONAL_FIELDS]


def to_preference(raw: RawRow, options: DataOptions) -> Preference:
    """The preference in a row.

    Raises:
        BadRowError: a field is missing or of the wrong type, or the fields do not fit together.
    """
    if raw.fields is None:
        raise BadRowError(raw.where, None, raw.problem or "the row cannot be read")
    try:
        return _read(raw, raw.fields, options)
    except FieldError as error:
        raise BadRowError(raw.where, error.field, error.problem) from error
    except RecursionError as error:
        raise BadRowError(raw.where, None, "values are nested too deep to be read") from error


def _read(raw: RawRow, fields: Mapping[str, Any], options: DataOptions) -> Preference:
    tools = _read_tools(fields.get("tools"))
    kwargs = _read_template_kwargs(fields.get("chat_template_kwargs"))
    system = _read_text(fields, "system")
    text = _text_parts(fields, options)
    parts: TextParts | MessageParts
    if text is not None and options.text_as == "text":
        _refuse_on_text({"system": system, "tools": tools, "chat_template_kwargs": kwargs})
        parts = text
    else:
        parts = _message_parts(fields, options) if text is None else _wrap(text, options)
        parts = _with_system(system, parts) if system else parts
    prompt, chosen, rejected = parts
    return Preference(
        row=raw.row,
        where=raw.where,
        prompt=prompt,
        chosen=chosen,
        rejected=rejected,
        tools=tools,
        chat_template_kwargs=kwargs,
        source=_read_text(fields, "source"),
        weight=_read_weight(fields.get("weight")),
        kept={name: _kept(fields, name) for name in options.keep_columns},
    )


def _text_parts(fields: Mapping[str, Any], options: DataOptions) -> TextParts | None:
    """The parts of a text row; None if the row holds messages."""
    chosen, rejected = _required(fields, options.chosen_field), _required(fields, options.rejected_field)
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        return None
    name, prompt = _prompt(fields, options)
    if prompt is None:
        return split_transcripts(chosen, rejected)
    if not isinstance(prompt, str):
        raise FieldError(
            name,
            f"text is expected beside text answers, found {type_name(prompt)}; for a chat write both answers as "
            'messages: {"role": "assistant", "content": …}',
        )
    return prompt, chosen, rejected


def _message_parts(fields: Mapping[str, Any], options: DataOptions) -> MessageParts:
    names = (options.chosen_field, options.rejected_field)
    for name in names:
        if isinstance(fields[name], str):
            raise FieldError(name, "is text, but the other side holds messages; write both sides in one form")
    chosen, rejected = (read_messages(fields[name], name) for name in names)
    parts = _split_messages(*_prompt(fields, options), chosen, rejected)
    for name, side in zip(names, parts[1:], strict=True):
        if side and all(message["role"] != "assistant" for message in side):
            raise FieldError(name, "has no message of the assistant of its own, so there is nothing to score")
    return parts


def _prompt(fields: Mapping[str, Any], options: DataOptions) -> tuple[str, Any]:
    """(name of the field that holds the prompt, its value), the value None where there is none."""
    name = options.prompt_field if fields.get(options.prompt_field) is not None else CONVERSATIONS
    return name, fields.get(name)


def _split_messages(prompt_name: str, prompt: Any, chosen: Messages, rejected: Messages) -> MessageParts:
    num_shared = _num_shared(chosen, rejected)
    implicit = (chosen[:num_shared], chosen[num_shared:], rejected[num_shared:])
    if prompt is None or prompt == "" or prompt == []:
        return implicit
    if isinstance(prompt, str):
        if any(message["role"] == "user" and _same_text(message.get("content"), prompt) for message in implicit[0]):
            return implicit
        if any(message["role"] != "assistant" for message in (*chosen, *rejected)):
            raise FieldError(
                prompt_name,
                "is not the user turn with which both sides begin; leave it out where the sides hold the whole "
                "conversation, or leave only the answers in the sides",
            )
        return ({"role": "user", "content": prompt},), chosen, rejected
    messages = read_messages(prompt, prompt_name)
    repeated = len(messages) <= num_shared and chosen[: len(messages)] == messages
    return implicit if repeated else (messages, chosen, rejected)


def _num_shared(chosen: Sequence[Message], rejected: Sequence[Message]) -> int:
    """Number of leading messages that both share, so that at least one is left in each that has any."""
    longest = max(min(len(chosen), len(rejected)) - 1, 0)
    return next((index for index in range(longest) if chosen[index] != rejected[index]), longest)


def _same_text(content: Any, prompt: str) -> bool:
    return isinstance(content, str) and content.strip() == prompt.strip()


def _wrap(text: TextParts, options: DataOptions) -> MessageParts:
    prompt, chosen, rejected = text
    if not prompt:
        raise FieldError(options.prompt_field, "missing; --text-as messages needs a text for the user turn")
    (messages, chosen_turns), (_, rejected_turns) = (
        transcript_as_messages(prompt, chosen),
        transcript_as_messages(prompt, rejected),
    )
    return messages, chosen_turns, rejected_turns


def _with_system(system: str, parts: MessageParts) -> MessageParts:
    prompt, chosen, rejected = parts
    message = {"role": "system", "content": system}
    openings = [*prompt[:1]] or [*chosen[:1], *rejected[:1]]
    found = [opening for opening in openings if opening["role"] in ("system", "developer")]
    if any(opening != message for opening in found):
        raise FieldError(
            "system", "differs from the system message that the conversation begins with; keep one of them"
        )
    return parts if found else ((message, *prompt), chosen, rejected)


def _refuse_on_text(values: Mapping[str, Any]) -> None:
    for name, value in values.items():
        if value:
            raise FieldError(name, "has no place in a text row; write messages, or give --text-as messages")


def _read_tools(value: Any) -> list[Mapping[str, Any]] | None:
    tools = _from_json(value, "tools")
    if not tools:
        return None
    if not isinstance(tools, list):
        raise FieldError("tools", f"a list of tools, or one as a JSON string, is expected, found {type_name(tools)}")
    read = [without_none(_from_json(tool, f"tools[{index}]")) for index, tool in enumerate(tools)]
    for index, tool in enumerate(read):
        if not isinstance(tool, dict):
            raise FieldError(f"tools[{index}]", f"a JSON schema is expected, found {type_name(tool)}")
    return read


def _read_template_kwargs(value: Any) -> dict[str, Any]:
    kwargs = without_none(_from_json(value, "chat_template_kwargs")) or {}
    if not isinstance(kwargs, dict):
        raise FieldError("chat_template_kwargs", f"an object is expected, found {type_name(kwargs)}")
    if taken := sorted(_RESERVED_ARGUMENTS & kwargs.keys()):
        raise FieldError("chat_template_kwargs", f"{', '.join(taken)} cannot be set by a row; remove it")
    return kwargs


def _from_json(value: Any, field: str) -> Any:
    if not isinstance(value, str) or not value.strip():
        return value or None
    return parsed_json(value, field, "is text, but not JSON")


def _read_text(fields: Mapping[str, Any], name: str) -> str:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise FieldError(name, f"text is expected, found {type_name(value)}")
    return value or ""


def _read_weight(value: Any) -> float:
    if value is None:
        return 1.0
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= LARGEST_WEIGHT:
        raise FieldError("weight", f"a finite number of at least 0 is expected, found {brief(value)}")
    return float(value)


def _required(fields: Mapping[str, Any], name: str) -> Any:
    value = fields.get(name)
    if value is None:
        _missing(fields, name, "name the right one with --prompt-field, --chosen-field and --rejected-field")
    if not isinstance(value, str | Mapping | list | tuple):
        raise FieldError(name, f"text or messages are expected, found {type_name(value)}")
    return value


def _kept(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        _missing(fields, name, "take it out of --keep-columns, or add it to the row")
    return fields[name]


def _missing(fields: Mapping[str, Any], name: str, remedy: str) -> NoReturn:
    if name in fields:
        raise FieldError(name, "is null; fill it in or remove the row")
    names = [brief(field) for field in fields]
    more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    found = ", ".join(names[:MAX_NAMES]) + more or "nothing"
    raise FieldError(name, f"missing; the row has {found}: {remedy}")
