"""Chat messages of any accepted format → checked messages for chat templates."""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from dpocli.data.preference import Message
from dpocli.data.row_file import surrogate_problem

MAX_SHOWN = 60
"""Characters of a value that an error message quotes."""

HUMAN = "\n\nHuman:"

ASSISTANT = "\n\nAssistant:"

_TRANSCRIPT_TURN = re.compile(r"\n\n(Human|Assistant):")

_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function": "tool",
    "function_response": "tool",
}

_NOT_ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}


class FieldError(Exception):
    """A field of a row is wrong. `formats` adds the file and line."""

    def __init__(self, field: str, problem: str):
        super().__init__(field, problem)
        self.field = field
        self.problem = problem


def read_messages(value: Any, field: str) -> tuple[Message, ...]:
    """The messages in `value`: a list, or a single one. Keys that are None, which Parquet adds, are removed.

    Raises:
        FieldError: an item is not a message.
    """
    items = [value] if isinstance(value, Mapping) else value
    if not isinstance(items, list | tuple):
        raise FieldError(field, f"text or a list of messages is expected, found {type_name(value)}")
    return tuple(_read_message(item, f"{field}[{index}]") for index, item in enumerate(items))


def _read_message(value: Any, field: str) -> Message:
    if not isinstance(value, Mapping):
        raise FieldError(field, f'a message {{"role": …, "content": …}} is expected, found {type_name(value)}')
    message: Message = without_none(value)
    if "from" in message and "role" not in message:
        return _from_sharegpt(message, field)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise FieldError(f"{field}.role", f"a role such as user or assistant is expected, found {type_name(role)}")
    if role in _NOT_ROLES:
        raise FieldError(f"{field}.role", f"chat templates do not know {role!r}; write {_NOT_ROLES[role]!r}")
    _check_content(message, field)
    return message


def _check_content(message: Message, field: str) -> None:
    calls = message.get("tool_calls")
    if calls is not None and not (isinstance(calls, list) and all(isinstance(call, dict) for call in calls)):
        raise FieldError(f"{field}.tool_calls", f"a list of calls is expected, found {type_name(calls)}")
    content = message.get("content")
    if content is None:
        if message["role"] != "assistant" or not calls:
            raise FieldError(f"{field}.content", "missing; only an assistant message with tool_calls may leave it out")
    elif isinstance(content, list):
        for index, part in enumerate(content):
            if not isinstance(part, Mapping) or not isinstance(part.get("type"), str):
                raise FieldError(f"{field}.content[{index}]", 'a part {"type": "text", "text": …} is expected')
    elif not isinstance(content, str):
        raise FieldError(f"{field}.content", f"text or a list of typed parts is expected, found {type_name(content)}")


def _from_sharegpt(message: Message, field: str) -> Message:
    name, value = message["from"], message.get("value")
    if not isinstance(value, str):
        raise FieldError(f"{field}.value", f"text is expected, found {type_name(value)}")
    if name == "function_call":
        return {"role": "assistant", "tool_calls": _function_calls(value, f"{field}.value")}
    if not isinstance(name, str) or name not in _SHAREGPT_ROLES:
        known = ", ".join([*_SHAREGPT_ROLES, "function_call"])
        raise FieldError(f"{field}.from", f"{name!r} is not known; known are {known}")
    return {"role": _SHAREGPT_ROLES[name], "content": value}


def _function_calls(value: str, field: str) -> list[dict[str, Any]]:
    """ShareGPT writes a call, or a list of them, as JSON: `{"name": …, "arguments": {…}}`."""
    calls = parsed_json(value, field, "a function call in JSON is expected")
    calls = calls if isinstance(calls, list) else [calls]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise FieldError(field, 'a function call {"name": …, "arguments": {…}} is expected')
    return [{"type": "function", "function": call} for call in calls]


def parsed_json(text: str, field: str, expected: str) -> Any:
    """The value of a JSON text inside a row.

    Raises:
        FieldError: it is not JSON, is nested too deep, or holds a lone surrogate.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FieldError(field, f"{expected} ({error})") from error
    if (problem := surrogate_problem(json.dumps(value, ensure_ascii=False))) is not None:
        raise FieldError(field, problem)
    return value


def brief(value: object) -> str:
    """A value, shortened for an error message."""
    try:
        text = repr(value)
    except ValueError:  # an integer with more digits than Python prints
        return f"a {type_name(value)} of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"


def without_none(value: Any) -> Any:
    """`value` without keys that are None, at any depth."""
    if isinstance(value, Mapping):
        return {key: without_none(item) for key, item in value.items() if item is not None}
    return [without_none(item) for item in value] if isinstance(value, list | tuple) else value


def says_something(messages: Sequence[Message]) -> bool:
    """Whether an assistant message has content that the model would write."""
    spoken = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
    return any(any(message.get(key) for key in spoken) for message in messages if message["role"] == "assistant")


def split_transcripts(chosen: str, rejected: str) -> tuple[str, str, str]:
    """(prompt, chosen, rejected) of two texts with a common prefix.

    Transcripts (`\\n\\nHuman: … \\n\\nAssistant: …`) are split after the last shared `\\n\\nAssistant:`, other texts at the
    last shared word boundary (the space belongs to the answer, as in tokens). Each answer keeps at least one character
    where its text has one.
    """
    shared = common_prefix(chosen, rejected)
    if (marker := shared.rfind(ASSISTANT)) >= 0:
        end = marker + len(ASSISTANT)
    else:
        shared = shared[: max(min(len(chosen), len(rejected)) - 1, 0)]
        end = max((index for index, character in enumerate(shared, 1) if character.isspace()), default=0)
        end -= shared[end - 1 : end] == " "
    return chosen[:end], chosen[end:], rejected[end:]


def common_prefix(first: str, second: str) -> str:
    """The longest text with which both texts begin."""
    pairs = zip(first, second, strict=False)
    return first[: next((index for index, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))]


def transcript_as_messages(prompt: str, side: str) -> tuple[tuple[Message, ...], tuple[Message, ...]]:
    """(messages of the prompt, messages of the side) of a text prompt and an answer to it."""
    if not prompt.startswith(HUMAN):
        return tuple(_turn("user", prompt) for _ in range(bool(prompt))), (_turn("assistant", side),)
    if not prompt.endswith(ASSISTANT):
        return _transcript_turns(prompt), (_turn("assistant", side),)
    prompt_turns = _transcript_turns(prompt.removesuffix(ASSISTANT))
    return prompt_turns, _transcript_turns(ASSISTANT + side)


def _transcript_turns(text: str) -> tuple[Message, ...]:
    pieces = _TRANSCRIPT_TURN.split(text)[1:]
    roles = ["user" if speaker == "Human" else "assistant" for speaker in pieces[::2]]
    return tuple(_turn(role, content.strip()) for role, content in zip(roles, pieces[1::2], strict=True))


def _turn(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def type_name(value: Any) -> str:
    """What a JSON value is, for an error message."""
    names = {type(None): "nothing", bool: "true or false", int: "a number", float: "a number", str: "text"}
    default = "an object" if isinstance(value, Mapping) else "a list" if isinstance(value, list | tuple) else None
    return names.get(type(value)) or default or type(value).__name__
