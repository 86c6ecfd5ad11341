"""Kill any command anywhere: the same line goes on from there, and nothing of the result tells that it was killed."""

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from dpocli.artifacts.run_dir import RunDirectory
from tests.commands.conftest import MODEL, TRAIN, Run, metrics_of, start

SETTINGS = ("--learning-rate", "5e-4", "--batch-size", "8", "--max-steps", "20", "--save-every", "3")


def wait_until(condition: Callable[[], bool], seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_precompute_killed_in_the_middle_writes_the_same_cache(tmp_path: Path, dpocli: Run) -> None:
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--rows-per-part", 8, "--token-budget", 400)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = start(*line, "--out", killed)
    wait_until(lambda: len(list(killed.glob("rows-*"))) >= 3)
    process.kill()
    process.communicate()
    there = {path.name: path.stat().st_mtime_ns for path in killed.glob("rows-*")}
    assert 3 <= len(there) < 50, "the kill came too late to show anything"
    for out in (killed, undisturbed):
        result = dpocli(*line, "--out", out)
        assert result.code == 0, result.err
    for name, written in there.items():
        assert (killed / name).stat().st_mtime_ns == written, "what was there is not done again"
    parts = sorted(path.name for path in undisturbed.glob("rows-*"))
    assert sorted(path.name for path in killed.glob("rows-*")) == parts
    for name in parts:
        assert pq.read_table(killed / name).equals(pq.read_table(undisturbed / name)), name
    assert not list(killed.glob("*.tmp"))


@pytest.mark.parametrize("after", [1, 8])
def test_train_killed_in_the_middle_ends_with_the_same_bits(
    after: int, cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    """Before the first checkpoint, and between two."""
    held_out = ("--eval-reference", held_out_cache, "--eval-every", 10)
    line = ("train", "--model", MODEL, "--reference", cache, *held_out, *SETTINGS)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = start(*line, "--out", killed)
    wait_until(lambda: steps_done(killed) >= after)
    process.kill()
    process.communicate()
    assert steps_done(killed) < 20, "the kill came too late to show anything"
    assert json.loads((killed / "status.json").read_text())["state"] == "running"
    for out in (killed, undisturbed):
        result = dpocli(*line, "--out", out)
        assert result.code == 0, result.err
    first, second = (load_file(out / "model" / "model.safetensors") for out in (killed, undisturbed))
    assert all(first[name].tobytes() == second[name].tobytes() for name in second)
    assert metrics_of(killed) == metrics_of(undisturbed)
    moments = load_file(killed / "checkpoints" / "step-20" / "optimizer.safetensors")
    assert len(moments) == 3 * len(load_file(killed / "checkpoints" / "step-20" / "model.safetensors"))
    assert not list((killed / "checkpoints").glob(".*"))


@pytest.mark.parametrize("request_", ["SIGTERM", "stop file"])
def test_a_stop_on_request_saves_and_exits_75(request_: str, cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--max-steps", 3000, "--out", out)
    process = start(*line)
    wait_until(lambda: steps_done(out) >= 2)
    if request_ == "SIGTERM":
        process.send_signal(signal.SIGTERM)
    else:
        (out / "stop").touch()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75, err
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (out / "checkpoints" / f"step-{status['step']}").is_dir()
    assert [row["step"] for row in metrics_of(out)] == list(range(1, status["step"] + 1))


def test_a_second_writer_of_one_run_is_refused(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--max-steps", 3000, "--out", out)
    process = start(*line)
    try:
        wait_until(lambda: steps_done(out) >= 1)
        result = dpocli(*line)
        assert result.code == 2
        assert str(process.pid) in result.err
        assert "is writing it" in result.err
        os.kill(process.pid, 0)
    finally:
        process.kill()
        process.communicate()


def test_a_stop_at_any_moment_leaves_no_gap_and_no_repeat(
    cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of a held-out evaluation too, which is cut short, and made when the run goes on."""
    held_out = ("--eval-reference", held_out_cache, "--eval-every", 2, "--token-budget", 250)
    line = ("train", "--model", MODEL, "--reference", cache, *held_out, "--batch-size", 8, "--max-steps", 4)
    undisturbed, stopped = tmp_path / "undisturbed", tmp_path / "stopped"
    assert dpocli(*line, "--out", undisturbed).code == 0
    codes = []
    while not codes or codes[-1] != 0:
        calls = iter(range(1000))
        # Each start gets a little further than one question: the step-0 evaluation alone asks several times.
        patience = 4 + 3 * len(codes)
        with monkeypatch.context() as patch:
            patch.setattr(RunDirectory, "stop_requested", lambda _, left=patience, asked=calls: next(asked) >= left)
            codes.append(dpocli(*line, "--out", stopped).code)
        assert len(codes) < 20
    assert codes[-1] == 0
    assert set(codes[:-1]) == {75}
    assert len(codes) >= 4
    assert metrics_of(stopped) == metrics_of(undisturbed)
    first, second = (load_file(out / "model" / "model.safetensors") for out in (stopped, undisturbed))
    assert all(first[name].tobytes() == second[name].tobytes() for name in second)
