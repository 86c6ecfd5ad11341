import json
import shutil
from dataclasses import replace

import pytest
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizer, PreTrainedTokenizerFast

from dpocli.cache.fingerprint import (
    SETTINGS,
    Fingerprint,
    build_fingerprint,
    compare,
    compare_references,
    information_differences,
)
from dpocli.cache.reader import PairStore
from dpocli.config.commands import PrecomputeOptions
from dpocli.config.flags import build_options, options_of
from dpocli.data.row_file import ContentPart
from dpocli.errors import CacheError
from dpocli.model.identity import ModelFiles
from dpocli.model.tokenizer_identity import TokenizerIdentity, compare_tokenizer
from tests.cache.frozen_cache_v1.make_frozen_cache import fill, make_fingerprint

TEMPLATE = "{% for message in messages %}\n{{ message['content'] }}\n{% endfor %}"
NEVER_IN_THE_FINGERPRINT = {
    "out": "a place",
    "json": "form of the output",
    "device": "information",
    "scoring": "speed",
    "token_budget": "speed",
    "model": "stands there by content",
    "revision": "stands there by content",
    "adapter": "stands there by content",
    "quantization": "stands there as part of the reference",
    "trust_remote_code": "stands there by content (code)",
    "dtype": "stands there as resolved",
    "data": "stands there by content",
    "data_split": "decides the content",
    "on_bad_row": "whether it stops; a row that can be read becomes the same pair",
    "max_skipped": "whether it stops",
    "scratch": "a place",
    "shard": "who does it",
    "launcher": "who does it",
    "shards": "who does it",
    "reuse": "values of the same reference are the same values",
    "verify": "looks only",
    "dry_run": "looks only",
    "rows_per_part": "stands there by its own name",
}


def bpe(*, merges=(("h", "e"), ("l", "l"), ("he", "ll")), normalizer=None, add_prefix_space=False, bos=False, extra=()):
    letters = sorted(set("hello wrdĠab"))
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *letters, "he", "ll", "hell"])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges)))
    tokenizer.normalizer = normalizer
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.add_tokens(list(extra))
    fast.chat_template = TEMPLATE
    return fast


class SlowTokenizer(PreTrainedTokenizer):
    """One token a letter, in Python."""

    def __init__(self, letters="abcd", **kwargs):
        self.letters = letters
        super().__init__(**kwargs)

    @property
    def vocab_size(self):
        return len(self.letters)

    def get_vocab(self):
        return {letter: number for number, letter in enumerate(self.letters)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return self.letters.find(token)

    def _convert_id_to_token(self, index):
        return self.letters[index]


@pytest.fixture
def model_dir(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "model.safetensors").write_bytes(b"weights")
    config = {"model_type": "llama", "rope_parameters": {"rope_theta": 10000.0}, "dtype": "float32"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


CONTENT = (ContentPart("a.jsonl", "a" * 64, 60), ContentPart("b.jsonl", "b" * 64, 40))


def build(model_dir, tokenizer=None, content=CONTENT, dtype="float32", rows_per_part=10, trust=False, **options):
    return build_fingerprint(
        build_options(PrecomputeOptions, out="ref", model="m", data=["a.jsonl"], **options).data,
        tokenizer=tokenizer or bpe(),
        content=content,
        total_rows=100,
        rows_per_part=rows_per_part,
        model=model_dir and ModelFiles(model_dir, runs_code=trust),
        dtype=dtype,
        information={"device": "cpu"},
    )


def with_file(model_dir, tmp_path, name, content):
    copy = shutil.copytree(model_dir, tmp_path / "changed")
    (copy / name).write_text(content)
    return copy


def with_reference(fingerprint, **changed):
    return replace(fingerprint, reference=replace(fingerprint.reference, **changed))


def test_every_option_is_in_the_fingerprint_or_has_a_reason_not_to_be():
    assert {option.key for option in options_of(PrecomputeOptions)} == {*SETTINGS, *NEVER_IN_THE_FINGERPRINT}


def test_json_round_trip(model_dir):
    fingerprint = build(model_dir)
    back = Fingerprint.from_json(json.loads(json.dumps(fingerprint.to_json())))
    assert back == fingerprint
    assert (back.digest, back.reference_digest) == (fingerprint.digest, fingerprint.reference_digest)


CHANGES = [
    ({"max_length": 1024}, ["max_length: 2048 -> 1024"]),
    ({"truncation": "drop"}, ["truncation: keep-start -> drop"]),
    ({"limit": 50}, ["limit: null -> 50"]),
    ({"scored_turns": "all"}, ["scored_turns: assistant -> all"]),
    ({"template_date": "2026-01-01"}, ["template_date: 2025-01-01 -> 2026-01-01"]),
    ({"prompt_field": "question"}, ["prompt_field: prompt -> question"]),
    ({"keep_columns": ["id"]}, ['keep_columns: [] -> ["id"]']),
    ({"text_as": "messages"}, ["text_as: text -> messages"]),
    ({"dtype": "bfloat16"}, ["dtype: float32 -> bfloat16"]),
    ({"rows_per_part": 20}, ["rows_per_part: 10 -> 20"]),
    ({"content": CONTENT[::-1]}, ["data: the same files in another order"]),
    ({"content": CONTENT[:1]}, ["data: 2 files (100 rows) -> 1 files (60 rows)"]),
    ({"content": (CONTENT[0], ContentPart("b.jsonl", "c" * 64, 41))}, ["data: b.jsonl differs (40 -> 41 rows)"]),
    ({"tokenizer": bpe(bos=True)}, ["tokenizer: affixes: [[], []] -> [[0], []]"]),
    ({"tokenizer": bpe(extra=["new"])}, ["tokenizer: ids: 16 -> 17", "tokenizer: vocabulary differs", "tokenizer: added tokens differs"]),
]  # fmt: skip


@pytest.mark.parametrize(("change", "words"), CHANGES, ids=lambda value: str(value)[:40])
def test_what_can_change_a_value_is_named(model_dir, change, words):
    assert compare(build(model_dir), build(model_dir, **change)) == words


IRRELEVANT = [
    {"token_budget": 64},
    {"device": "cpu"},
    {"shard": "3/8"},
    {"reuse": ["old"]},
    {"scoring": "padded"},
    {"on_bad_row": "skip"},
    {"max_skipped": 0.9},
    {"scratch": "elsewhere"},
    {"content": tuple(replace(part, name=f"moved/{part.name}") for part in CONTENT)},
    {"trust": True},
]


@pytest.mark.parametrize("change", IRRELEVANT, ids=lambda value: str(value)[:40])
def test_what_cannot_change_a_value_never_invalidates(model_dir, change):
    before, after = build(model_dir), build(model_dir, **change)
    assert compare(before, after) == []
    assert before.digest == after.digest


def test_information_is_never_compared(model_dir):
    before = build(model_dir)
    after = replace(before, information={"device": "cuda"})
    assert compare(before, after) == []
    assert information_differences(before, after.information) == ["device: cpu -> cuda"]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.safetensors", "Weights", ["weights: model.safetensors differs"]),
        (
            "config.json",
            '{"model_type": "llama", "rope_parameters": {"rope_theta": 500000.0}}',
            ["config.json: rope_parameters: rope_theta: 10000.0 -> 500000.0"],
        ),
        ("config.json", '{"rope_parameters": {"rope_theta": 1e4}, "dtype": "bfloat16", "model_type": "llama"}', []),
        ("README.md", "text", []),
    ],
)
def test_changes_of_the_model(model_dir, tmp_path, name, content, words):
    before, after = build(model_dir), build(with_file(model_dir, tmp_path, name, content))
    assert compare(before, after) == compare_references(before, after) == words
    assert (before.reference_digest == after.reference_digest) == (not words)


def test_weights_files_that_come_and_go(model_dir):
    before = build(model_dir)
    after = with_reference(before, weights={"model-1.safetensors": "0" * 64})
    assert compare(before, after) == ["weights: model-1.safetensors is new", "weights: model.safetensors is gone"]


def test_remote_code_counts_where_it_is_run(model_dir, tmp_path):
    changed = with_file(model_dir, tmp_path, "modeling.py", "pass")
    assert compare(build(model_dir), build(changed)) == []
    assert compare(build(model_dir, trust=True), build(changed, trust=True)) == ["code: modeling.py is new"]


def test_a_store_without_a_reference(model_dir):
    unscored = build(None)
    assert (unscored.reference, unscored.dtype) == (None, None)
    assert "reference: none -> a model" in compare(unscored, build(model_dir))
    assert not unscored.is_scored


def test_whether_a_policy_is_the_reference(model_dir, tmp_path):
    reference = ModelFiles(model_dir).identity()
    assert ModelFiles(shutil.copytree(model_dir, tmp_path / "copy")).identity().has_weights_of(reference)
    assert ModelFiles(with_file(model_dir, tmp_path, "config.json", "{}")).identity().has_weights_of(reference)
    other = with_file(tmp_path / "copy", tmp_path / "another", "model.safetensors", "other")
    assert not ModelFiles(other).identity().has_weights_of(reference)
    assert not ModelFiles(model_dir, quantization="nf4").identity().has_weights_of(reference)


def identity_of_saved(tokenizer, directory):
    tokenizer.save_pretrained(directory)
    return TokenizerIdentity.of(AutoTokenizer.from_pretrained(directory))


def test_a_tokenizer_saved_again_is_the_same(tmp_path):
    before = bpe(extra=[AddedToken("<x>", special=True)], bos=True)
    saved = identity_of_saved(before, tmp_path / "1")
    assert saved == TokenizerIdentity.of(before)
    path = tmp_path / "1" / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = [" ".join(merge) for merge in content["model"]["merges"]]
    content["model"]["vocab"] = dict(reversed(content["model"]["vocab"].items()))
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert identity_of_saved(AutoTokenizer.from_pretrained(tmp_path / "1"), tmp_path / "2") == saved


def test_use_leaves_no_trace():
    tokenizer = bpe()
    before = TokenizerIdentity.of(tokenizer)
    tokenizer(["hello", "he"], padding=False, truncation=True, max_length=2)
    assert TokenizerIdentity.of(tokenizer) == before


@pytest.mark.parametrize("extra", [["<pad>"], [AddedToken("<tool>", special=True), "more"]])
def test_further_ids_are_fine(extra):
    assert compare_tokenizer(TokenizerIdentity.of(bpe()), bpe(extra=extra)) == ([], [])


DIFFERENT_TOKENIZERS = [
    (bpe(merges=(("h", "e"), ("l", "l"))), "merges differs"),
    (bpe(merges=(("l", "l"), ("h", "e"), ("he", "ll"))), "merges differs"),
    (bpe(normalizer=normalizers.Lowercase()), "normalizer differs"),
    (bpe(add_prefix_space=True), "pre-tokenizer differs"),
    (SlowTokenizer(), "ids: 16 -> 4"),
]


@pytest.mark.parametrize(("tokenizer", "words"), DIFFERENT_TOKENIZERS, ids=lambda value: str(value)[:20])
def test_tokenizers_that_mean_something_else(tokenizer, words):
    forbidden, _ = compare_tokenizer(TokenizerIdentity.of(bpe()), tokenizer)
    assert forbidden == [f"tokenizer: {words}"]


def test_a_token_that_changed_its_meaning():
    stored = TokenizerIdentity.of(bpe(extra=["<a>"]))
    assert compare_tokenizer(stored, bpe(extra=["<b>"]))[0] == [
        "tokenizer: vocabulary differs",
        "tokenizer: added tokens differs",
    ]
    stripping = bpe(extra=[AddedToken("<a>", lstrip=True)])
    assert compare_tokenizer(stored, stripping)[0] == ["tokenizer: added tokens differs"]


def test_representations_without_meaning():
    one, other = bpe(normalizer=normalizers.NFC()), bpe(normalizer=normalizers.Sequence([normalizers.NFC()]))
    assert TokenizerIdentity.of(one) == TokenizerIdentity.of(other)


def test_scores_of_a_unigram_model():
    def unigram(score):
        tokenizer = Tokenizer(models.Unigram([("<unk>", 0.0), ("a", -1.0), ("b", score)], unk_id=0))
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer)

    stored = TokenizerIdentity.of(unigram(-2.0))
    assert compare_tokenizer(stored, unigram(-2.0)) == ([], [])
    assert compare_tokenizer(stored, unigram(-3.0))[0] == ["tokenizer: model differs"]


def test_tokenizers_in_python():
    stored = TokenizerIdentity.of(SlowTokenizer())
    assert compare_tokenizer(stored, SlowTokenizer()) == ([], [])
    assert compare_tokenizer(stored, SlowTokenizer("abcde")) == ([], [])
    assert compare_tokenizer(stored, SlowTokenizer("abdc"))[0] == ["tokenizer: vocabulary differs"]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (TEMPLATE.replace("content", "text"), "chat template: differs from line 2"),
        (TEMPLATE + "\nmore", "chat template: differs from line 4"),
        (None, "chat template: one before, none now"),
        ({"default": TEMPLATE, "tools": "x"}, "chat template tools: none before, one now"),
    ],
)
def test_the_chat_template(model_dir, template, words):
    tokenizer = bpe()
    tokenizer.chat_template = template
    assert compare_tokenizer(TokenizerIdentity.of(bpe()), tokenizer) == ([], [words])
    assert compare(build(model_dir), build(model_dir, tokenizer=tokenizer)) == [words]


def test_a_store_checks_the_tokenizer_of_the_policy(tmp_path):
    fill(tmp_path)
    store = PairStore.open(tmp_path)
    with pytest.raises(CacheError, match=r"made with another tokenizer than the model's: tokenizer: ids: 100 -> 16"):
        store.check_tokenizer(bpe())
    store.fingerprint = replace(make_fingerprint(), tokenizer=TokenizerIdentity.of(bpe()))
    other = bpe(extra=["<pad>"])
    other.chat_template = None
    assert store.check_tokenizer(other) == ["chat template: one before, none now"]


def test_a_configuration_is_the_same_by_value(model_dir, tmp_path):
    """Continuing, reusing and reading must not disagree about spellings."""
    spelled = {"model_type": "llama", "rope_parameters": {"rope_theta": 10000}, "attention_dropout": None}
    before, after = build(model_dir), build(with_file(model_dir, tmp_path, "config.json", json.dumps(spelled)))
    assert compare(before, after) == compare_references(before, after) == []
    assert (before.digest, before.reference_digest) == (after.digest, after.reference_digest)
