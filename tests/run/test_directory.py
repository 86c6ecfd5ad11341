import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace

import pytest
import yaml

from dpocli.config.commands import PrecomputeOptions
from dpocli.config.parsing import load_options
from dpocli.distributed.signals import StopFlag
from dpocli.errors import CacheError, DataError, PreemptedError, UsageError
from dpocli.run import directory, status
from dpocli.run.directory import RunDirectory
from dpocli.run.metrics_log import MetricsLog
from dpocli.run.process import start_time
from dpocli.run.status import Outcome, StatusFile, new_status, record_failure


def status_of(path, name="status.json"):
    return json.loads((path / name).read_text())


def leave_behind(path, **changes):
    """A status that another writer left in a directory."""
    path.mkdir(exist_ok=True)
    StatusFile(path).write(replace(new_status("train"), **changes))


# status.json


def test_a_run_that_ends_well(tmp_path):
    out = tmp_path / "a" / "b"
    with RunDirectory(out, "train") as run:
        running = status_of(out)
        assert (running["state"], running["exit_code"], running["pid"]) == ("running", None, os.getpid())
        run.update(step=7)
    ended = status_of(out)
    assert (ended["state"], ended["exit_code"], ended["step"], ended["command"]) == ("done", 0, 7, "train")
    assert ended["heartbeat"] >= running["heartbeat"] >= running["started"]


@pytest.mark.parametrize(
    ("error", "state", "code"),
    [
        (PreemptedError("told"), "preempted", 75),
        (DataError("told"), "failed", 3),
        (KeyboardInterrupt(), "failed", 130),
        (MemoryError(), "failed", 7),
        (ZeroDivisionError("told"), "failed", 1),
        (SystemExit(3), "failed", 1),
    ],
)
def test_a_run_that_ends_otherwise(tmp_path, error, state, code):
    with pytest.raises(type(error)), RunDirectory(tmp_path, "train"):
        raise error
    ended = status_of(tmp_path)
    assert (ended["state"], ended["exit_code"]) == (state, code)
    assert "told" in ended["message"] or not str(error) or code == 1


def test_the_heart_beats(tmp_path, monkeypatch):
    monkeypatch.setattr(directory, "HEARTBEAT_SECONDS", 0.01)
    with RunDirectory(tmp_path, "train") as run:
        first = status_of(tmp_path)["heartbeat"]
        run.update(step=3, message="evaluating")
        deadline = time.monotonic() + 120
        while status_of(tmp_path)["step"] != 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        status = status_of(tmp_path)
        assert (status["step"], status["message"]) == (3, "evaluating")
        assert status["heartbeat"] > first


def test_a_full_disk_does_not_hide_the_error(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path, "train").__enter__()
    monkeypatch.setattr(status, "write_json", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
    run.__exit__(DataError, DataError("told"), None)
    with pytest.raises(OSError, match="full"):
        run.__exit__(None, None, None)


def test_other_ranks_write_nothing(tmp_path):
    out = tmp_path / "run"
    with RunDirectory(out, "train", rank=1) as run:
        run.metrics.append({"step": 1})
        run.metrics.truncate_after(0)
        run.write_summary({})
        run.update(step=1)
        assert not run.stop_requested()
    assert not out.exists()


def test_an_output_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="file"), RunDirectory(tmp_path / "file", "train"):
        pass


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_that_may_not_be_written(tmp_path):
    tmp_path.chmod(0o500)
    for out in (tmp_path, tmp_path / "new"):
        with pytest.raises(UsageError, match="permission denied"), RunDirectory(out, "train"):
            pass
    tmp_path.chmod(0o700)


# one writer


def test_a_second_writer_in_this_process_is_refused(tmp_path):
    with RunDirectory(tmp_path, "train"):
        with (
            pytest.raises(UsageError, match=rf"dpocli train, process {os.getpid()} on "),
            RunDirectory(tmp_path, "train"),
        ):
            pass
        assert status_of(tmp_path)["state"] == "running"
    with RunDirectory(tmp_path, "train"):
        pass


HOLD = """
import sys, time
from pathlib import Path
from dpocli.run.directory import RunDirectory
with RunDirectory(Path(sys.argv[1]), "train"):
    print("ready", flush=True)
    time.sleep(3600)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    with subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "ready\n"
        with pytest.raises(UsageError, match=f"process {holder.pid} "), RunDirectory(tmp_path, "train"):
            pass
        assert status_of(tmp_path)["pid"] == holder.pid
        (tmp_path / "status.json").unlink()  # the lock alone holds as well
        with pytest.raises(UsageError, match="another process"), RunDirectory(tmp_path, "train"):
            pass
        holder.kill()
        holder.wait()
    with RunDirectory(tmp_path, "train"):
        assert status_of(tmp_path)["pid"] == os.getpid()


def test_without_locks_the_process_is_looked_for(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "lockf", lambda *_: (_ for _ in ()).throw(OSError(37, "no locks available")))
    leave_behind(tmp_path, pid=os.getppid(), pid_started=start_time(os.getppid()))
    with pytest.raises(UsageError, match=f"process {os.getppid()} "), RunDirectory(tmp_path, "train"):
        pass


def test_a_number_that_another_process_has_now_is_not_the_writer(tmp_path):
    leave_behind(tmp_path, pid=os.getppid(), pid_started=1)
    with RunDirectory(tmp_path, "train"):
        pass


def test_another_host_that_gives_no_sign_of_life_is_dead(tmp_path):
    leave_behind(tmp_path, host="node-7")
    naps, said = [], []
    with RunDirectory(tmp_path, "train", sleep=naps.append, say=said.append):
        assert sum(naps) == status.DEAD_AFTER_SECONDS
        assert "node-7" in said[0]


def test_another_host_that_gives_a_sign_of_life_is_the_writer(tmp_path):
    leave_behind(tmp_path, host="node-7")

    def nap(seconds):
        leave_behind(tmp_path, host="node-7")

    with pytest.raises(UsageError, match="on node-7"), RunDirectory(tmp_path, "train", sleep=nap):
        pass


@pytest.mark.parametrize("changes", [{"heartbeat": 0.0}, {"state": "preempted"}, {"state": "failed"}])
def test_another_host_that_is_silent_or_ended_is_not_waited_for(tmp_path, changes):
    leave_behind(tmp_path, host="node-7", **changes)
    with RunDirectory(tmp_path, "train", sleep=lambda _: pytest.fail("waited")):
        pass


def test_the_same_host_name_after_a_new_start_is_another_host(tmp_path):
    leave_behind(tmp_path, boot="another", pid=os.getppid(), heartbeat=0.0)
    with RunDirectory(tmp_path, "train"):
        pass


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"state": "running"}', "null"])
def test_a_status_that_makes_no_sense_is_none(tmp_path, text):
    (tmp_path / "status.json").write_text(text)
    with RunDirectory(tmp_path, "train"):
        pass


def test_shards_share_a_directory(tmp_path):
    with RunDirectory(tmp_path, "precompute", shard="0/2"), RunDirectory(tmp_path, "precompute", shard="1/2"):
        with pytest.raises(UsageError), RunDirectory(tmp_path, "precompute", shard="1/2"):
            pass
        assert status_of(tmp_path, "status-0-of-2.json")["state"] == "running"
    assert status_of(tmp_path, "status-1-of-2.json")["state"] == "done"
    assert not (tmp_path / "status.json").exists()


# what additional writers leave


def leave_companion(path, host, pid, **changes):
    """The status of an additional writer."""
    left = replace(new_status("precompute"), **{"host": host, "pid": pid} | changes)
    StatusFile(path, writer=f"-{host}-{pid}").write(left)


def companions_in(path):
    return sorted({found.name for found in path.iterdir()} - {"status.json", ".status.lock"})


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize("state", ["running", "done", "preempted", "failed"])
def test_dead_companions_go_with_the_next_start(tmp_path, dead_pid, state):
    leave_companion(tmp_path, socket.gethostname(), dead_pid, state=state)
    leave_companion(tmp_path, "node-7", 3, state=state, heartbeat=0.0)
    leave_companion(tmp_path, socket.gethostname(), os.getppid(), state=state, pid_started=1)
    with RunDirectory(tmp_path, "precompute", companions=True):
        assert companions_in(tmp_path) == []


def test_living_companions_and_other_shards_keep_their_files(tmp_path):
    leave_companion(tmp_path, socket.gethostname(), os.getppid(), pid_started=start_time(os.getppid()))
    leave_companion(tmp_path, "node-7", 3, state="running")
    dead = replace(new_status("precompute"), host="node-7", pid=3, heartbeat=0.0)
    for writer in ("", "-node-7-3"):
        StatusFile(tmp_path, "1/2", writer).write(dead)
    before = companions_in(tmp_path)
    with RunDirectory(tmp_path, "precompute", companions=True):
        assert companions_in(tmp_path) == before


def test_a_companion_removes_nothing(tmp_path):
    with RunDirectory(tmp_path, "precompute", companions=True):
        leave_companion(tmp_path, "node-7", 3, heartbeat=0.0)
        with RunDirectory(tmp_path, "precompute", companions=True) as second:
            assert second.is_companion
            assert (tmp_path / "status-node-7-3.json").exists()


# a finished result


REFUSED, STOPPED, INTERRUPTED = CacheError("refused"), PreemptedError("stopped"), KeyboardInterrupt()


def contents(path):
    return {found.name: found.read_bytes() for found in path.iterdir()}


def start(path, error=None, *, accept=None, **named):
    """A command in the directory: with `accept`, the options, it goes as far as writing them."""
    with suppress(type(error) if error else NotImplementedError), RunDirectory(path, "precompute", **named) as run:
        run.update(step=7, message="hashing", at_once=True)
        if accept:
            run.write_config(accept)
        if error:
            raise error


@pytest.fixture
def options(tmp_path):
    return load_options(PrecomputeOptions, {"model": "m", "out": str(tmp_path), "data": ["d"]})


@pytest.mark.parametrize("error", [REFUSED, INTERRUPTED, None], ids=["refused", "interrupted", "nothing to do"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_start_that_is_not_accepted_leaves_a_finished_result_alone(tmp_path, monkeypatch, error, rank):
    monkeypatch.setattr(directory, "HEARTBEAT_SECONDS", 0.001)
    start(tmp_path)
    assert status_of(tmp_path)["state"] == "done"
    before = contents(tmp_path)
    start(tmp_path, error, rank=rank, companions=True)
    record_failure(tmp_path, Outcome.of(error), "precompute")
    assert contents(tmp_path) == before


def test_an_accepted_start_replaces_the_status_of_a_finished_result(tmp_path, options):
    start(tmp_path)
    with RunDirectory(tmp_path, "precompute") as run:
        assert status_of(tmp_path)["state"] == "done"
        run.write_config(options)
        assert status_of(tmp_path)["state"] == "running"
    start(tmp_path, REFUSED, accept=options)
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["step"]) == ("failed", 7)


@pytest.mark.parametrize("state", [None, "preempted", "failed", "running"])
def test_a_refused_start_is_recorded_where_no_result_is_finished(tmp_path, state):
    if state:
        leave_behind(tmp_path, command="precompute", state=state, pid=1, pid_started=1)
    start(tmp_path, REFUSED)
    assert (status_of(tmp_path)["state"], status_of(tmp_path)["message"]) == ("failed", "refused")


def test_a_stop_before_a_start_is_accepted_is_recorded(tmp_path):
    start(tmp_path)
    start(tmp_path, STOPPED)
    assert status_of(tmp_path)["state"] == "preempted"


def test_another_shard_of_a_finished_cache(tmp_path, options):
    start(tmp_path, shard="0/2")
    before = contents(tmp_path)
    for shard in ("1/2", "0/1", "0/3"):
        start(tmp_path, REFUSED, shard=shard)
    left = {name for name in contents(tmp_path) if not name.endswith(".lock")}
    assert left == {"status-0-of-2.json"}
    assert before.items() <= contents(tmp_path).items()
    start(tmp_path, REFUSED, accept=options, shard="1/2")
    start(tmp_path, REFUSED, shard="1/2")
    assert status_of(tmp_path, "status-1-of-2.json")["state"] == "failed"


# failures before the run directory is entered


def test_an_early_failure_replaces_what_stands_there(tmp_path):
    leave_behind(tmp_path, state="preempted", pid=1, pid_started=0)
    record_failure(tmp_path, Outcome.of(UsageError("told")), "train")
    assert {"state": "failed", "exit_code": 2, "message": "told"}.items() <= status_of(tmp_path).items()


@pytest.mark.parametrize("writer", [{"host": "node-7"}, {}], ids=["a living one", "this process itself"])
def test_an_early_failure_leaves_alone(tmp_path, writer):
    leave_behind(tmp_path, message="mine", **writer)
    record_failure(tmp_path, Outcome.of(UsageError("told")), "train")
    assert status_of(tmp_path)["message"] == "mine"


# stopping


def test_a_stop_file_is_younger_than_the_run(tmp_path):
    stop = tmp_path / "stop"
    stop.touch()
    os.utime(stop, (1.0, 1.0))
    with RunDirectory(tmp_path, "train") as run:
        assert not run.stop_requested()
        stop.touch()
        assert run.stop_requested()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_sets_the_flag_and_nothing_else(number):
    before = signal.getsignal(number)
    with StopFlag() as stop:
        assert not stop
        os.kill(os.getpid(), number)
        os.kill(os.getpid(), number)
        assert stop
    assert signal.getsignal(number) is before


# metrics.jsonl


def test_metrics_are_appended_and_can_be_read_at_once(tmp_path):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    assert log.rows() == []
    log.append({"step": 1, "loss": 0.5})
    log.append({"step": 2, "loss": float("nan")})
    assert log.rows() == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": None}]
    log.close()
    log.append({"step": 3})
    log.close()
    assert [row["step"] for row in log.rows()] == [1, 2, 3]


def test_a_resumed_run_drops_what_it_does_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 0.5}\n{"step": 2}\n{"step": 3}\n{"step": 4, "lo')
    log = MetricsLog(path)
    log.truncate_after(2)
    assert path.read_text() == '{"step": 1, "loss": 0.5}\n{"step": 2}\n'
    log.append({"step": 3, "loss": 0.25})
    log.truncate_after(2)
    log.append({"step": 3, "loss": 0.125})
    assert log.rows() == [{"step": 1, "loss": 0.5}, {"step": 2}, {"step": 3, "loss": 0.125}]
    log.close()


@pytest.mark.parametrize("torn", ['{"step": 2, "lo', '{"step": 2}', "\xff", "3"])
def test_a_torn_last_line_spoils_no_other(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + torn.encode("latin-1"))
    log = MetricsLog(path)
    log.append({"step": 9})
    log.close()
    steps = [json.loads(line)["step"] for line in path.read_text().splitlines()]
    assert (steps[0], steps[-1]) == (1, 9)


# other files


def test_config_and_summary(tmp_path):
    flags = {"model": "m", "out": str(tmp_path), "data": ["d"], "shard": "1/2"}
    options = load_options(PrecomputeOptions, flags)
    with RunDirectory(tmp_path, "precompute", shard="1/2") as run:
        run.write_config(options)
        run.write_summary({"loss": float("inf"), "pairs": 3})
    assert load_options(PrecomputeOptions, {"config": str(tmp_path / "config-1-of-2.yaml")}) == options
    assert yaml.safe_load((tmp_path / "config-1-of-2.yaml").read_text())["shard"] == "1/2"
    assert json.loads((tmp_path / "summary.json").read_text()) == {"loss": None, "pairs": 3}


def test_every_field_of_the_status_is_json():
    assert json.loads(json.dumps(asdict(new_status("train"))))["state"] == "running"


def test_a_failure_on_another_rank_is_the_outcome_whoever_ends_first(tmp_path):
    def state():
        status = json.loads((tmp_path / "status.json").read_text())
        return status["state"], status["exit_code"], status["message"]

    for other_first in (True, False):
        first, other = (RunDirectory(tmp_path, "precompute", rank=rank) for rank in (0, 1))
        first.__enter__()
        other.__enter__()
        ends = [
            lambda run=other: run.__exit__(DataError, DataError("row 7"), None),
            lambda run=first: run.__exit__(None, None, None),
        ]
        for end in ends if other_first else reversed(ends):
            end()
        assert state() == ("failed", 3, "row 7")
    with RunDirectory(tmp_path, "precompute"):
        pass
    assert state()[0] == "done"


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[../gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:4242"),
        RuntimeError("Connection reset by peer"),
        type("DistNetworkError", (RuntimeError,), {})("The client socket has timed out"),
    ],
)
def test_a_lost_process_is_no_bug_of_this_one(error):
    outcome = Outcome.of(error)
    assert (outcome.state, outcome.exit_code) == ("failed", 7)
    assert "Another process of this run" in outcome.message


def test_a_process_of_another_launch_leaves_the_status_alone(tmp_path, monkeypatch):
    with RunDirectory(tmp_path, "precompute"):
        pass
    monkeypatch.setenv("MASTER_ADDR", "node-1")
    RunDirectory(tmp_path, "precompute", rank=1).__exit__(DataError, DataError("row 7"), None)
    monkeypatch.delenv("MASTER_ADDR")
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
    with RunDirectory(tmp_path, "precompute"):
        pass
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"
