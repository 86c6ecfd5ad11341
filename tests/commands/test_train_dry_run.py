"""`train --dry-run`: the plan of the real run, its exit codes, and nothing written."""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

from tests.commands.conftest import MODEL, TRAIN, Run, metrics_of

SETTINGS = ("--learning-rate", "5e-4", "--batch-size", "8", "--max-steps", "3", "--token-budget", "300")


def everything(directory: Path) -> dict[str, tuple[int, int]]:
    """Sizes and times of all files."""
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns)
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where temporary directories are made, to see that none is left."""
    directory = tmp_path / "temporary"
    directory.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(directory))
    return directory


def test_the_plan_is_that_of_the_real_run(cache: Path, tmp_path: Path, temporary: Path, dpocli: Run) -> None:
    line = ("train", "--model", MODEL, "--reference", cache, "--out", tmp_path / "run", *SETTINGS)
    before = everything(cache)
    planned = dpocli(*line, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    assert not (tmp_path / "run").exists()
    assert everything(cache) == before
    assert not list(temporary.iterdir())
    plan: dict[str, Any] = planned.json
    assert (plan["pairs"], plan["steps"], plan["batch_size"], plan["loss"]) == (
        40, 3, 8, "dpo(beta=0.1, label_smoothing=0)"
    )  # fmt: skip
    assert (plan["optimizer"], plan["learning_rate"], plan["warmup_steps"]) == ("adamw", 5e-4, 1)
    assert plan["token_budget"] == 300
    assert plan["passes_per_step"] > 1
    weights = (MODEL / "model.safetensors").stat().st_size
    assert plan["bytes"] > 16 * plan["parameters"] > weights / 2

    real = dpocli(*line)
    assert real.code == 0, real.err
    assert len(metrics_of(tmp_path / "run")) == plan["steps"]
    assert f"{plan['parameters']:,} trainable" in real.err
    assert f"{plan['passes_per_step']:.1f} a step" in real.err
    shown = dpocli(*line[:-2], "--token-budget", 299, "--out", tmp_path / "other", "--dry-run").out
    assert re.search(r"micro-batches +\S+ a step and process, of at most 299 tokens", shown)


def test_rows_are_encoded_beside_everything(tmp_path: Path, temporary: Path, dpocli: Run) -> None:
    result = dpocli(
        "train", "--model", MODEL, "--data", TRAIN, "--limit", 20, "--out", tmp_path / "run", *SETTINGS,
        "--loss", "simpo", "--eval-fraction", 0.3, "--dry-run", "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    assert result.json["pairs"] + result.json["held_out_pairs"] == 20
    assert not (tmp_path / "run").exists()
    assert not list(temporary.iterdir())


def test_optimizers_differ_in_what_they_remember(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    sizes = []
    for name in ("rmsprop", "adamw"):
        result = dpocli(
            "train", "--model", MODEL, "--reference", cache, "--out", tmp_path / "run", *SETTINGS, "--optimizer", name,
            "--dry-run", "--json",
        )  # fmt: skip
        sizes.append(result.json["bytes"])
    assert sizes[1] - sizes[0] == 4 * result.json["parameters"]


@pytest.mark.parametrize(
    ("wrong", "code"),
    [
        (("--reference", "nowhere"), 4),
        (("--data", TRAIN), 2),
        (("--data", "nowhere.jsonl", "--loss", "simpo"), 2),
        (("--data", os.devnull, "--loss", "simpo"), 2),
        (("--model", "nowhere"), 2),
        (("--eval-fraction", 0.00001), 2),
        (("--beta", 0), 2),
    ],
    ids=str,
)
def test_it_ends_as_the_real_run_would_and_leaves_no_trace(
    wrong: tuple[object, ...], code: int, cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "status.json").write_text('{"state": "preempted"}')
    given = dict(zip(wrong[::2], wrong[1::2], strict=True))
    usual = {"--model": MODEL, "--out": out} | ({} if "--data" in given else {"--reference": cache})
    line = ["train", *(word for option in (usual | given).items() for word in option)]
    dry = dpocli(*line, "--dry-run")
    assert dry.code == code, dry.err
    assert everything(out).keys() == {str(out / "status.json")}
    assert json.loads((out / "status.json").read_text()) == {"state": "preempted"}
    assert (dpocli(*line).code, dpocli(*line).err) == (code, dry.err)


def test_on_a_finished_run_there_is_nothing_to_do(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    line = (
        "train",
        "--model",
        MODEL,
        "--reference",
        cache,
        "--out",
        tmp_path / "run",
        *SETTINGS,
        "--scoring",
        "padded",
    )
    assert dpocli(*line).code == 0
    (tmp_path / "run" / ".hashes.json").unlink(missing_ok=True)
    before = everything(tmp_path)
    result = dpocli(*line, "--dry-run")
    assert (result.code, "nothing to do" in result.out) == (0, True), result.err
    assert everything(tmp_path) == before
    assert dpocli(*line, "--beta", 0.3, "--dry-run").code == 2
