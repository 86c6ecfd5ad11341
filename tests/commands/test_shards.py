"""One copy of a model over several processes gives what one process gives, in all three commands."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpocli.model import sharded
from dpocli.model.identity import ModelFiles
from tests.caches import assert_same_values, pairs_in
from tests.commands.conftest import HELD_OUT, MODEL, TRAIN, Run, metrics_of, quiet
from tests.commands.ranks import ended, on_processes, srun
from tests.tiny_models import build

LINE = ("--batch-size", 8, "--learning-rate", "1e-3", "--eval-fraction", 0.2, "--eval-every", 2)
SHARDED = [
    pytest.param(2, ("--shards", 2), marks=pytest.mark.slow),  # so begins the test of a checkpoint, too
    (4, ("--shards", 2, "--gradient-checkpointing", "--token-budget", 300)),
    pytest.param(4, ("--shards", 4, "--cpu-offload"), marks=pytest.mark.slow),
    (1, ("--cpu-offload",)),
]


@pytest.fixture(scope="module")
def alone(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process makes of six steps."""
    out = tmp_path_factory.mktemp("alone") / "run"
    quiet("train", "--model", MODEL, "--reference", cache, *LINE, "--max-steps", 6, "--save-every", 3, "--out", out)
    return out


def assert_same_run(run: Path, other: Path) -> None:
    """Equal to float32 rounding. While the policy is the reference, only rounding tells a tie from an order."""
    rows, other_rows = metrics_of(run), metrics_of(other)
    assert [row.keys() for row in rows] == [row.keys() for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        names = [name for name in row if row["step"] > 1 or not name.endswith(("accuracies", "ties"))]
        mine, theirs = ([values[name] for name in names] for values in (row, other_row))
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=5e-5)
    weights, other_weights = (load_file(out / "model" / "model.safetensors") for out in (run, other))
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(other_weights[name], weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("count", "how"), SHARDED, ids=lambda value: str(value))
def test_training_means_the_same(alone: Path, cache: Path, tmp_path: Path, count: int, how: tuple[object, ...]) -> None:
    line = ("train", "--model", MODEL, "--reference", cache, *LINE, "--max-steps", 6, "--out", tmp_path / "run", *how)
    on_processes(count, *line)
    assert_same_run(alone, tmp_path / "run")


def test_a_checkpoint_goes_on_with_other_shards(alone: Path, cache: Path, tmp_path: Path) -> None:
    """Saved by 2 processes, gone on with by 4 and then by 1, each time as if the one before had been killed."""
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, *LINE, "--max-steps", 6, "--out", out, "--save-every", 2)
    for count, shards, done in ((2, 2, 2), (4, 4, 4), (1, 1, 6)):
        on_processes(count, *line, "--shards", shards)
        if done < 6:
            undo_after(out, done)
    assert_same_run(alone, out)
    assert {path.suffix for path in (out / "checkpoints" / "step-6").iterdir()} == {".safetensors", ".json"}


def undo_after(out: Path, step: int) -> None:
    """As if the run had been killed after the checkpoint of `step`."""
    for path in (out / "checkpoints").iterdir():
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    shutil.rmtree(out / "model")
    (out / "summary.json").unlink()


def test_precompute_and_evaluate(dpocli: Run, alone: Path, tmp_path: Path) -> None:
    """Two teams of two processes fill a cache; each team has one copy of the model."""
    line = ("precompute", "--model", MODEL, "--data", HELD_OUT, "--limit", 24, "--rows-per-part", 5, "--out")
    quiet(*line, tmp_path / "alone")
    on_processes(4, *line, tmp_path / "teams", "--shards", 2, "--token-budget", 300)
    assert_same_values(pairs_in(tmp_path / "alone"), pairs_in(tmp_path / "teams"))
    assert json.loads((tmp_path / "teams" / "status.json").read_text())["state"] == "done"
    on_processes(2, *line, tmp_path / "alone", "--shards", 2, "--verify", 8)

    line = ("evaluate", "--model", alone / "model", "--reference", tmp_path / "alone", "--out")
    here = dpocli(*line, tmp_path / "here", "--json").json
    on_processes(2, *line, tmp_path / "there", "--shards", 2)
    there = json.loads((tmp_path / "there" / "metrics.json").read_text())
    for name in ("pairs", "rewards/accuracies", "rewards/margins", "loss"):
        assert there[name] == pytest.approx(here[name], rel=1e-4)


def saved(model: PreTrainedModel, directory: Path) -> Path:
    """A directory of a model with a vocabulary of the sample's size, and the sample's tokenizer."""
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(directory)
    return directory


@pytest.mark.parametrize("tied", [pytest.param(True, marks=pytest.mark.slow), False])
def test_the_weights_are_read_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool) -> None:
    """No process ever has them all: nothing is loaded whole, and the forward pass is that of a plain load."""
    model = AutoModelForCausalLM.from_pretrained(MODEL)
    model.config.tie_word_embeddings = tied
    if not tied:
        model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight) * 0.02)
    directory = saved(model, tmp_path / "model")
    blank = sharded.blank_model(ModelFiles(directory), torch.bfloat16)
    assert blank is not None
    assert all(parameter.is_meta and parameter.dtype == torch.bfloat16 for parameter in blank.parameters())
    assert (blank.lm_head.weight is blank.model.embed_tokens.weight) == tied

    line = ("precompute", "--model", directory, "--data", TRAIN, "--limit", 8, "--out")
    quiet(*line, tmp_path / "whole")
    on_processes(2, *line, tmp_path / "pieces", "--shards", 2)
    assert_same_values(pairs_in(tmp_path / "whole"), pairs_in(tmp_path / "pieces"))
    reference = tmp_path / "whole"
    run = ("train", "--model", directory, "--reference", reference, "--batch-size", 4, "--learning-rate", "1e-3")
    run = (*run, "--max-steps", 2, "--out")
    quiet(*run, tmp_path / "one")
    on_processes(2, *run, tmp_path / "two", "--shards", 2)
    assert_same_run(tmp_path / "one", tmp_path / "two")
    AutoModelForCausalLM.from_pretrained(tmp_path / "two" / "model")


def test_models_that_are_saved_under_other_names_are_loaded_whole(tmp_path: Path) -> None:
    build("qwen3-moe").save_pretrained(tmp_path)
    assert sharded.blank_model(ModelFiles(tmp_path), torch.float32) is None


def test_an_adapter_over_shards(cache: Path, tmp_path: Path) -> None:
    line = ("train", "--model", MODEL, "--reference", cache, "--lora-rank", 2, *LINE, "--max-steps", 3, "--out")
    quiet(*line, tmp_path / "one")
    on_processes(2, *line, tmp_path / "two", "--shards", 2)
    rows, others = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert len(rows) == len(others) > 3
    for row, other in zip(rows[1:], others[1:], strict=True):
        assert other["loss"] == pytest.approx(row["loss"], rel=1e-4)


def test_tasks_of_srun_find_each_other(alone: Path, cache: Path, tmp_path: Path) -> None:
    line = ("train", "--model", MODEL, "--reference", cache, *LINE, "--max-steps", 6, "--out", tmp_path / "run")
    on_processes(2, *line, "--launcher", "slurm", launcher=srun)
    assert_same_run(alone, tmp_path / "run")


@pytest.mark.parametrize(
    ("count", "how", "words"),
    [
        (1, ("--shards", 2), "cannot be cut into groups of 2"),
        (2, ("--shards", 2, "--quantization", "int8", "--lora-rank", 2), "cannot be spread over processes"),
    ],
)
def test_what_cannot_be_spread(cache: Path, tmp_path: Path, count: int, how: tuple[object, ...], words: str) -> None:
    codes, said = ended(count, "train", "--model", MODEL, "--reference", cache, "--out", tmp_path / "run", *how)
    assert codes == [2] * count
    assert words in " ".join(said.split())
