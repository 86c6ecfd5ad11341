"""Changes between two runs of one command: what can change a value is named and refused, what cannot is ignored."""

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken
from torch import Tensor
from transformers import AutoTokenizer

from dpocli.cli import run_command_line
from dpocli.scoring.scorer import PairScorer
from tests.commands.broken_inputs import replace_json, replace_weights
from tests.commands.conftest import MODEL, TRAIN
from tests.support.caches import content_of, parts_of, write_rows

ROWS = [json.loads(line) for line in TRAIN.read_text().splitlines()[:11]]


@dataclass
class World:
    """A model, data, and the command line that makes a cache of them."""

    root: Path
    options: dict[str, object] = field(default_factory=dict)
    data: list[str] = field(default_factory=lambda: ["data/a.jsonl", "data/b.jsonl"])

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def out(self) -> Path:
        return self.root / "ref"

    def path(self, name: str) -> Path:
        return self.root / name

    def line(self) -> list[str]:
        given = {"model": self.model, "out": self.out, "rows-per-part": 5, "keep-columns": "fault"} | self.options
        flags = [f"--{name}={value}" for name, value in given.items()]
        return ["precompute", *flags, *(f"--data={self.path(name)}" for name in self.data), "--json"]

    def rewrite(self, name: str, change: Callable[[str], str]) -> None:
        """A text file, in place of a link to the original."""
        path = self.path(name)
        before = path.read_text()
        path.unlink()
        path.write_text(change(before))
        assert path.read_text() != before


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The world as it was when the cache was made."""
    world = World(tmp_path_factory.mktemp("world"))
    shutil.copytree(MODEL, world.model, copy_function=os.symlink)
    world.path("data").mkdir()
    write_rows(world.path("data/a.jsonl"), ROWS[:6])
    write_rows(world.path("data/b.jsonl"), ROWS[6:10])
    assert run_command_line(world.line()) == 0
    return world.root


@pytest.fixture
def world(made: Path, tmp_path: Path) -> World:
    shutil.copytree(made, tmp_path / "world", symlinks=True)
    return World(tmp_path / "world")


Mutation = Callable[[World], object]


def option(**values: object) -> Mutation:
    return lambda world: world.options.update({name.replace("_", "-"): value for name, value in values.items()})


def config(change: Callable[[dict[str, Any]], object]) -> Mutation:
    return lambda world: replace_json(world.model / "config.json", lambda value: change(value))


def tokenizer(change: Callable[[dict[str, Any]], object], file: str = "tokenizer.json") -> Mutation:
    return lambda world: replace_json(world.model / file, lambda value: change(value))


def rows(name: str, change: Callable[[list[str]], list[str]]) -> Mutation:
    return lambda world: world.rewrite(name, lambda text: "\n".join(change(text.splitlines())) + "\n")


def template(change: Callable[[str], str]) -> Mutation:
    return lambda world: world.rewrite("model/chat_template.jinja", change)


def one_weight(world: World) -> None:
    def change(weights: dict[str, Tensor]) -> None:
        weights["model.layers.2.mlp.down_proj.weight"][3, 5] += 1e-6

    replace_weights(world.model / "model.safetensors", change)


def weights_in_two_files(world: World) -> None:
    name = "model-00001-of-00001.safetensors"
    (world.model / "model.safetensors").rename(world.model / name)
    (world.model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))


def no_template(world: World) -> None:
    (world.model / "chat_template.jinja").unlink()


def files_in_another_order(world: World) -> None:
    world.data.reverse()


def a_file_more(world: World) -> None:
    world.data.append("data/c.jsonl")
    write_rows(world.path("data/c.jsonl"), ROWS[10:])


def resaved(world: World, change: Callable[[Any], object] = lambda _: None) -> None:
    """The tokenizer as transformers writes it."""
    loaded = AutoTokenizer.from_pretrained(world.model)
    change(loaded)
    for path in (*world.model.glob("tokenizer*"), world.model / "chat_template.jinja"):
        path.unlink()
    loaded.save_pretrained(world.model)


def swap_last_merges(value: dict[str, Any]) -> None:
    merges = value["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def swap_two_tokens(value: dict[str, Any]) -> None:
    vocabulary = value["model"]["vocab"]
    first, second = list(vocabulary)[400:402]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


DETECTED: Mapping[str, tuple[Mutation, str]] = {
    "one weight": (one_weight, "weights: model.safetensors differs"),
    "weights in files of other names": (
        weights_in_two_files,
        "weights: model.safetensors is missing; weights: model-00001-of-00001.safetensors is new",
    ),
    "rope": (
        config(lambda value: value["rope_parameters"].update(rope_theta=20000.0)),
        "config.json: rope_parameters: rope_theta: 10000.0 -> 20000.0",
    ),
    "epsilon of the norms": (
        config(lambda value: value.update(rms_norm_eps=1e-5)),
        "config.json: rms_norm_eps: 1e-06 -> 1e-05",
    ),
    "dtype": (option(dtype="bfloat16"), "dtype: float32 -> bfloat16"),
    "a line of the template": (
        template(lambda text: text.replace("'\\n' + message['content']", "' ' + message['content']")),
        "chat template: differs from line 2",
    ),
    "a blank line after the template": (
        template(lambda text: text + "\n\n"),
        "chat template: differs from line",
    ),
    "no template": (no_template, "chat template: one before, none now"),
    "an added token": (lambda world: resaved(world, lambda loaded: loaded.add_tokens(["<tool>"])), "tokenizer: ids: "),
    "a special token that strips": (
        lambda world: resaved(
            world, lambda loaded: loaded.add_tokens([AddedToken(loaded.eos_token, lstrip=True, special=True)])
        ),
        "tokenizer: added tokens differs",
    ),
    "two merges in another order": (tokenizer(swap_last_merges), "tokenizer: merges differs"),
    "two tokens exchanged": (tokenizer(swap_two_tokens), "tokenizer: vocabulary differs"),
    "end of text": (
        tokenizer(lambda value: value.update(eos_token="<|im_start|>"), "tokenizer_config.json"),
        "tokenizer: eos_token_id: 3 -> ",
    ),
    "a letter of a row": (
        rows("data/b.jsonl", lambda lines: [*lines[:-1], lines[-1].replace("the", "thy", 1)]),
        "data: b.jsonl differs (4 -> 4 rows)",
    ),
    "order of rows": (rows("data/a.jsonl", lambda lines: lines[::-1]), "data: a.jsonl differs (6 -> 6 rows)"),
    "a row more": (
        rows("data/b.jsonl", lambda lines: [*lines, json.dumps(ROWS[10])]),
        "data: b.jsonl differs (4 -> 5 rows)",
    ),
    "order of files": (files_in_another_order, "data: the same files in another order"),
    "a file more": (a_file_more, "data: 2 files (10 rows) -> 3 files (11 rows)"),
    "max_length, longer": (
        option(max_length=4096),
        "max_length: 2048 -> 4096 (0 of 10 pairs are affected by max_length)",
    ),
    "max_length, shorter": (
        option(max_length=16),
        "max_length: 2048 -> 16 (10 of 10 pairs are affected by max_length)",
    ),
    "truncation": (option(truncation="drop"), "truncation: keep-start -> drop"),
    "template_date": (option(template_date="2026-02-03"), "template_date: 2025-01-01 -> 2026-02-03"),
    "scored_turns": (option(scored_turns="all"), "scored_turns: assistant -> all"),
    "text_as": (option(text_as="messages"), "text_as: text -> messages"),
    "rows_per_part": (option(rows_per_part=4), "rows_per_part: 5 -> 4"),
    "limit": (option(limit=10), "limit: null -> 10"),
    "keep_columns": (option(keep_columns="fault,chosen"), 'keep_columns: ["fault"] -> ["fault", "chosen"]'),
    "a field's name": (option(chosen_field="rejected"), "chosen_field: chosen -> rejected"),
}


@pytest.mark.parametrize(("mutate", "words"), DETECTED.values(), ids=DETECTED)
def test_what_can_change_a_value_is_named(
    mutate: Mutation, words: str, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    before = parts_of(world.out)
    mutate(world)
    assert run_command_line(world.line()) == 4
    out, err = capsys.readouterr()
    assert out == ""
    assert f"The reference cache {world.out} was made with other settings than these; in rows-" in err
    assert words in err
    assert "error: " in err
    assert parts_of(world.out) == before


def renamed(world: World) -> None:
    """Hashes decide, and the order as given; not the names, whose order is now the other way round."""
    world.path("data/a.jsonl").rename(world.path("data/z.jsonl"))
    world.data[0] = "data/z.jsonl"


def by_directory(world: World) -> None:
    world.data = ["data"]


def copied(world: World) -> None:
    shutil.copytree(world.model, world.path("elsewhere"))
    world.options["model"] = world.path("elsewhere")


def touched(world: World) -> None:
    for path in world.path("data").iterdir():
        os.utime(path, (1e9, 1e9))


def files_beside(world: World) -> None:
    for name in ("README.md", "modeling_tiny.py", "optimizer.pt", "training_args.bin"):
        (world.model / name).write_text("something")


def generation(world: World) -> None:
    replace_json(world.model / "generation_config.json", lambda value: value.update(temperature=0.3, do_sample=True))


def written_anew(world: World) -> None:
    value = json.loads((world.model / "config.json").read_text())
    (world.model / "config.json").unlink()
    (world.model / "config.json").write_text(json.dumps(dict(reversed(value.items()))))


def reusing(world: World) -> None:
    shutil.copytree(world.out, world.path("old"))
    world.options["reuse"] = world.path("old")


IGNORED: Mapping[str, Mutation] = {
    "nothing": lambda world: None,
    "a renamed data file": renamed,
    "files named by their directory": by_directory,
    "times of files": touched,
    "a copied model": copied,
    "files beside the model": files_beside,
    "generation_config.json": generation,
    "layout of config.json": written_anew,
    "transformers_version": config(lambda value: value.update(transformers_version="4.44.0")),
    "dtype of the saved weights, cache": config(lambda value: value.update(dtype="bfloat16", use_cache=False)),
    "where the model came from": config(lambda value: value.update(_name_or_path="/home/somebody/model")),
    "a tokenizer saved again": resaved,
    "padding side": tokenizer(lambda value: value.update(padding_side="left"), "tokenizer_config.json"),
    "token_budget": option(token_budget=64),
    "scoring": option(scoring="padded"),
    "device": option(device="cpu"),
    "dtype as it was by default": option(dtype="float32"),
    "on_bad_row and max_skipped": option(on_bad_row="skip", max_skipped=1),
    "scratch": option(scratch="/nowhere"),
    "shard": option(shard="2/3"),
    "reuse": reusing,
}


@pytest.mark.parametrize("mutate", IGNORED.values(), ids=IGNORED)
def test_what_cannot_change_a_value_is_ignored(
    mutate: Mutation, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PairScorer, "__init__", lambda *_, **__: pytest.fail("something is scored"))
    before, content = parts_of(world.out), content_of(world.out)
    mutate(world)
    code = run_command_line(world.line())
    out, err = capsys.readouterr()
    assert code == 0, err
    assert "warning" not in err
    summary = json.loads(out)
    assert (summary["complete"], summary["pairs"], summary["reused"]) == (True, 10, 0)
    assert parts_of(world.out) == before
    assert content_of(world.out) == content


def test_a_remembered_hash_does_not_hide_a_changed_weight(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    """The file has the same name and size as the one whose hash is remembered."""
    weights = world.model / "model.safetensors"
    weights.unlink()
    shutil.copy2(MODEL / weights.name, weights)
    os.utime(weights, (1e9, 1e9))  # long enough ago to be remembered
    assert run_command_line(world.line()) == 0
    assert str(weights) in json.loads((world.out / ".hashes.json").read_text())
    size = weights.stat().st_size
    one_weight(world)
    assert weights.stat().st_size == size
    assert run_command_line(world.line()) == 4
    assert "weights: model.safetensors differs" in capsys.readouterr().err


def test_with_everything_as_it_was_the_cache_goes_on(
    world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = world.line()
    template(lambda text: text + "\n\n")(world)
    assert run_command_line(world.line()) == 4
    world.rewrite("model/chat_template.jinja", lambda text: text[:-2])
    monkeypatch.setattr(PairScorer, "__init__", lambda *_, **__: pytest.fail("something is scored"))
    assert run_command_line(line) == 0
    assert json.loads(capsys.readouterr().out)["complete"]
