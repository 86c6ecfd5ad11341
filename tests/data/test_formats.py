from typing import Any

import pytest

from dpocli.config.options import DataOptions
from dpocli.data.formats import BadRowError, to_preference
from dpocli.data.preference import Preference
from dpocli.data.row_file import RawRow
from dpocli.errors import DataError, ExitCode

USER = {"role": "user", "content": "hi"}
GOOD = {"role": "assistant", "content": "hello"}
BAD = {"role": "assistant", "content": "go away"}
SYSTEM = {"role": "system", "content": "be kind"}
TEXT = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
CHAT = {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}
TOOL = {"type": "function", "function": {"name": "look"}}


def read(fields: dict[str, Any], **values: Any) -> Preference:
    return to_preference(RawRow(7, "prefs.jsonl:8", fields), DataOptions().model_copy(update=values))


def parts(fields: dict[str, Any], **values: Any) -> tuple[Any, ...]:
    found = read(fields, **values)
    return tuple(part if isinstance(part, str) else list(part) for part in (found.prompt, found.chosen, found.rejected))


def problem(fields: dict[str, Any], **values: Any) -> str:
    with pytest.raises(BadRowError) as caught:
        read(fields, **values)
    assert caught.value.exit_code == ExitCode.DATA
    assert isinstance(caught.value, DataError)
    message = str(caught.value)
    assert message.startswith("prefs.jsonl:8: ")
    assert message.endswith(".")
    assert "\n" not in message
    return message.removeprefix("prefs.jsonl:8: ")


def test_explicit_text() -> None:
    found = read(TEXT)
    assert found == Preference(7, "prefs.jsonl:8", "Q:", " yes", " no")
    assert found.is_text
    assert parts({**TEXT, "prompt": ""}) == ("", " yes", " no")


def test_explicit_messages_single_or_listed() -> None:
    assert parts(CHAT) == ([USER], [GOOD], [BAD])
    assert parts({"prompt": USER, "chosen": GOOD, "rejected": BAD}) == ([USER], [GOOD], [BAD])


@pytest.mark.parametrize("prompt", [None, "", [], "hi", " hi\n", [USER], USER])
def test_sides_that_hold_the_whole_conversation(prompt: Any) -> None:
    row = {"chosen": [USER, GOOD], "rejected": [USER, BAD], "prompt": prompt}
    assert parts(row) == ([USER], [GOOD], [BAD])


def test_a_string_prompt_beside_answers_is_the_user_turn() -> None:
    assert parts({**CHAT, "prompt": "hi"}) == ([USER], [GOOD], [BAD])


def test_a_string_prompt_that_opens_after_a_system_message() -> None:
    row = {"prompt": "hi", "chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}
    assert parts(row) == ([SYSTEM, USER], [GOOD], [BAD])


def test_a_string_prompt_that_fits_nowhere() -> None:
    row = {"prompt": "other", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    assert problem(row).startswith("prompt: is not the user turn with which both sides begin")


def test_implicit_messages_share_what_they_begin_with() -> None:
    again = {"role": "user", "content": "and then?"}
    row = {"chosen": [USER, GOOD, again, GOOD], "rejected": [USER, GOOD, again, BAD]}
    assert parts(row) == ([USER, GOOD, again], [GOOD], [BAD])
    assert parts({"chosen": [USER, GOOD], "rejected": [USER, BAD, again, GOOD]}) == ([USER], [GOOD], [BAD, again, GOOD])


def test_identical_sides_keep_an_answer_each() -> None:
    assert parts({"chosen": [USER, GOOD], "rejected": [USER, GOOD]}) == ([USER], [GOOD], [GOOD])
    assert parts({"chosen": [USER, GOOD], "rejected": [USER, GOOD, GOOD]}) == ([USER], [GOOD], [GOOD, GOOD])


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("Sky is blue", "Sky is green", ("Sky is", " blue", " green")),
        ("I think so", "I thought so", ("I", " think so", " thought so")),
        ("Q?\n\nyes", "Q?\n\nno", ("Q?\n\n", "yes", "no")),
        ("Yes.", "Yes. And", ("", "Yes.", "Yes. And")),
        ("Q A", "Q A and B", ("Q", " A", " A and B")),
        ("a", "b", ("", "a", "b")),
        ("same text", "same text", ("same", " text", " text")),
        ("", "b", ("", "", "b")),
    ],
)
def test_implicit_text_is_split_at_a_word_boundary(chosen: str, rejected: str, expected: tuple[str, ...]) -> None:
    assert parts({"chosen": chosen, "rejected": rejected}) == expected


HH = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: how?\n\nAssistant:"


def test_transcripts_are_split_at_the_last_assistant_turn_that_both_share() -> None:
    assert parts({"chosen": HH + " well", "rejected": HH + " bad"}) == (HH, " well", " bad")
    longer = HH + " bad\n\nHuman: no\n\nAssistant: yes"
    assert parts({"chosen": HH + " well", "rejected": longer})[0] == HH
    assert parts({"chosen": HH, "rejected": HH + " bad"}) == (HH, "", " bad")


def test_text_as_messages_wraps_text() -> None:
    assert parts(TEXT, text_as="messages") == (
        [{"role": "user", "content": "Q:"}],
        [{"role": "assistant", "content": " yes"}],
        [{"role": "assistant", "content": " no"}],
    )
    assert "needs a text for the user turn" in problem({"chosen": "a", "rejected": "b"}, text_as="messages")
    assert parts(CHAT, text_as="messages") == ([USER], [GOOD], [BAD])


def test_text_as_messages_takes_transcripts_apart() -> None:
    sides = {"chosen": HH + " well", "rejected": HH + " bad\n\nHuman: no\n\nAssistant: yes"}
    prompt, chosen, rejected = parts(sides, text_as="messages")
    assert prompt == [USER, GOOD, {"role": "user", "content": "how?"}]
    assert chosen == [{"role": "assistant", "content": "well"}]
    assert [(m["role"], m["content"]) for m in rejected] == [("assistant", "bad"), ("user", "no"), ("assistant", "yes")]
    explicit = {"prompt": "\n\nHuman: hi", "chosen": "hello", "rejected": "go away"}
    assert parts(explicit, text_as="messages") == ([USER], [GOOD], [BAD])


def test_sharegpt() -> None:
    row = {
        "conversations": [
            {"from": "system", "value": "be kind"},
            {"from": "human", "value": "hi"},
            {"from": "function_call", "value": '{"name": "look", "arguments": {"at": 1}}'},
            {"from": "observation", "value": "seen"},
        ],
        "chosen": {"from": "gpt", "value": "hello"},
        "rejected": {"from": "gpt", "value": "go away"},
    }
    prompt, chosen, rejected = parts(row)
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    assert prompt == [
        SYSTEM,
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "content": "seen"},
    ]
    assert (chosen, rejected) == ([GOOD], [BAD])


def test_renamed_fields() -> None:
    row = {"question": "Q:", "good": " yes", "bad": " no"}
    assert parts(row, prompt_field="question", chosen_field="good", rejected_field="bad") == ("Q:", " yes", " no")


def test_system_becomes_the_first_message() -> None:
    assert parts({**CHAT, "system": "be kind"})[0] == [SYSTEM, USER]
    assert parts({**CHAT, "system": None})[0] == [USER]
    assert parts({**CHAT, "system": ""})[0] == [USER]
    assert parts({**CHAT, "prompt": [SYSTEM, USER], "system": "be kind"})[0] == [SYSTEM, USER]
    assert parts({**TEXT, "system": "be kind"}, text_as="messages")[0][0] == SYSTEM
    other = {**CHAT, "prompt": [SYSTEM, USER], "system": "be rude"}
    assert problem(other).startswith("system: differs from the system message")
    sides = {"chosen": [SYSTEM, GOOD], "rejected": [{**SYSTEM, "content": "x"}, BAD], "system": "be kind"}
    assert problem(sides).startswith("system: differs")


@pytest.mark.parametrize("field", ["system", "tools", "chat_template_kwargs"])
def test_what_only_templates_read_has_no_place_in_text(field: str) -> None:
    value = {"system": "be kind", "tools": [TOOL], "chat_template_kwargs": {"x": 1}}[field]
    assert problem({**TEXT, field: value}).startswith(f"{field}: has no place in a text row")
    assert read({**TEXT, field: None}).is_text


@pytest.mark.parametrize("value", [[TOOL], '[{"type": "function", "function": {"name": "look", "x": null}}]'])
def test_tools_as_a_list_or_as_json(value: Any) -> None:
    assert read({**CHAT, "tools": value}).tools == [TOOL]


@pytest.mark.parametrize("value", [None, [], "", "[]"])
def test_no_tools(value: Any) -> None:
    assert read({**CHAT, "tools": value}).tools is None


def test_tools_whose_entries_are_json() -> None:
    assert read({**CHAT, "tools": ['{"type": "function", "function": {"name": "look"}}']}).tools == [TOOL]


def test_what_goes_with_a_row() -> None:
    row = {**CHAT, "source": "web", "weight": 0, "chat_template_kwargs": {"a": 1, "b": None}, "id": [3], "note": None}
    found = read(row, keep_columns=["id", "note"])
    assert (found.source, found.weight, found.row, found.where) == ("web", 0.0, 7, "prefs.jsonl:8")
    assert found.chat_template_kwargs == {"a": 1}
    assert found.kept == {"id": [3], "note": None}
    assert read({**CHAT, "weight": None, "source": None}) == read(CHAT)


def test_none_entries_are_removed_at_any_depth() -> None:
    call = {"id": None, "function": {"name": "look", "arguments": {"a": 1, "b": None}}}
    message = {"role": "assistant", "content": None, "tool_calls": [call], "name": None}
    parted = {"role": "user", "content": [{"type": "text", "text": "x", "image": None}], "tool_calls": None}
    prompt, chosen, _ = parts({"prompt": [parted], "chosen": [message], "rejected": [BAD]})
    assert chosen == [{"role": "assistant", "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}]}]
    assert prompt == [{"role": "user", "content": [{"type": "text", "text": "x"}]}]


@pytest.mark.parametrize(
    ("change", "start"),
    [
        ({"chosen": None}, "chosen: is null"),
        ({"chosen": 3}, "chosen: text or messages are expected, found a number"),
        ({"chosen": "text"}, "chosen: is text, but the other side holds messages"),
        ({"rejected": "text"}, "rejected: is text, but the other side holds messages"),
        ({"prompt": 3}, "prompt: text or a list of messages is expected, found a number"),
        ({"prompt": ["hi"]}, "prompt[0]: a message"),
        ({"chosen": [None]}, "chosen[0]: a message"),
        ({"chosen": [{"content": "x"}]}, "chosen[0].role: a role such as user or assistant is expected, found nothing"),
        ({"chosen": [{"role": "gpt", "content": "x"}]}, "chosen[0].role: chat templates do not know 'gpt'"),
        ({"chosen": [{"role": "assistant"}]}, "chosen[0].content: missing"),
        ({"prompt": [{"role": "user", "content": None}]}, "prompt[0].content: missing"),
        ({"chosen": [{"role": "assistant", "content": 3}]}, "chosen[0].content: text or a list of typed parts"),
        ({"chosen": [{"role": "assistant", "content": ["x"]}]}, "chosen[0].content[0]: a part"),
        ({"chosen": [{"role": "assistant", "tool_calls": "x"}]}, "chosen[0].tool_calls: a list of calls"),
        ({"chosen": [USER]}, "chosen: has no message of the assistant"),
        ({"chosen": {"from": "alien", "value": "x"}}, "chosen[0].from: 'alien' is not known; known are human"),
        ({"chosen": {"from": "gpt", "value": 1}}, "chosen[0].value: text is expected, found a number"),
        ({"chosen": {"from": "function_call", "value": "x"}}, "chosen[0].value: a function call in JSON is expected"),
        ({"chosen": {"from": "function_call", "value": "[1]"}}, "chosen[0].value: a function call {"),
        ({"system": ["x"]}, "system: text is expected, found a list"),
        ({"source": 1}, "source: text is expected, found a number"),
        ({"weight": -1}, "weight: a finite number of at least 0 is expected, found -1"),
        ({"weight": float("nan")}, "weight: a finite number"),
        ({"weight": True}, "weight: a finite number"),
        ({"weight": "1"}, "weight: a finite number"),
        ({"tools": "{broken"}, "tools: is text, but not JSON"),
        ({"tools": {"name": "x"}}, "tools: a list of tools"),
        ({"tools": [3]}, "tools[0]: a JSON schema is expected"),
        ({"chat_template_kwargs": [1]}, "chat_template_kwargs: an object is expected"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs: tokenize cannot be set by a row"),
    ],
)
def test_what_is_wrong_is_said_with_the_field(change: dict[str, Any], start: str) -> None:
    assert problem({**CHAT, **change}).startswith(start)


def test_missing_fields_name_what_is_there() -> None:
    message = problem({"question": "x", "good": "y"})
    assert message.startswith("chosen: missing; the row has 'question', 'good'")
    assert "--chosen-field" in message
    assert problem(CHAT, keep_columns=["id"]).startswith("id: missing")
    assert "'x'" in problem({**TEXT, "x": 1}, rejected_field="bad")


def test_messages_beside_text_answers_are_refused() -> None:
    assert problem({**TEXT, "prompt": [USER]}).startswith("prompt: text is expected beside text answers")
    row = {"conversations": [USER], "chosen": "a", "rejected": "b"}
    assert problem(row).startswith("conversations: text is expected beside text answers")


def test_a_line_that_could_not_be_read() -> None:
    with pytest.raises(BadRowError, match=r"^prefs\.jsonl:8: column 3: not JSON\.$") as caught:
        to_preference(RawRow(7, "prefs.jsonl:8", None, "column 3: not JSON"), DataOptions())
    assert caught.value.where == "prefs.jsonl:8"
    assert caught.value.field is None
