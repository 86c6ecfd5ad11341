"""Everything that can be wrong with what a user gives, made once: data files, model directories, caches, YAML files.

A command line of a case is written as it would stand in a shell script; `{name}` in it is a path in `World`.
"""

import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from dpocli.cli import run_command_line
from dpocli.errors import ExitCode
from tests.commands.conftest import HELD_OUT, MODEL, TRAIN, quiet

ROW = {"prompt": "What is a good soup?", "chosen": "Leek soup.", "rejected": "No soup at all."}
MESSAGES = {
    "prompt": [{"role": "user", "content": "What is a good soup?"}],
    "chosen": [{"role": "assistant", "content": "Leek soup."}],
    "rejected": [{"role": "assistant", "content": "No soup at all."}],
}
NO_PAIR = (
    "precompute --data {all_skipped} --text-as messages --out {no_pair} --model {model} --rows-per-part 1 --max-skipped 1 "
    "--shard 1/2"
)
SKIPPED = ROW | {"rejected": ROW["chosen"]}
"""Identical sides."""


@dataclass
class World:
    """A directory of broken things."""

    directory: Path
    cache: Path
    held_out_cache: Path
    paths: dict[str, Path] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paths |= {"model": MODEL, "train": TRAIN, "heldout": HELD_OUT, "world": self.directory}
        self.paths |= {"ref": self.cache, "ref_heldout": self.held_out_cache}
        _make_data(self)
        _make_models(self)
        _make_configs(self)

    def arguments(self, line: str, **more: Path) -> list[str]:
        """The arguments of a command line with `{name}` for paths."""
        return [word.format(**self.paths, **more) for word in shlex.split(line)]

    def everything(self) -> dict[Path, int]:
        """Every file, link and directory, with the time when it was last changed."""
        roots = (self.directory, self.cache, self.held_out_cache, MODEL.parent)
        return {path: path.lstat().st_mtime_ns for root in roots for path in [root, *sorted(root.rglob("*"))]}

    def data(self, name: str, *lines: object) -> None:
        """A data file; what is not bytes is written as JSON."""
        path = self.directory / name.replace("__", ".")
        encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
        path.write_bytes(b"".join(line + b"\n" for line in encoded))
        self.paths[name.partition("__")[0]] = path

    @contextmanager
    def model(self, name: str, *, without: tuple[str, ...] = ()) -> Iterator[Path]:
        """A copy of the tiny model to break; files are links to the originals until they are replaced."""
        self.paths[name] = path = self.directory / name
        shutil.copytree(MODEL, path, ignore=shutil.ignore_patterns(*without), copy_function=os.symlink)
        yield path


def replace_json(path: Path, change: Callable[[dict], None]) -> None:
    """Rewrite a JSON file, in place of a link to the original."""
    value = json.loads(path.read_bytes())
    change(value)
    path.unlink()
    path.write_text(json.dumps(value))


def replace_weights(path: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    """Rewrite `model.safetensors`, in place of a link to the original."""
    weights = load_file(path)
    change(weights)
    path.unlink()
    save_file(weights, path, metadata={"format": "pt"})


def _make_data(world: World) -> None:
    world.data("empty__jsonl")
    world.data("blank__jsonl", b"", b"   ")
    world.data("rows__jsonl", *[ROW | {"rejected": f"{number} bad soups."} for number in range(6)])
    world.data("messages__jsonl", *[MESSAGES] * 3)
    world.data("not_json__jsonl", ROW, b'{"prompt": "What is')
    world.data("not_an_object__jsonl", ROW, [ROW])
    world.data("not_utf8__jsonl", ROW, json.dumps(ROW).encode().replace(b"Leek", b"Cr\xe8me"))
    world.data("no_field__jsonl", ROW, {"prompt": "a", "chosen": "b", "reject": "c"})
    world.data("null_field__jsonl", ROW, ROW | {"chosen": None})
    world.data("wrong_type__jsonl", ROW, ROW | {"chosen": 7})
    world.data("wrong_content__jsonl", ROW, MESSAGES | {"chosen": [{"role": "assistant", "content": 7}]})
    world.data("wrong_weight__jsonl", ROW, ROW | {"weight": -1})
    world.data("half_skipped__jsonl", ROW, ROW, SKIPPED, SKIPPED, SKIPPED)
    world.data("all_skipped__jsonl", SKIPPED, SKIPPED)
    world.data("no_weight__jsonl", *[ROW | {"weight": 0}] * 4)
    world.data("one_pair__jsonl", ROW)
    world.data("not_gzip__jsonl__gz", ROW)
    world.data("prefs__csv", b"prompt,chosen,rejected")
    world.data("not_parquet__parquet", ROW)
    world.paths["odd name"] = world.directory / "it's an ödd näme.jsonl"
    shutil.copy(world.paths["rows"], world.paths["odd name"])
    world.paths["no_rows"] = world.directory / "no rows in here"
    world.paths["no_rows"].mkdir()
    world.paths["dangling"] = world.directory / "dangling"
    world.paths["dangling"].symlink_to(world.directory / "nowhere")


def _make_models(world: World) -> None:
    with world.model("no_weights", without=("*.safetensors",)):
        pass
    with world.model("pickled", without=("*.safetensors",)) as path:
        (path / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with world.model("no_config", without=("config.json",)):
        pass
    with world.model("broken_config") as path:
        (path / "config.json").unlink()
        (path / "config.json").write_text('{"model_type": "llama",')
    with world.model("unknown_architecture") as path:
        replace_json(path / "config.json", lambda config: config.update(model_type="flux-capacitor"))
    with world.model("other_shape") as path:
        replace_json(path / "config.json", lambda config: config.update(intermediate_size=64))
    with world.model("more_layers") as path:
        replace_json(path / "config.json", lambda config: config.update(num_hidden_layers=5))
    with world.model("truncated") as path:
        content = (path / "model.safetensors").read_bytes()
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").write_bytes(content[: len(content) // 2])
    with world.model("empty_weights") as path:
        (path / "model.safetensors").unlink()
        (path / "model.safetensors").write_bytes(b"")
    with world.model("no_template", without=("chat_template.jinja",)):
        pass
    with world.model("no_tokenizer", without=("tokenizer*", "chat_template.jinja")):
        pass
    with world.model("broken_tokenizer") as path:
        (path / "tokenizer.json").unlink()
        (path / "tokenizer.json").write_text("{}")
    with world.model("other_tokenizer") as path:
        replace_json(path / "tokenizer.json", swap_two_tokens)
    with world.model("fewer_embeddings") as path:
        replace_json(path / "config.json", lambda config: config.update(vocab_size=200))
        replace_weights(
            path / "model.safetensors",
            lambda weights: weights.update(
                {name: tensor[:200].clone() for name, tensor in weights.items() if "embed" in name or "lm_head" in name}
            ),
        )
    with world.model("few_positions", without=("model.safetensors", "*config.json")) as path:
        shutil.copy(MODEL / "tokenizer_config.json", path)
        config = GPT2Config(vocab_size=1536, n_positions=16, n_embd=8, n_layer=1, n_head=1, eos_token_id=3)
        GPT2LMHeadModel(config).save_pretrained(path)
    with world.model("nan") as path:
        replace_weights(path / "model.safetensors", lambda weights: weights[_a_norm(weights)].fill_(float("nan")))
    with world.model("other_weights") as path:
        replace_weights(path / "model.safetensors", lambda weights: weights[_a_norm(weights)].mul_(1.5))


def swap_two_tokens(tokenizer: dict) -> None:
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def _a_norm(weights: dict[str, Tensor]) -> str:
    return next(name for name in weights if name.endswith("input_layernorm.weight"))


def _make_configs(world: World) -> None:
    configs = {
        "unknown_key": "model: m\nbatch_sise: 8\n",
        "foreign_key": "model: m\nper_device_train_batch_size: 8\n",
        "twice": "beta: 0.1\nmodel: m\nbeta: 0.2\n",
        "wrong_value": "model: m\nbeta: much\n",
        "no_options": "- model\n",
        "not_yaml": "model: [m\n",
    }
    for name, text in configs.items():
        world.paths[name] = world.directory / f"{name}.yaml"
        world.paths[name].write_text(text)


def make_caches(world: World) -> None:
    """Caches that are not what they should be, and other directories that somebody may take for an `--out`."""

    def precompute(name: str, line: str) -> None:
        world.paths[name] = world.directory / name
        quiet(*world.arguments(f"precompute --data {line} --text-as messages --out {{{name}}}"))

    for name in ("incomplete", "damaged", "bare_cache"):
        world.paths[name] = world.directory / name
        shutil.copytree(world.cache, world.paths[name], ignore=shutil.ignore_patterns("*.yaml", "*.json"))
    min(world.paths["incomplete"].glob("rows-*")).unlink()
    flip_a_byte(sorted(world.paths["damaged"].glob("rows-*"))[1])
    precompute("other_reference", "{heldout} --limit 4 --model {other_weights}")
    precompute("no_pair", "{all_skipped} --model {model} --rows-per-part 1 --max-skipped 1 --shard 0/2")
    # The other worker says that there is no pair, but the cache is complete.
    assert run_command_line([str(word) for word in world.arguments(NO_PAIR)]) == ExitCode.DATA
    precompute("weightless", "{no_weight} --model {model}")
    precompute("one_pair_cache", "{one_pair} --model {model}")
    world.paths["run"] = world.directory / "run"
    quiet(*world.arguments("train --model {model} --reference {one_pair_cache} --out {run} --max-steps 2"))
    world.paths["unscored_run"] = world.directory / "unscored-run"
    quiet(*world.arguments("train --model {model} --data {one_pair} --loss simpo --out {unscored_run} --max-steps 1"))
    provenance = world.paths["unscored_run"] / "model" / "dpocli.json"
    replace_json(provenance, lambda value: value["loss"]["hyperparameters"].update(margin_of_tomorrow=1.0))
    world.paths["project"] = world.directory / "project"
    shutil.copytree(MODEL, world.paths["project"] / "model", copy_function=os.symlink)


def flip_a_byte(path: Path) -> None:
    """Damage the middle of a file as a bad disk would."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
