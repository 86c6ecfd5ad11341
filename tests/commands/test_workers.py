"""Any number of workers, of any kind, at any time: one tiling, and the values of a worker alone."""

import json
import os
import random
import shutil
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from dpocli.cache.schema import Tile
from dpocli.cache.writer import CacheWriter
from dpocli.commands.reference import Reference
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.run.directory import RunDirectory
from tests.commands.conftest import MODEL, TRAIN, Run, quiet
from tests.commands.ranks import on_processes
from tests.commands.warm_workers import Worker
from tests.support.caches import assert_same_values, content_of, pairs_in, parts_of, tree

ROWS, ROWS_PER_PART = 60, 5
LINE = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", ROWS, "--rows-per-part", ROWS_PER_PART)
MANY = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 120, "--rows-per-part", 6, "--token-budget", 400)
"""Enough parts for several to be at work."""

BESIDE = "Another process is filling this cache too"
LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHERS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one worker makes."""
    out = tmp_path_factory.mktemp("alone") / "ref"
    quiet(*LINE, "--out", out)
    return out


@pytest.fixture(scope="module")
def many_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("alone") / "many"
    quiet(*MANY, "--out", out)
    return out


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The tiles that are written, in order."""
    indices: list[int] = []
    plain = CacheWriter.write

    def write(self: CacheWriter, tile: Tile, pairs: Sequence[EncodedPair], skipped: Sequence[Skipped] = ()) -> None:
        indices.append(tile.index)
        plain(self, tile, pairs, skipped)

    monkeypatch.setattr(CacheWriter, "write", write)
    return indices


def status_in(path: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads(path.read_text())
    return value


def companion_status(out: Path, pid: int | None = None, shard: str = "") -> Path:
    return out / f"status{shard}-{socket.gethostname()}-{pid or os.getpid()}.json"


# in processes of their own


def test_plain_processes_on_one_directory(many_alone: Path, tmp_path: Path) -> None:
    """Forked from one that has imported everything, so that they set to work at almost the same moment."""
    out, logs = tmp_path / "ref", [tmp_path / f"log-{number}" for number in range(3)]
    workers = [Worker.start((*MANY, "--out", out, "--json"), log) for log in logs]
    codes, texts = [worker.end() for worker in workers], [log.read_text() for log in logs]
    assert codes == [0, 0, 0], texts
    assert content_of(out) == content_of(many_alone)
    assert list(parts_of(out)) == list(parts_of(many_alone))
    results = [json.JSONDecoder().raw_decode(text, text.index("{"))[0] for text in texts]
    assert all(result["complete"] for result in results), "each leaves out only what is there already"
    assert {status_in(path)["state"] for path in out.glob("status*.json")} == {"done"}
    assert (out / "config.yaml").exists()
    assert not [text for text in texts if "error: " in text or "warning: The part" in text]


def test_a_companion_killed_in_the_middle_leaves_the_next_run_clean(
    many_alone: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "ref"
    with RunDirectory(out, "precompute", companions=True):
        line, log = (*MANY, "--out", out), tmp_path / "log"
        worker = Worker.start_held("dpocli.cache.writer:CacheWriter.write", 4, line, log)
        pid = worker.pid
        worker.end(signal.SIGKILL)
        assert BESIDE in log.read_text()
        assert status_in(out / "status.json")["pid"] == os.getpid(), "it left the other's status alone"
        assert status_in(companion_status(out, pid))["state"] == "running"
    there = parts_of(out)
    assert len(there) == 3
    result = dpocli(*MANY, "--out", out)
    assert result.code == 0, result.err
    assert BESIDE not in result.err
    assert "warning: The part" not in result.err
    assert there.items() <= parts_of(out).items(), "what was there is not done again"
    assert content_of(out) == content_of(many_alone)
    assert {path.name for path in out.glob("*status*")} == {"status.json", ".status.lock"}
    assert status_in(out / "status.json")["state"] == "done"


# in this process


def test_shards_and_launchers_mixed_over_time_fill_one_tiling(
    alone: Path, tmp_path: Path, dpocli: Run, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ref"
    torchrun = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "node-1"}
    slurm = {"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4"}
    turns: list[tuple[tuple[object, ...], dict[str, str], set[int]]] = [
        (("--shard", "1/3"), {}, {1, 4, 7, 10}),
        ((), torchrun, {3, 5, 9, 11}),
        (("--launcher", "slurm"), slurm, {2, 6}),
        (("--shard", "0/2"), torchrun, set()),  # of four workers the third, who has 2, 6 and 10
        (("--shard", "3/7"), slurm, set()),  # which count for nothing without the option
        ((), {}, {0, 8}),
    ]
    for more, environment, tiles in turns:
        before = parts_of(out)
        written.clear()
        with monkeypatch.context() as patch:
            for name, value in environment.items():
                patch.setenv(name, value)
            result = dpocli(*LINE, "--out", out, *more)
        assert result.code == 0, result.err
        assert set(written) == tiles
        assert len(written) == len(tiles)
        assert before.items() <= parts_of(out).items()
    assert content_of(out) == content_of(alone)
    assert json.loads((out / "summary.json").read_text())["complete"]


def test_tiles_that_others_make_meanwhile_are_left_out(
    alone: Path, tmp_path: Path, dpocli: Run, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tile is looked for before it is encoded, so at most the one after the tile that is scored is made twice."""
    out = tmp_path / "ref"
    plain = Reference.complete

    def complete(self: Reference, *arguments: Any) -> list[EncodedPair]:
        for part in alone.glob("rows-*"):
            if not (out / part.name).exists():
                shutil.copy2(part, out)
        return plain(self, *arguments)

    monkeypatch.setattr(Reference, "complete", complete)
    result = dpocli(*LINE, "--out", out, "--json")
    assert result.code == 0, result.err
    assert 1 <= len(written) <= 2
    assert (result.json["complete"], result.json["parts"], result.json["pairs"]) == (True, 12, 60)
    assert content_of(out) == content_of(alone)


def test_a_companion_begins_elsewhere_and_leaves_the_others_files_alone(
    alone: Path, tmp_path: Path, dpocli: Run, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ref"
    monkeypatch.setattr(random, "randrange", lambda stop: stop - 3)
    with RunDirectory(out, "precompute", companions=True):
        before = (out / "status.json").read_bytes()
        result = dpocli(*LINE, "--out", out)
        assert (out / "status.json").read_bytes() == before
    assert result.code == 0, result.err
    assert BESIDE in result.err
    assert written == [9, 10, 11, *range(9)]
    assert content_of(out) == content_of(alone)
    assert not (out / "config.yaml").exists()
    own = status_in(companion_status(out))
    assert (own["state"], own["exit_code"], own["command"]) == ("done", 0, "precompute")
    assert status_in(out / "status.json")["state"] == "done", "the other's end"


def test_a_companion_that_finds_all_done(alone: Path, tmp_path: Path, dpocli: Run, written: list[int]) -> None:
    out = tmp_path / "ref"
    shutil.copytree(alone, out)
    (out / "status.json").unlink()
    with RunDirectory(out, "precompute", companions=True):
        result = dpocli(*LINE, "--out", out, "--json")
    assert (result.code, written, result.json["complete"]) == (0, [], True), result.err


def test_a_shard_twice(tmp_path: Path, dpocli: Run, written: list[int]) -> None:
    out = tmp_path / "ref"
    with RunDirectory(out, "precompute", shard="1/3", companions=True):
        for shard in ("1/3", "2/3"):
            assert dpocli(*LINE, "--out", out, "--shard", shard).code == 0
    assert sorted(written) == [1, 2, 4, 5, 7, 8, 10, 11]
    assert companion_status(out, shard="-1-of-3").exists()
    assert not companion_status(out, shard="-2-of-3").exists(), "no one else was at this shard"


def test_a_request_to_stop_holds_for_companions(tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "ref"
    plain = Reference.complete

    def complete(self: Reference, *arguments: Any) -> list[EncodedPair]:
        (out / "stop").touch()
        return plain(self, *arguments)

    with RunDirectory(out, "precompute", companions=True) as first, monkeypatch.context() as patch:
        patch.setattr(Reference, "complete", complete)
        result = dpocli(*LINE, "--out", out)
        assert first.stop_requested()
    assert result.code == 75
    assert "Stopped on request with 0 of 12 parts written" in result.err
    assert status_in(companion_status(out))["state"] == "preempted"
    assert dpocli(*LINE, "--out", out, "--json").json["parts"] == 12


def test_a_companion_that_is_stopped_later_leaves_the_outcome_of_the_first(
    tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ref"
    first = RunDirectory(out, "precompute", companions=True).__enter__()
    plain = Reference.complete

    def complete(self: Reference, *arguments: Any) -> list[EncodedPair]:
        if not first._ended.is_set():
            first.__exit__(None, None, None)
            ended = status_in(out / "status.json")
            assert ended["state"] == "done"
            # As if it had been another process.
            (out / "status.json").write_text(json.dumps(ended | {"pid": 0, "pid_started": 0}))
            (out / "stop").touch()
        return plain(self, *arguments)

    monkeypatch.setattr(Reference, "complete", complete)
    assert dpocli(*LINE, "--out", out).code == 75
    assert status_in(companion_status(out))["state"] == "preempted"
    assert status_in(out / "status.json")["state"] == "done"


def test_a_companion_with_other_settings_is_refused(alone: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "ref"
    shutil.copytree(alone, out)
    (out / "status.json").unlink()  # a finished one would show no writer until it is accepted
    before = tree(out)
    with RunDirectory(out, "precompute", companions=True):
        result = dpocli(*LINE, "--max-length", 50, "--out", out)
        assert result.code == 4
        assert "max_length: 2048 -> 50" in result.err
        assert status_in(companion_status(out))["exit_code"] == 4
        assert status_in(out / "status.json")["state"] == "running"
    assert parts_of(out) == {path.name: time for path, (time, _) in before.items() if path.name.startswith("rows-")}


# srun


def slurm(monkeypatch: pytest.MonkeyPatch, task: int, of: int = 2) -> None:
    monkeypatch.setenv("SLURM_PROCID", str(task))
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", str(of))


def test_the_tasks_of_srun_share_the_tiles_and_the_first_one_speaks(
    alone: Path, tmp_path: Path, dpocli: Run, written: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ref"
    line = (*LINE, "--out", out, "--launcher", "slurm", "--json")
    slurm(monkeypatch, 1)
    second = dpocli(*line)
    assert (second.code, second.out, second.err) == (0, "", "")
    assert written == [1, 3, 5, 7, 9, 11]
    assert not (out / "status.json").exists()
    slurm(monkeypatch, 0)
    first = dpocli(*line)
    assert (first.code, first.json["complete"]) == (0, True), first.err
    assert "60 rows; reference" in first.err
    assert written[6:] == [0, 2, 4, 6, 8, 10]
    assert content_of(out) == content_of(alone)


def test_without_srun_the_option_is_an_error(tmp_path: Path, dpocli: Run) -> None:
    result = dpocli(*LINE, "--out", tmp_path / "ref", "--launcher", "slurm", "--device", "cpu")
    assert (result.code, result.out) == (2, "")
    assert "--launcher slurm: SLURM_STEP_NUM_TASKS is not in the environment" in result.err
    assert not (tmp_path / "ref").exists()


def test_an_error_names_the_task(alone: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    slurm(monkeypatch, 1)
    result = dpocli(*LINE, "--out", alone, "--launcher", "slurm", "--max-length", 50)
    assert result.code == 4
    assert result.err.startswith("error (rank 1): ")


def test_a_team_beside_another_writer_agrees_on_the_order(tmp_path: Path) -> None:
    """Only its first process knows that there is another, and begins elsewhere: the others have to follow."""
    quiet(*LINE, "--out", tmp_path / "alone")
    with RunDirectory(out := tmp_path / "ref", "precompute", companions=True):
        on_processes(2, *LINE, "--out", out, "--shards", 2)
    assert_same_values(pairs_in(tmp_path / "alone"), pairs_in(out))


def test_who_writes_the_last_part_has_the_last_word(
    tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for rank in range(2):
        for name, value in {"SLURM_PROCID": rank, "SLURM_STEP_NUM_TASKS": 2, "SLURM_LOCALID": rank}.items():
            monkeypatch.setenv(name, str(value))
        assert dpocli(*LINE, "--launcher", "slurm", "--out", tmp_path / "ref").code == 0
        summary = json.loads((tmp_path / "ref" / "summary.json").read_text())
        assert (summary["complete"], "triage" in summary) == (rank == 1, rank == 1)


def test_a_part_of_another_run_among_ours_is_made_anew(tmp_path: Path, dpocli: Run) -> None:
    ours, other = tmp_path / "ours", tmp_path / "other"
    quiet(*LINE, "--out", ours)
    before = content_of(ours)
    quiet(*LINE, "--max-length", 500, "--out", other)
    name = sorted(parts_of(ours))[3]
    shutil.copy(other / name, ours / name)
    result = dpocli(*LINE, "--out", ours)
    assert result.code == 0, result.err
    assert f"{name} is damaged: it belongs to another run" in " ".join(result.err.split()) or name in result.err
    assert content_of(ours) == before
    assert dpocli(*LINE, "--max-length", 500, "--out", ours).code == 4, "all of them are another run"
