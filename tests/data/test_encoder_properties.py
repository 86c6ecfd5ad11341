"""No completion token lost, none counted twice, one BOS, one EOS, nothing else: over tokenizers, templates and texts."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpocli.config.options import DataOptions
from dpocli.data.encoder import Encoder, encode_rows
from dpocli.data.preference import EncodedPair, Preference, Skipped, SkipReason
from dpocli.data.sources import open_rows
from tests.data.tokenizers_for_tests import CHATML, LAST_END_DIFFERS, Case, byte_level, chat_cases, metaspace

settings.register_profile("encode", derandomize=True, deadline=None, max_examples=50, database=None)
PROFILE = settings.get_profile("encode")
ROOT = Path(__file__).parents[2]

words = st.sampled_from(["yes", "no", "the answer", "assistant", "user:", "naïve", "日本", "🙂", "x", "0", "think"])
spaces = st.sampled_from(["", " ", "  ", "\n", "\n\n", ": ", ".", "\t"])
texts = st.lists(st.one_of(words, spaces), min_size=1, max_size=8).map("".join).filter(bool)
cases = pytest.mark.parametrize("case", chat_cases(), ids=lambda case: case.name)


def options(**values: Any) -> DataOptions:
    return DataOptions(max_length=10_000).model_copy(update=values)


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ids_of(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids)


def text_row(prompt: str, chosen: str, rejected: str) -> Preference:
    return Preference(0, "rows.jsonl:1", prompt, chosen, rejected)


def chat_row(prompt: list[Any], chosen: list[Any], rejected: list[Any]) -> Preference:
    return Preference(0, "rows.jsonl:1", prompt, chosen, rejected)


def sequences(pair: EncodedPair) -> list[list[int]]:
    return [[*pair.prompt_ids.tolist(), *side.tolist()] for side in (pair.chosen_ids, pair.rejected_ids)]


@pytest.mark.parametrize("tokenizer", [byte_level(), byte_level(adds_bos=True), metaspace(), metaspace(adds_bos=False)])
@PROFILE
@given(prompt=st.one_of(st.just(""), texts), chosen=texts, rejected=texts)
def test_text_rows_hold_the_joined_text_one_bos_and_one_eos(
    tokenizer: Any, prompt: str, chosen: str, rejected: str
) -> None:
    pair = Encoder(tokenizer, options()).encode(text_row(prompt, chosen, rejected))
    expected = [[*ids_of(tokenizer, prompt + side), tokenizer.eos_token_id] for side in (chosen, rejected)]
    if isinstance(pair, Skipped):
        assert pair.reason == SkipReason.IDENTICAL
        assert expected[0] == expected[1]
        return
    bos = tokenizer.bos_token_id
    always = tokenizer("a")["input_ids"][0] == bos
    alone = ids_of(tokenizer, prompt)
    shared = all(ids[:1] == alone[:1] for ids in expected) and bool(alone)
    starts = [bos] if always or not shared else []
    assert sequences(pair) == [starts + ids for ids in expected]
    assert len(pair.chosen_ids)
    assert len(pair.rejected_ids)


@cases
@PROFILE
@given(asked=texts, chosen=texts, rejected=texts, system=st.booleans())
def test_message_rows_hold_the_rendered_text_up_to_the_end_of_the_turn(
    case: Case, asked: str, chosen: str, rejected: str, system: bool
) -> None:
    prompt = [*([say("system", "be brief")] if system else []), say("user", asked)]
    pair = Encoder(case.tokenizer, options()).encode(
        chat_row(prompt, [say("assistant", chosen)], [say("assistant", rejected)])
    )
    rendered = [
        case.tokenizer.apply_chat_template([*prompt, say("assistant", side)], tokenize=False).removesuffix(case.rest)
        for side in (chosen, rejected)
    ]
    eos = case.tokenizer.eos_token_id
    expected = [ids_of(case.tokenizer, text) + ([] if case.end else [eos]) for text in rendered]
    if isinstance(pair, Skipped):
        assert pair.reason == SkipReason.IDENTICAL
        assert expected[0] == expected[1]
        return
    assert sequences(pair) == expected
    end = case.tokenizer.convert_tokens_to_ids(case.end) if case.end else eos
    for ids, side in zip(sequences(pair), (pair.chosen_ids, pair.rejected_ids), strict=True):
        assert side.tolist().count(end) == 1
        assert side[-1] == end
        assert ids.count(case.tokenizer.bos_token_id or -1) == case.begins_with_bos
    assert pair.chosen_mask is None
    assert pair.rejected_mask is None


@cases
@PROFILE
@given(asked=texts, chosen=texts, rejected=texts)
def test_the_prompt_is_the_longest_prefix_of_all_three(case: Case, asked: str, chosen: str, rejected: str) -> None:
    prompt = [say("user", asked)]
    pair = Encoder(case.tokenizer, options()).encode(
        chat_row(prompt, [say("assistant", chosen)], [say("assistant", rejected)])
    )
    if isinstance(pair, Skipped):
        return
    asking = case.tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
    three = [ids_of(case.tokenizer, asking), *sequences(pair)]
    length = len(pair.prompt_ids)
    assert all(ids[:length] == pair.prompt_ids.tolist() for ids in three)
    nexts = [ids[length : length + 1] for ids in three]
    assert nexts[0] == [] or nexts[0] != nexts[1] or nexts[0] != nexts[2]


@pytest.mark.parametrize("template", [CHATML, LAST_END_DIFFERS])
@PROFILE
@given(
    asked=texts,
    side=st.lists(st.tuples(st.sampled_from(["assistant", "user", "tool"]), texts), min_size=1, max_size=4),
    last=texts,
)
def test_counted_tokens_spell_what_the_assistant_wrote(
    template: str, asked: str, side: list[tuple[str, str]], last: str
) -> None:
    tokenizer = byte_level(template=template)
    chosen = [*(say(role, content) for role, content in side), say("assistant", last)]
    row = chat_row([say("user", asked)], chosen, [say("assistant", "another answer")])
    encoder = Encoder(tokenizer, options())
    pair = encoder.encode(row)
    if isinstance(pair, Skipped):
        assert pair.reason == SkipReason.IDENTICAL, pair
        return
    counted = pair.chosen_ids if pair.chosen_mask is None else pair.chosen_ids[pair.chosen_mask]
    ends = ["<|im_end|>" if template == CHATML else "<|end|>"] * (len(chosen) - 1) + ["<|im_end|>"]
    written = [m["content"] + end for m, end in zip(chosen, ends, strict=True) if m["role"] == "assistant"]
    assert tokenizer.decode(counted) == "".join(written)
    assert not encoder.notices
    everything = Encoder(tokenizer, options(scored_turns="all")).encode(row)
    assert isinstance(everything, EncodedPair)
    assert everything.chosen_mask is None
    assert np.array_equal(everything.chosen_ids, pair.chosen_ids)


@pytest.mark.parametrize("adds_bos", [True, False])
@PROFILE
@given(prompt=texts, chosen=texts, rejected=texts, max_length=st.integers(2, 24))
def test_truncation_cuts_where_it_should_and_nowhere_else(
    adds_bos: bool, prompt: str, chosen: str, rejected: str, max_length: int
) -> None:
    tokenizer = byte_level(adds_bos=adds_bos)
    row = text_row(prompt, chosen, rejected)
    whole = Encoder(tokenizer, options()).encode(row)
    if isinstance(whole, Skipped):
        return
    longest = max(map(len, sequences(whole)))
    for truncation in ("keep-start", "keep-end", "drop"):
        cut = Encoder(tokenizer, options(truncation=truncation, max_length=max_length)).encode(row)
        if longest <= max_length:
            assert isinstance(cut, EncodedPair)
            assert sequences(cut) == sequences(whole)
            assert not cut.truncated
        elif truncation == "drop":
            assert isinstance(cut, Skipped)
        elif isinstance(cut, EncodedPair):
            assert cut.truncated
            assert max(map(len, sequences(cut))) == max_length
            if truncation == "keep-start":
                _check_keep_start(whole, cut, tokenizer.eos_token_id)
            else:
                _check_keep_end(whole, cut, num_bos=int(whole.prompt_ids[0] == tokenizer.bos_token_id))


def _check_keep_start(whole: EncodedPair, cut: EncodedPair, eos: int) -> None:
    assert np.array_equal(cut.prompt_ids, whole.prompt_ids)
    for full, short in ((whole.chosen_ids, cut.chosen_ids), (whole.rejected_ids, cut.rejected_ids)):
        assert np.array_equal(full[: len(short)], short)
        assert (eos in short) == (len(short) == len(full))


def _check_keep_end(whole: EncodedPair, cut: EncodedPair, num_bos: int) -> None:
    assert np.array_equal(cut.chosen_ids, whole.chosen_ids)
    assert np.array_equal(cut.rejected_ids, whole.rejected_ids)
    own = cut.prompt_ids[num_bos:]
    assert np.array_equal(cut.prompt_ids[:num_bos], whole.prompt_ids[:num_bos])
    assert len(own)
    assert np.array_equal(whole.prompt_ids[len(whole.prompt_ids) - len(own) :], own)


DEMO = ROOT.parent / "shared" / "data" / "dpo_en_demo.json"


@pytest.mark.skipif(not DEMO.exists(), reason="../shared/data/dpo_en_demo.json is not there")
def test_the_demo_set_reads_and_gives_back_its_answers() -> None:
    chosen_options = options(files=[str(DEMO)], limit=100, max_length=100_000)
    rows = open_rows(chosen_options)
    tokenizer = byte_level(template=CHATML)
    results = list(encode_rows(rows, Encoder(tokenizer, chosen_options), chosen_options, 0, rows.num_rows))
    written = json.loads(DEMO.read_text(encoding="utf-8"))
    assert len(results) == rows.num_rows == 100
    for result, row in zip(results, written, strict=False):
        assert isinstance(result, EncodedPair)
        asked = [*row["conversations"], row["chosen"]]
        messages = [say({"human": "user", "gpt": "assistant"}.get(m["from"], m["from"]), m["value"]) for m in asked]
        rendered = tokenizer.apply_chat_template(messages, tokenize=False).removesuffix("\n")
        assert tokenizer.decode([*result.prompt_ids, *result.chosen_ids]) == rendered
        for side, ids in (("chosen", result.chosen_ids), ("rejected", result.rejected_ids)):
            assert tokenizer.decode(ids) == row[side]["value"] + "<|im_end|>"
