"""Kill any command anywhere: the same line goes on from there, and nothing of the result tells that it was killed."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from safetensors.numpy import load_file

from dpocli.run.directory import RunDirectory
from dpocli.run.metrics_log import MetricsLog
from tests.commands.conftest import MODEL, TRAIN, Run, metrics_of, quiet, tensors_of
from tests.commands.warm_workers import Tally, Worker

SETTINGS = ("--learning-rate", "5e-4", "--batch-size", "8", "--max-steps", "12", "--save-every", "3")


def steps_done(out: Path) -> int:
    path = out / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_precompute_killed_in_the_middle_writes_the_same_cache(tmp_path: Path, dpocli: Run) -> None:
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 96, "--rows-per-part", 8, "--token-budget", 400)
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    worker = Worker.start_held("dpocli.cache.writer:CacheWriter.write", 4, (*line, "--out", killed), tmp_path / "log")
    assert worker.end(signal.SIGKILL) == -signal.SIGKILL
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
    method = "dpocli.run.metrics_log:MetricsLog.append"
    worker = Worker.start_held(method, after + 1, (*line, "--out", killed), tmp_path / "log")
    assert worker.end(signal.SIGKILL) == -signal.SIGKILL
    assert steps_done(killed) == after
    assert json.loads((killed / "status.json").read_text())["state"] == "running"
    result = dpocli(*line, "--out", killed)
    assert result.code == 0, result.err
    assert metrics_of(killed) == metrics_of(undisturbed)
    assert_same_bits(killed, undisturbed)
    checkpoint = tensors_of(killed / "checkpoints" / "step-12")
    assert 4 * sum(name.startswith("optimizer/") for name in checkpoint) == 3 * len(checkpoint)
    assert not list((killed / "checkpoints").glob(".*"))


def assert_saved(out: Path) -> None:
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("preempted", 75)
    assert (out / "checkpoints" / f"step-{status['step']}").is_dir()
    assert [row["step"] for row in metrics_of(out)] == list(range(1, status["step"] + 1))


def test_a_second_writer_is_refused_and_sigterm_saves_and_exits_75(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    line = ("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--max-steps", 100_000, "--out", out)
    worker = Worker.start(line, tmp_path / "log")
    worker.wait_until(lambda: steps_done(out) >= 2)
    result = dpocli(*line)
    assert result.code == 2
    assert f"process {worker.pid} on " in result.err
    assert "is writing it" in result.err
    assert worker.end(signal.SIGTERM) == 75, worker.log.read_text()
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


def test_a_run_whose_time_is_up_saves_and_goes_on(
    train_line: tuple[object, ...], undisturbed: Path, tmp_path: Path, dpocli: Run
) -> None:
    """Each turn makes at least one step, however short its time is; the result is that of a run without turns."""
    out, turns = tmp_path / "run", 0
    while (result := dpocli(*train_line, "--max-minutes", "1e-6", "--out", out)).code == 75:
        turns += 1
        assert_saved_since(out, turns)
    assert result.code == 0, result.err
    assert turns == 11
    assert metrics_of(out) == metrics_of(undisturbed)
    assert_same_bits(out, undisturbed)


def test_a_checkpoint_that_takes_longer_than_the_grace_is_told(
    train_line: tuple[object, ...], tmp_path: Path, dpocli: Run
) -> None:
    result = dpocli(*train_line, "--max-steps", 1, "--grace-seconds", "1e-6", "--out", tmp_path / "run")
    assert "Saving a checkpoint took" in result.err
    assert "--shutdown-timeout" in result.err


def assert_saved_since(out: Path, step: int) -> None:
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"], status["step"]) == ("preempted", 75, step)


def assert_same_bits(run: Path, other: Path) -> None:
    for read in (
        lambda out: load_file(out / "model" / "model.safetensors"),
        lambda out: {name: value.numpy() for name, value in tensors_of(out / "checkpoints" / "step-12").items()},
    ):
        first, second = read(run), read(other)
        assert first.keys() == second.keys()
        assert all(first[name].tobytes() == second[name].tobytes() for name in second)


@pytest.mark.slow
def test_many_kills_leave_no_trace(train_line: tuple[object, ...], undisturbed: Path, tmp_path: Path) -> None:
    """kill -9 at random instants (DPOCLI_TEST_KILLS of them, 20 unless told): in steps, evaluations, checkpoints, the end."""
    wanted = int(os.environ.get("DPOCLI_TEST_KILLS", "20"))
    generator, kills, rounds = random.Random(0), 0, 0
    while kills < wanted:
        out, rounds = tmp_path / f"run-{rounds}", rounds + 1
        code, turn = None, 0
        while code != 0:
            worker = Worker.start(
                (*train_line, "--save-every", 1, "--out", out), tmp_path / "log", Tally(tmp_path / "tally")
            )
            began, seen = time.monotonic(), steps_done(out)
            # From the first step on every instant is as likely; a run that is never let to a step would never end.
            while worker.is_alive and steps_done(out) <= seen and time.monotonic() < began + 300:
                time.sleep(0.005)
            time.sleep(generator.random() * 0.4)
            turn += 1
            code = worker.end(signal.SIGKILL)
            kills += code == -signal.SIGKILL
            assert code in (0, -signal.SIGKILL), (tmp_path / "log").read_text()[-3000:]
            assert turn < 100
        assert metrics_of(out) == metrics_of(undisturbed)
        assert_same_bits(out, undisturbed)
        shutil.rmtree(out)
    print(
        f"{kills} kills in {rounds} runs of 12 steps: metrics, weights and moments bit by bit those of an undisturbed run"
    )
