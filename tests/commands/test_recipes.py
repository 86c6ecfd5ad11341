"""The recipes hold what was published, say where, and plan."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import given_keys, options_of, values_of
from dpocli.config.parsing import RECIPES, load_options
from tests.commands.conftest import MODEL, ROOT, Run

HUGGING_FACE: dict[str, Any] = {
    # transformers.TrainingArguments' own, which the configurations of Zephyr and SimPO leave alone
    "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8, "max_grad_norm": 1.0,
}  # fmt: skip
SIMPO = HUGGING_FACE | {
    "loss": "simpo", "optimizer": "adamw", "lr_schedule": "cosine", "warmup_ratio": 0.1, "batch_size": 2 * 16 * 4,
    "epochs": 1, "gradient_checkpointing": True,
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "dpo-anthropic-hh": {
        "loss": "dpo", "beta": 0.1, "optimizer": "rmsprop", "learning_rate": 5e-7, "lr_schedule": "constant",
        "warmup_steps": 150, "batch_size": 64, "epochs": 1, "max_grad_norm": 10.0, "weight_decay": 0.0,
    },
    "zephyr-7b-beta": HUGGING_FACE | {
        "loss": "dpo", "beta": 0.01, "optimizer": "adamw", "learning_rate": 5e-7, "lr_schedule": "cosine",
        "warmup_ratio": 0.1, "batch_size": 8 * 2 * 8, "epochs": 1, "gradient_checkpointing": True,
    },
    "tulu-3-8b": {
        "loss": "dpo_norm", "beta": 5.0, "optimizer": "adamw", "learning_rate": 5e-7, "lr_schedule": "linear",
        "warmup_ratio": 0.1, "weight_decay": 0.0, "batch_size": 1 * 16 * 8, "epochs": 1, "adam_beta1": 0.9,
        "adam_beta2": 0.999, "adam_epsilon": 1e-8, "gradient_checkpointing": True,
    },
    "simpo-llama-3-base": SIMPO | {"beta": 2.0, "gamma": 2.0 * 0.5, "learning_rate": 6e-7},
    "simpo-llama-3-instruct": SIMPO | {"beta": 2.5, "gamma": 2.5 * 0.55, "learning_rate": 1e-6},
}  # fmt: skip


def recipe(name: str) -> str:
    return f"recipes/{name}.yaml"


def test_there_are_no_others() -> None:
    assert {path.stem for path in RECIPES.iterdir()} == set(PUBLISHED)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_holds_what_was_published(name: str) -> None:
    given = {"config": recipe(name), "model": "m", "out": "o", "reference": "r"}
    options = load_options(TrainOptions, given)
    values = values_of(options)
    defaults = {option.key: option.info.default for option in options_of(TrainOptions)}
    for field, value in PUBLISHED[name].items():
        found = values[field]
        assert found == pytest.approx(value, rel=1e-12) if isinstance(value, float) else found == value, field
        if value != defaults[field]:
            assert field in given_keys(options), f"{field} stands only in our defaults"
    said = set(given_keys(options)) - {"model", "out", "reference"}
    assert said <= set(PUBLISHED[name]), "what was not published"
    assert {"loss", "beta", "optimizer", "learning_rate", "lr_schedule", "batch_size", "epochs"} <= said


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_value_has_its_source(name: str) -> None:
    text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
    head, values = text.split("\n\n")
    assert re.search(r"arXiv:\d{4}\.\d{5}", head)
    assert "github.com/" in head
    assert f"dpocli train --config {recipe(name)} " in head
    for line in values.splitlines():
        assert re.fullmatch(r"[a-z_0-9]+: \S+ +# \S.*| +# .*", line), line
        assert len(line) <= 120


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_recipe_plans(name: str, cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """From any directory; on 40 pairs every batch is smaller than the published one."""
    monkeypatch.chdir(tmp_path)
    line = (
        "train",
        "--config",
        recipe(name),
        "--model",
        MODEL,
        "--reference",
        cache,
        "--out",
        "run",
        "--scoring",
        "padded",
    )
    result = dpocli(*line, "--batch-size", 4, "--dry-run", "--json")
    assert result.code == 0, result.err
    plan, published = result.json, PUBLISHED[name]
    assert plan["loss"].startswith(f"{published['loss']}(beta={published['beta']:g},")
    assert (plan["steps"], plan["learning_rate"], plan["optimizer"]) == (
        10, published["learning_rate"], published["optimizer"]
    )  # fmt: skip
    assert plan["warmup_steps"] == published.get("warmup_steps", 1)
    assert not (tmp_path / "run").exists()
    if name == "dpo-anthropic-hh":
        assert "the learning rate never reaches its peak" in dpocli(*line, "--dry-run").out


def test_a_file_of_ones_own_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / recipe("tulu-3-8b")).write_text("beta: 7\n")
    given = {"model": "m", "out": "o", "reference": "r"}
    assert load_options(TrainOptions, given | {"config": recipe("tulu-3-8b")}).loss.beta == 7
    assert load_options(TrainOptions, given | {"config": recipe("zephyr-7b-beta")}).loss.beta == 0.01


def test_a_misspelled_recipe(tmp_path: Path, dpocli: Run) -> None:
    result = dpocli("train", "--config", "recipes/zephyr.yaml", "--out", tmp_path / "run")
    assert result.code == 2
    assert "recipes/zephyr-7b-beta.yaml" in result.err


def test_recipes_are_installed_and_listed() -> None:
    package = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    assert all(any(path.match(f"dpocli/{pattern}") for pattern in package["dpocli"]) for path in RECIPES.iterdir())
    page = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    assert all(f"`{recipe(name)}`" in page for name in PUBLISHED)
