import json
import logging
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dpocli.config.options import DataOptions
from dpocli.data.encoder import NO_EOS, TEXT_FOR_A_CHAT_MODEL, Encoder, encode_rows, pair_id, prompt_hash
from dpocli.data.formats import BadRowError
from dpocli.data.preference import EncodedPair, Preference, Skipped, SkipReason
from dpocli.data.rendering import NOT_A_PREFIX, REWRITTEN
from dpocli.data.sources import SourceRows, open_rows
from dpocli.errors import UsageError
from tests.data.tokenizers_for_tests import (
    CHATML,
    EOS_AT_EACH_TURN,
    NO_END,
    STRIPS_THINKING,
    THINKING,
    byte_level,
    characters,
    metaspace,
)

HH = "\n\nHuman: hi\n\nAssistant:"


def options(**values: Any) -> DataOptions:
    return DataOptions().model_copy(update=values)


def say(role: str, content: str, **others: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **others}


def text(prompt: str = "Q:", chosen: str = " yes", rejected: str = " no") -> Preference:
    return Preference(3, "rows.jsonl:4", prompt, chosen, rejected)


def chat(chosen: list[Any] | str = "yes", rejected: list[Any] | str = "no", **values: Any) -> Preference:
    sides = ([say("assistant", side)] if isinstance(side, str) else side for side in (chosen, rejected))
    chosen_messages, rejected_messages = sides
    prompt = values.pop("prompt", [say("user", "hi")])
    return Preference(3, "rows.jsonl:4", prompt, chosen_messages, rejected_messages, **values)


def pair_of(tokenizer: Any, preference: Preference, **values: Any) -> EncodedPair:
    pair = Encoder(tokenizer, options(**values)).encode(preference)
    assert isinstance(pair, EncodedPair), pair
    return pair


def skip_of(tokenizer: Any, preference: Preference, **values: Any) -> SkipReason:
    skipped = Encoder(tokenizer, options(**values)).encode(preference)
    assert isinstance(skipped, Skipped)
    assert (skipped.row, skipped.where) == (3, "rows.jsonl:4")
    return skipped.reason


def spelled(tokenizer: Any, pair: EncodedPair) -> list[str]:
    return [tokenizer.decode(ids) for ids in (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)]


def counted(tokenizer: Any, pair: EncodedPair) -> str:
    assert pair.chosen_mask is not None
    return str(tokenizer.decode(pair.chosen_ids[pair.chosen_mask]))


def test_a_text_row() -> None:
    tokenizer = byte_level(adds_bos=True)
    pair = pair_of(tokenizer, text())
    assert spelled(tokenizer, pair) == ["<s>Q:", " yes</s>", " no</s>"]
    assert pair.prompt_ids.dtype == pair.chosen_ids.dtype == np.int32
    assert (pair.row, pair.num_turns, pair.truncated, pair.chosen_mask) == (3, 1, False, None)


def test_bos_and_eos_that_the_text_has_are_not_doubled() -> None:
    tokenizer = byte_level(adds_bos=True)
    assert spelled(tokenizer, pair_of(tokenizer, text("<s>Q:", " yes</s>"))) == ["<s>Q:", " yes</s>", " no</s>"]


def test_no_bos_where_the_tokenizer_adds_none() -> None:
    assert spelled(byte_level(), pair_of(byte_level(), text())) == ["Q:", " yes</s>", " no</s>"]


def test_a_prompt_without_tokens_gets_bos() -> None:
    for tokenizer in (byte_level(), byte_level(adds_bos=True)):
        assert spelled(tokenizer, pair_of(tokenizer, text(""))) == ["<s>", " yes</s>", " no</s>"]
    assert skip_of(byte_level(bos=False), text("")) == SkipReason.NO_PROMPT


def test_a_tokenizer_without_eos() -> None:
    tokenizer = byte_level().__class__(tokenizer_object=byte_level().backend_tokenizer)
    encoder = Encoder(tokenizer, options())
    pair = encoder.encode(text())
    assert isinstance(pair, EncodedPair)
    assert spelled(tokenizer, pair) == ["Q:", " yes", " no"]
    assert set(encoder.notices) == {NO_EOS}


@pytest.mark.parametrize(
    ("tokenizer", "row", "expected"),
    [
        (byte_level(), text("the ", "answer", "question"), ["the", " answer</s>", " question</s>"]),
        # `What ` alone ends in `t`, `▁`; what follows makes it `t▁is`
        (metaspace(), text("What ", "is the answer", "was"), ["<s> Wha", "t is the answer</s>", "t was</s>"]),
    ],
)
def test_a_token_that_merges_over_the_boundary_belongs_to_the_sides(
    tokenizer: Any, row: Preference, expected: list[str]
) -> None:
    pair = pair_of(tokenizer, row)
    lists = (pair.prompt_ids, pair.chosen_ids, pair.rejected_ids)
    pieces = ["".join(tokenizer.convert_ids_to_tokens(ids)) for ids in lists]
    assert [part.replace("▁", " ").replace("Ġ", " ") for part in pieces] == expected


def test_text_under_a_chat_template_is_noticed() -> None:
    encoder = Encoder(byte_level(template=CHATML), options())
    encoder.encode(text())
    encoder.encode(text("other"))
    assert encoder.notices == {TEXT_FOR_A_CHAT_MODEL: 2}


def test_turns_of_a_prompt() -> None:
    assert pair_of(byte_level(), text(HH + " a\n\nHuman: b\n\nAssistant:")).num_turns == 2
    prompt = [say("system", "s"), say("user", "a"), say("assistant", "b"), say("user", "c")]
    assert pair_of(byte_level(template=CHATML), chat(prompt=prompt)).num_turns == 2


def test_messages_without_a_chat_template() -> None:
    with pytest.raises(
        UsageError, match=r"rows\.jsonl:4: the row holds chat messages, but the tokenizer of --model has"
    ):
        Encoder(byte_level(), options(on_bad_row="skip")).encode(chat())


def test_a_message_row_ends_with_the_end_of_its_turn() -> None:
    tokenizer = byte_level(template=CHATML)
    pair = pair_of(tokenizer, chat())
    prompt = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert spelled(tokenizer, pair) == [prompt, "yes<|im_end|>", "no<|im_end|>"]


def test_a_template_that_ends_no_turn_gets_eos_once() -> None:
    tokenizer = byte_level(template=NO_END)
    assert spelled(tokenizer, pair_of(tokenizer, chat(chosen="yes</s>")))[1:] == [" yes</s>", " no</s>"]


def test_a_turn_with_an_end_of_its_own() -> None:
    template = CHATML.replace("'<|im_end|>\\n'", "('<|call_end|>' if message['tool_calls'] else '<|im_end|>') + '\\n'")
    tokenizer = byte_level(template=template)
    call = say("assistant", "look()", tool_calls=[{"function": {"name": "look"}}])
    assert spelled(tokenizer, pair_of(tokenizer, chat(chosen=[call])))[1:] == ["look()<|call_end|>", "no<|im_end|>"]


def test_a_template_that_refuses_the_probe_still_ends_turns() -> None:
    template = "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}" + CHATML
    tokenizer = byte_level(template=template)
    pair = pair_of(tokenizer, chat(prompt=[say("system", "s"), say("user", "hi")]))
    assert spelled(tokenizer, pair)[1:] == ["yes<|im_end|>", "no<|im_end|>"]


def test_a_generation_prompt_that_is_no_prefix_is_noticed_once_a_row() -> None:
    tokenizer = byte_level(template=THINKING)
    encoder = Encoder(tokenizer, options())
    pairs = [encoder.encode(chat()), encoder.encode(chat(chosen="<think>\nwell</think>yes"))]
    assert [pair.prompt_ids.tolist() for pair in pairs if isinstance(pair, EncodedPair)] == [
        tokenizer("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
    ] * 2
    assert encoder.notices == {NOT_A_PREFIX: 2}


def test_no_prompt_at_all_under_a_template_that_prints_bos() -> None:
    tokenizer = byte_level(adds_bos=True, template=EOS_AT_EACH_TURN)
    pair = pair_of(tokenizer, chat(prompt=[]))
    assert spelled(tokenizer, pair) == ["<s>", " yes</s>", " no</s>"]


def test_only_the_assistants_turns_of_a_side_count() -> None:
    tokenizer = byte_level(template=CHATML)
    side = [say("assistant", "look()"), say("tool", "a cat"), say("assistant", "It is a cat."), say("user", "thanks")]
    pair = pair_of(tokenizer, chat(chosen=side))
    assert counted(tokenizer, pair) == "look()<|im_end|>It is a cat.<|im_end|>"
    assert pair.rejected_mask is None
    assert pair.num_chosen_tokens < len(pair.chosen_ids)
    assert pair_of(tokenizer, chat(chosen=side), scored_turns="all").chosen_mask is None


def test_a_side_that_begins_with_a_user_turn() -> None:
    tokenizer = byte_level(template=CHATML)
    sides = [[say("user", name), say("assistant", f"to {name}")] for name in ("a", "b")]
    pair = pair_of(tokenizer, chat(*sides, prompt=[]))
    assert counted(tokenizer, pair) == "to a<|im_end|>"


def test_masks_under_a_template_that_ends_turns_with_eos() -> None:
    tokenizer = metaspace(template=EOS_AT_EACH_TURN)
    side = [say("assistant", "one"), say("user", "more"), say("assistant", "two")]
    pair = pair_of(tokenizer, chat(chosen=side))
    assert counted(tokenizer, pair) == "one</s> two</s>"


def test_turns_that_are_printed_otherwise_when_last() -> None:
    tokenizer = byte_level(template=STRIPS_THINKING)
    side = [say("assistant", "hm</think>one"), say("user", "more"), say("assistant", "hm</think>two")]
    pair = pair_of(tokenizer, chat(chosen=side))
    assert spelled(tokenizer, pair)[1].startswith("one<|im_end|>")
    assert counted(tokenizer, pair) == "one<|im_end|>hm</think>two<|im_end|>"


def test_a_turn_whose_start_is_uncertain_is_not_scored() -> None:
    """With a turn before it that the template prints differently for every length of the conversation."""
    tokenizer = byte_level(template="{{ messages | length }}" + CHATML)
    side = [say("assistant", "one"), say("user", "more"), say("assistant", "two")]
    encoder = Encoder(tokenizer, options())
    assert isinstance(skipped := encoder.encode(chat(chosen=side)), Skipped)
    assert skipped.reason == SkipReason.EMPTY
    assert encoder.notices[REWRITTEN] == 2


def test_a_template_that_refuses_to_stop_in_the_middle_of_a_side() -> None:
    refuses = "{% if messages[-1]['content'] == 'look()' %}{{ raise_exception('no result') }}{% endif %}"
    tokenizer = byte_level(template=refuses + CHATML)
    side = [say("assistant", "look()"), say("tool", "seen"), say("assistant", "two")]
    encoder = Encoder(tokenizer, options())
    pair = encoder.encode(chat(chosen=side))
    assert isinstance(pair, EncodedPair)
    assert counted(tokenizer, pair) == "two<|im_end|>"
    assert encoder.notices == {REWRITTEN: 1}


def test_a_turn_whose_end_is_uncertain_is_not_scored() -> None:
    starred = "('*' if loop.last and message['role'] == 'assistant' else '') + message['content']"
    tokenizer = byte_level(template=NO_END.replace("message['content']", starred))
    side = [say("assistant", "one"), say("user", "more"), say("assistant", "two")]
    encoder = Encoder(tokenizer, options())
    pair = encoder.encode(chat(chosen=side))
    assert isinstance(pair, EncodedPair)
    assert counted(tokenizer, pair).strip() == "*two</s>"
    assert encoder.notices == {REWRITTEN: 1}


def test_turns_under_a_generation_prompt_that_is_no_prefix() -> None:
    tokenizer = byte_level(template=THINKING)
    side = [say("assistant", "one"), say("user", "more"), say("assistant", "two")]
    assert counted(tokenizer, pair_of(tokenizer, chat(chosen=side))) == "one<|im_end|>two<|im_end|>"


def test_a_slow_tokenizer() -> None:
    tokenizer = characters(CHATML)
    side = [say("assistant", "one"), say("tool", "seen"), say("assistant", "two")]
    pair = pair_of(tokenizer, chat(chosen=side))
    assert spelled(tokenizer, pair)[2] == "no<|im_end|>"
    assert counted(tokenizer, pair) == "one<|im_end|>two<|im_end|>"
    assert spelled(tokenizer, pair_of(tokenizer, text())) == ["Q:", " yes<|im_end|>", " no<|im_end|>"]


DATED = (
    "{%- macro today() -%}{{ strftime_now('%Y-%m-%d, %-d %B %H:%M') }}{%- endmacro -%}\n"
    "{{ date_string }}|{{ strftime_now('%d %b %Y') }}|{{ today() }}|" + CHATML
)


def test_the_date_is_fixed_and_nothing_leaks() -> None:
    tokenizer = byte_level(template=DATED)
    pair = pair_of(tokenizer, chat(), template_date=date(2024, 7, 6))
    expected = "06 Jul 2024|06 Jul 2024|2024-07-06, 6 July 00:00|<|im_start|>"
    assert spelled(tokenizer, pair)[0].startswith(expected)
    today = tokenizer.apply_chat_template([say("user", "x")], tokenize=False, date_string="x")
    assert date.today().strftime("|%d %b %Y|") in today
    assert tokenizer.chat_template == DATED


def test_a_row_may_say_things_to_the_template() -> None:
    tokenizer = byte_level(template="{{ mood }}{{ date_string }}{{ tools | length }}" + CHATML)
    row = chat(chat_template_kwargs={"mood": "kind", "date_string": "never"}, tools=[{"name": "look"}])
    assert spelled(tokenizer, pair_of(tokenizer, row))[0].startswith("kindnever1<|im_start|>")


def test_a_tokenizer_with_several_templates() -> None:
    tokenizer = byte_level(adds_bos=False, bos=True, template=None).__class__(
        tokenizer_object=byte_level().backend_tokenizer, eos_token="</s>", bos_token="<s>"
    )
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools!" + NO_END}
    assert spelled(tokenizer, pair_of(tokenizer, chat()))[1] == "yes<|im_end|>"
    with_tools = pair_of(tokenizer, chat(tools=[{"name": "look"}]))
    assert spelled(tokenizer, with_tools)[0].startswith("tools!")
    assert spelled(tokenizer, with_tools)[1] == " yes</s>"


def test_a_conversation_that_the_template_refuses() -> None:
    tokenizer = byte_level(template="{{ raise_exception('no system please.') }}")
    with pytest.raises(BadRowError, match=r"^rows.jsonl:4: messages: the chat template refuses.*: no system please\.$"):
        Encoder(tokenizer, options()).encode(chat())


def test_a_template_that_is_not_valid() -> None:
    with pytest.raises(UsageError, match=r"chat template of the tokenizer of --model is not valid \(line 1"):
        Encoder(byte_level(template="{% nonsense %}"), options()).encode(chat())


@pytest.mark.parametrize(
    "row",
    [
        text(chosen=""),
        text(rejected=""),
        chat(chosen=""),
        chat(rejected=[]),
        chat(chosen=[say("assistant", ""), say("user", "x")]),
    ],
)
def test_an_empty_side_is_skipped(row: Preference) -> None:
    assert skip_of(byte_level(template=CHATML), row) == SkipReason.EMPTY


def test_identical_sides_are_skipped() -> None:
    assert skip_of(byte_level(), text(chosen=" no")) == SkipReason.IDENTICAL
    assert skip_of(byte_level(template=CHATML), chat("x", "x")) == SkipReason.IDENTICAL


LONG = text("one two three four five six", " seven eight nine ten", " seven eight nine nine nine nine")


def test_keep_start_cuts_the_ends_of_the_sides() -> None:
    tokenizer = characters()
    pair = pair_of(tokenizer, text("12345", "abcdefgh", "xy"), max_length=9)
    assert spelled(tokenizer, pair) == ["12345", "abcd", "xy<|im_end|>"]
    assert pair.truncated
    exact = pair_of(tokenizer, text("12345", "abc", "xy"), max_length=9)
    assert spelled(tokenizer, exact)[1] == "abc<|im_end|>"
    assert not exact.truncated
    assert skip_of(tokenizer, text("12345", "abcdefgh", "abcx"), max_length=8) == SkipReason.IDENTICAL
    assert skip_of(tokenizer, text("12345", "a", "b"), max_length=5) == SkipReason.PROMPT_TOO_LONG


def test_keep_end_drops_from_the_left_of_the_prompt() -> None:
    tokenizer = characters()
    row = text("12345", "abc", "x")
    pair = pair_of(tokenizer, row, max_length=6, truncation="keep-end")
    assert spelled(tokenizer, pair) == ["45", "abc<|im_end|>", "x<|im_end|>"]
    assert pair_of(tokenizer, row, max_length=5, truncation="keep-end").prompt_ids.tolist() == [ord("5")]
    assert skip_of(tokenizer, row, max_length=4, truncation="keep-end") == SkipReason.TOO_LONG
    with_bos = byte_level(adds_bos=True)
    ids = pair_of(with_bos, LONG).prompt_ids.tolist()
    longest = len(ids) + len(pair_of(with_bos, LONG).rejected_ids)
    cut = pair_of(with_bos, LONG, max_length=longest - 2, truncation="keep-end").prompt_ids.tolist()
    assert cut == [ids[0], *ids[3:]]


def test_drop_drops() -> None:
    assert skip_of(characters(), text(), max_length=3, truncation="drop") == SkipReason.TOO_LONG


def test_a_side_whose_scored_turns_are_cut_away() -> None:
    tokenizer = byte_level(template=CHATML)
    side = [say("tool", "a long thing seen by nobody at all"), say("assistant", "yes")]
    whole = pair_of(tokenizer, chat(chosen=side, prompt=[say("user", "hi"), say("assistant", "look")]))
    limit = len(whole.prompt_ids) + 6
    row = chat(chosen=side, prompt=[say("user", "hi"), say("assistant", "look")])
    assert skip_of(tokenizer, row, max_length=limit) == SkipReason.TRUNCATED_AWAY


def test_masks_are_cut_with_their_sides() -> None:
    tokenizer = byte_level(template=CHATML)
    side = [say("assistant", "one"), say("user", "more"), say("assistant", "two")]
    whole = pair_of(tokenizer, chat(chosen=side))
    cut = pair_of(tokenizer, chat(chosen=side), max_length=len(whole.prompt_ids) + len(whole.chosen_ids) - 2)
    assert cut.chosen_mask is not None
    assert whole.chosen_mask is not None
    assert cut.chosen_mask.tolist() == whole.chosen_mask[:-2].tolist()
    only_first = pair_of(tokenizer, chat(chosen=side), max_length=len(whole.prompt_ids) + 2)
    assert only_first.chosen_mask is None


def test_pair_ids_tell_everything_apart() -> None:
    def name(*lists: Any) -> str:
        ids = [np.array(part, dtype=np.int32) for part in lists[:3]]
        return pair_id(*ids, *(None if mask is None else np.array(mask, dtype=np.bool_) for mask in lists[3:]))

    names = {
        name([1], [2], [3]),
        name([1, 2], [], [3]),
        name([1], [2, 3], []),
        name([], [1, 2], [3]),
        name([1], [3], [2]),
        name([1], [2], [3], [True]),
        name([1], [2], [3], [False]),
        name([1], [2], [3], None, [True]),
        name([1], [2], [3], [], []),
        name([256], [2], [3]),
    }
    assert len(names) == 10
    assert all(len(found) == 32 for found in names)
    assert name([1], [2], [3]) == name([1], [2], [3], None, None)
    assert name([1], [2], [3]) == "7a67a87964e1d51c8626639e42549f64"


def test_single_message_sides_take_three_renderings(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_level(template=CHATML)
    encoder = Encoder(tokenizer, options())
    encoder.encode(chat())  # the probe for the end of turns is behind us
    calls = []
    original = tokenizer.apply_chat_template
    monkeypatch.setattr(
        tokenizer, "apply_chat_template", lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    )
    encoder.encode(chat())
    assert len(calls) == 3


def test_the_library_does_not_warn_about_lengths(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        pair_of(byte_level(), text("a long prompt " * 20))
    assert not caplog.records


def rows_from(tmp_path: Path, lines: list[Any]) -> SourceRows:
    path = tmp_path / "prefs.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return open_rows(options(files=[str(path)]))


def test_encode_rows_gives_one_result_a_row_in_order(tmp_path: Path) -> None:
    good = {"prompt": "Q:", "chosen": " yes", "rejected": " no"}
    rows = rows_from(tmp_path, [{**good, "chosen": f" yes {index}"} for index in range(150)] + [{**good, "chosen": ""}])
    encoder = Encoder(byte_level(), options())
    results = list(encode_rows(rows, encoder, options(), 10, 151))
    assert [result.row for result in results] == list(range(10, 151))
    assert [isinstance(result, EncodedPair) for result in results] == [True] * 140 + [False]
    alone = next(iter(encode_rows(rows, encoder, options(), 77, 78)))
    assert isinstance(alone, EncodedPair)
    assert alone.pair_id == results[67].pair_id  # type: ignore[union-attr]


def test_bad_rows_stop_it_or_are_listed(tmp_path: Path) -> None:
    rows = rows_from(tmp_path, [{"prompt": "Q:", "chosen": " yes", "rejected": " no"}, "{broken", {"chosen": "x"}])
    encoder = Encoder(byte_level(), options())
    with pytest.raises(BadRowError, match=r"^prefs\.jsonl:2: column 2: not JSON"):
        list(encode_rows(rows, encoder, options(), 0, 3))
    skip = options(on_bad_row="skip")
    good, *bad = encode_rows(rows, Encoder(byte_level(), skip), skip, 0, 3)
    assert isinstance(good, EncodedPair)
    assert [result.reason for result in bad if isinstance(result, Skipped)] == [SkipReason.UNREADABLE] * 2
    assert [result.where for result in bad if isinstance(result, Skipped)] == ["prefs.jsonl:2", "prefs.jsonl:3"]
    assert isinstance(bad[1], Skipped)
    assert "rejected: missing" in bad[1].detail


def test_a_template_that_refuses_one_row_leaves_the_others(tmp_path: Path) -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no') }}{% endif %}" + CHATML
    row = {"prompt": "hi", "chosen": [say("assistant", "yes")], "rejected": [say("assistant", "no")]}
    rows = rows_from(tmp_path, [row, {**row, "system": "s"}, row])
    skip = options(on_bad_row="skip")
    results = list(encode_rows(rows, Encoder(byte_level(template=template), skip), skip, 0, 3))
    assert [isinstance(result, EncodedPair) for result in results] == [True, False, True]


def test_equal_prompts_have_one_hash_however_their_tokens_are_cut():
    """A merge over the boundary moves the end of the prompt's ids, by the answer: a split by prompt must not see it."""
    prompts = [("Once upon", " a time", " no time"), ("Once upon", "on", "off"), ("Once more", " a", " b")]
    pairs = [
        Preference(row=row, where="x", prompt=prompt, chosen=chosen, rejected=rejected)
        for row, (prompt, chosen, rejected) in enumerate(prompts)
    ]
    first, second, third = (prompt_hash(pair) for pair in pairs)
    assert first == second != third
    assert 0 <= first < 2**64
    as_messages = replace(pairs[0], prompt=[{"role": "user", "content": "Once upon"}])
    reordered = replace(pairs[0], prompt=[{"content": "Once upon", "role": "user"}])
    assert prompt_hash(as_messages) == prompt_hash(reordered) == first
    parts = replace(pairs[0], prompt=[{"role": "user", "content": [{"type": "text", "text": "Once upon"}]}])
    assert prompt_hash(parts) == first
    longer = [{"role": "user", "content": "Once upon"}, {"role": "assistant", "content": "a"}]
    assert prompt_hash(replace(pairs[0], prompt=longer)) != first
