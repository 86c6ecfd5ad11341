"""Kill any command anywhere: the same line goes on from there, and nothing of the result tells that it was killed."""

import json
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.numpy import load_file

from dpocli.artifacts.metrics_log import MetricsLog
from dpocli.artifacts.run_dir import RunDirectory
from tests.commands.conftest import MODEL, TRAIN, Run, metrics_of, moments_of, quiet, start, start_held, tensors_of

SETTINGS = ("--learning-rate", "5e-4", "--batch-size", "8", "--max-steps", "12", "--save-every", "3")


def wait_until(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline, "what the test waits for did not happen"
        time.sleep(0.01)


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_precompute_killed_in_the_middle_writes_the_same_cache(tmp_path: Path, dpocli: Run) -> None:
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 96, "--rows-per-part", 8, "--token-budget", 400)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    process = start_held("dpocli.artifacts.cache_writer:CacheWriter.write", 4, *line, "--out", killed)
    process.kill()
    process.communicate()
    there = {path.name: path.stat().st_mtime_ns for path in killed.glob("rows-*")}
    assert len(there) == 3
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


@pytest.fixture(scope="module")
def train_line(cache: Path, held_out_cache: Path) -> tuple[object, ...]:
    held_out = ("--eval-reference", held_out_cache, "--eval-every", 7)
    return ("train", "--model", MODEL, "--reference", cache, *held_out, *SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(train_line: tuple[object, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    quiet(*train_line, "--out", out)
    return out


@pytest.mark.parametrize("after", [1, 8])
def test_train_killed_in_the_middle_ends_with_the_same_bits(
    after: int, train_line: tuple[object, ...], undisturbed: Path, tmp_path: Path, dpocli: Run
) -> None:
    """Before the first checkpoint, and between two."""
    line, killed = train_line, tmp_path / "killed"
    process = start_held("dpocli.artifacts.metrics_log:MetricsLog.append", after + 1, *line, "--out", killed)
    process.kill()
    process.communicate()
    assert steps_done(killed) == after
    assert json.loads((killed / "status.json").read_text())["state"] == "running"
    result = dpocli(*line, "--out", killed)
    assert result.code == 0, result.err
    first, second = (load_file(out / "model" / "model.safetensors") for out in (killed, undisturbed))
    assert all(first[name].tobytes() == second[name].tobytes() for name in second)
    assert metrics_of(killed) == metrics_of(undisturbed)
    moments, undisturbed_moments = (moments_of(out / "checkpoints" / "step-12") for out in (killed, undisturbed))
    assert all(torch.equal(moments[name], undisturbed_moments[name]) for name in undisturbed_moments)
    assert len(moments) * 4 == 3 * len(tensors_of(killed / "checkpoints" / "step-12"))
    assert not list((killed / "checkpoints").glob(".*"))


def assert_saved(out: Path) -> None:
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (out / "checkpoints" / f"step-{status['step']}").is_dir()
    assert [row["step"] for row in metrics_of(out)] == list(range(1, status["step"] + 1))


def test_a_second_writer_is_refused_and_sigterm_saves_and_exits_75(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--max-steps", 100_000, "--out", out)
    process = start(*line)
    try:
        wait_until(lambda: steps_done(out) >= 2, process)
        result = dpocli(*line)
        assert result.code == 2
        assert f"process {process.pid} on " in result.err
        assert "is writing it" in result.err
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, err
    assert_saved(out)


def test_a_stop_file_saves_and_exits_75(
    cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    plain = MetricsLog.append

    def append(self: MetricsLog, row: Mapping[str, Any]) -> None:
        plain(self, row)
        if steps_done(out) == 2:
            (out / "stop").touch()

    monkeypatch.setattr(MetricsLog, "append", append)
    line = ("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--out", out)
    assert dpocli(*line).code == 75
    assert_saved(out)
    assert 2 <= steps_done(out) < 12


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
