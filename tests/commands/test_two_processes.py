"""Replicas on two processes give what one process gives: the same pairs in every step, the same losses."""

import json
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.commands.conftest import HELD_OUT, MODEL, TRAIN, Run, metrics_of
from tests.commands.ranks import on_processes


def assert_same_metrics(run: Path, other: Path) -> None:
    """Equal to float32 rounding. While the policy is the reference, only rounding tells a tie from an order."""
    rows, other_rows = metrics_of(run), metrics_of(other)
    assert [row.keys() for row in rows] == [row.keys() for row in other_rows]
    for row, other_row in zip(rows, other_rows, strict=True):
        names = [name for name in row if row["step"] > 1 or not name.endswith(("accuracies", "ties"))]
        mine, theirs = ([values[name] for name in names] for values in (row, other_row))
        np.testing.assert_allclose(theirs, mine, rtol=1e-4, atol=2e-5)


def test_training_on_two_processes_equals_one(cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    """40 pairs in batches of 13: one process has fewer pairs than the other, and in the last batch none."""
    one, two = tmp_path / "one", tmp_path / "two"
    settings = ("--batch-size", 13, "--epochs", 1, "--loss", "ipo", "--token-budget", 200)
    line = ("train", "--model", MODEL, "--reference", cache, "--eval-reference", held_out_cache, "--eval-every", 2)
    rate = ("--learning-rate", "3e-4")
    result = dpocli(*line, *rate, *settings, "--out", one)
    assert result.code == 0, result.err
    on_processes(2, *line, *rate, *settings, "--out", two)
    assert_same_metrics(one, two)
    weights, other_weights = (load_file(out / "model" / "model.safetensors") for out in (one, two))
    for name, weight in weights.items():
        np.testing.assert_allclose(other_weights[name], weight, rtol=1e-3, atol=3e-5)
    assert json.loads((two / "status.json").read_text())["state"] == "done"


def test_a_run_goes_on_with_another_number_of_processes(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    line = ("train", "--model", MODEL, "--reference", cache, "--batch-size", 8, "--learning-rate", "3e-4")
    undisturbed, moved = tmp_path / "undisturbed", tmp_path / "moved"
    assert dpocli(*line, "--out", undisturbed, "--max-steps", 6).code == 0
    assert dpocli(*line, "--out", moved, "--max-steps", 6, "--save-every", 3).code == 0
    # As if it had been killed after step 3, on one process.
    for path in (moved / "checkpoints" / "step-6", moved / "model"):
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
    (moved / "summary.json").unlink()
    on_processes(2, *line, "--out", moved, "--max-steps", 6, "--save-every", 3)
    assert_same_metrics(undisturbed, moved)


def test_precompute_and_evaluate_share_the_work(tmp_path: Path, dpocli: Run) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 48, "--rows-per-part", 8)
    assert dpocli(*line, "--out", one).code == 0
    on_processes(2, *line, "--out", two)
    assert sorted(path.name for path in two.glob("rows-*")) == sorted(path.name for path in one.glob("rows-*"))
    reports = {}
    for name, run in (("one", lambda *line: dpocli(*line)), ("two", partial(on_processes, 2))):
        out = tmp_path / f"report-{name}"
        run("evaluate", "--model", MODEL, "--data", HELD_OUT, "--limit", 30, "--loss", "simpo", "--out", out)
        reports[name] = json.loads((out / "metrics.json").read_text())
    for name in ("pairs", "loss", "rewards/accuracies", "rewards/margins", "rewards/chosen"):
        assert reports["two"][name] == pytest.approx(reports["one"][name], rel=1e-5), name
