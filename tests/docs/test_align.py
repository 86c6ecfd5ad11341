"""`docs/examples/align.sh` runs with stand-ins for SLURM's commands on PATH.

The fast tests also have stand-ins for torchrun and for the work of dpocli (its command line, status file and signals are
the real ones).
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpocli.cli import run_command_line
from tests.docs.pages import ALIGN, ROOT

SBATCH = """#!/bin/bash
# Runs the job at once; one that depends on a job which has not succeeded is refused.
set -e
echo "sbatch $*" >> "$CALLS"
export SLURM_JOB_ID=$((100 + $(grep -c ^sbatch "$CALLS")))
tasks=none
while [[ $1 == --* ]]; do
    case $1 in
    --array=*) range=${1#*=}; tasks=$(seq "${range%-*}" "${range#*-}") ;;
    --dependency=afterok:*) test -e "succeeded-${1##*:}" ;;
    esac
    shift
done
for task in $tasks; do
    if [ "$task" != none ]; then export SLURM_ARRAY_JOB_ID=$SLURM_JOB_ID SLURM_ARRAY_TASK_ID=$task; fi
    bash "$@" >> "slurm-$SLURM_JOB_ID.log" 2>&1
done
touch "succeeded-$SLURM_JOB_ID"
echo "$SLURM_JOB_ID"
"""
SCONTROL = """#!/bin/bash
if [ "$1" = show ]; then echo localhost; echo another; else echo "scontrol $*" >> "$CALLS"; fi
"""
SRUN = """#!/bin/bash
while [[ $1 == -* ]]; do shift; done
exec "$@"
"""
TORCHRUN = """#!/bin/bash
# Passes SIGTERM on, and turns every exit code into 1.
echo "torchrun $*" >> "$CALLS"
while [ "$1" != -m ]; do shift; done
shift
"$@" &
trap 'kill -TERM $!' TERM
while kill -0 $! 2> /dev/null; do wait $!; done
wait $! || exit 1
"""
DPOCLI = f"""#!{sys.executable}
import os, sys, time
from types import SimpleNamespace
from dpocli.run.directory import RunDirectory
from dpocli.cli import main
from dpocli.distributed.signals import StopFlag
from dpocli.errors import NumericsError, PreemptedError

def run(options, terminal):
    shard = getattr(options, "shard", "0/1")

    def begun():
        with open(os.environ["CALLS"], "a") as calls:
            print("dpocli", sys.argv[1], options.out, shard, file=calls)

    if os.environ["ACT"] == "end while it starts":
        begun()
        time.sleep(99)
    with RunDirectory(options.out, sys.argv[1], shard=shard) as out, StopFlag() as stop:
        begun()
        if os.environ["ACT"] == "fail":
            raise NumericsError("NaN")
        while os.environ["ACT"] != "work" and not stop:
            time.sleep(0.01)
        if os.environ["ACT"] == "save when asked":
            time.sleep(0.5)
            raise PreemptedError("saved")

for name in ("precompute", "train", "evaluate"):
    sys.modules["dpocli.commands." + name] = SimpleNamespace(run=run)
main()
"""
STAND_INS = {"sbatch": SBATCH, "scontrol": SCONTROL, "srun": SRUN}


class Job:
    """A running script."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self._log = process, log

    def ends(self, seconds: float = 300) -> tuple[int, str]:
        """Exit code and output."""
        return self.process.wait(seconds), self._log.read_text()

    def wait_until(self, condition: Callable[[], bool]) -> None:
        deadline = time.monotonic() + 300
        while not condition():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < deadline, self._log.read_text()
            time.sleep(0.02)


class Cluster:
    """A directory from which `align.sh` is submitted, and a PATH with stand-ins."""

    def __init__(self, directory: Path, stand_ins: dict[str, str]) -> None:
        self.directory = directory
        self.work = directory / "align"
        self.script = ALIGN.read_text()
        self.jobs: list[Job] = []
        for name, text in stand_ins.items():
            path = directory / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)

    def change(self, old: str, new: str) -> None:
        assert old in self.script
        self.script = self.script.replace(old, new)

    def start(self, *arguments: str, act: str = "work", **environment: str) -> Job:
        (self.directory / "align.sh").write_text(self.script)
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "TORCH"))}
        path = f"{self.directory / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
        ours = {"PATH": path, "CALLS": str(self.directory / "calls"), "ACT": act, "OMP_NUM_THREADS": "1"}
        slurm = {"JOB_ID": str(os.getpid()), "JOB_NODELIST": "n[1-2]", "NNODES": "1", "GPUS_ON_NODE": "2"}
        slurm |= {"CPUS_PER_TASK": "1"}
        log = self.directory / f"job-{len(self.jobs)}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                ["bash", "align.sh", *arguments],
                cwd=self.directory,
                env=clean | ours | {f"SLURM_{name}": value for name, value in slurm.items()} | environment,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        self.jobs.append(Job(process, log))
        return self.jobs[-1]

    def calls(self, of: str) -> list[str]:
        """The arguments of each call."""
        path = self.directory / "calls"
        lines = path.read_text().splitlines() if path.exists() else []
        return [line.partition(" ")[2] for line in lines if line.startswith(of + " ")]

    def logs(self) -> str:
        return "".join(path.read_text() for path in sorted(self.directory.glob("slurm-*.log")))


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path, STAND_INS | {"torchrun": TORCHRUN, "dpocli": DPOCLI})
    yield cluster
    end(cluster)


@pytest.fixture
def real_cluster(tmp_path: Path) -> Iterator[Cluster]:
    """Only SLURM is a stand-in."""
    cluster = Cluster(tmp_path, STAND_INS)
    sample = ROOT / "sample_data"
    (tmp_path / "my-model").symlink_to(sample / "tiny-model")
    for name, source in (("prefs.jsonl", "train.jsonl"), ("heldout.jsonl", "heldout.jsonl")):
        rows = (sample / source).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / name).write_text("".join(rows[:24]), encoding="utf-8")
    cluster.change("workers=16", "workers=2")
    cluster.change("--rows-per-part 1024", "--rows-per-part 8")
    cluster.change("--batch-size 128", "--batch-size 8")
    yield cluster
    end(cluster)


def end(cluster: Cluster) -> None:
    for job in cluster.jobs:
        if job.process.poll() is None:
            job.process.terminate()
            job.process.wait(60)


def assert_torchrun_knows(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert (parsed.module, parsed.training_script) == (True, "dpocli")


def status(out: Path, suffix: str = "") -> dict[str, object]:
    path = out / f"status{suffix}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def test_slurm_jobs_are_chained_and_every_shard_is_scored(cluster):
    cluster.change("workers=16", "workers=2")
    job = cluster.start()
    code, said = job.ends()
    assert code == 0, said + cluster.logs()
    first, second, third = cluster.calls("sbatch")
    assert "--array=0-1 " in first
    assert first.endswith("align.sh precompute")
    assert "--dependency=afterok:101 " in second
    assert second.endswith("align.sh train")
    assert "--dependency=afterok:102 " in third
    assert third.endswith("align.sh evaluate")
    assert cluster.calls("dpocli") == [
        *(f"precompute align/{name} {shard}/2" for shard in (0, 1) for name in ("ref-heldout", "ref")),
        "train align/run 0/1",
        "evaluate align/report 0/1",
    ]
    (torchrun,) = cluster.calls("torchrun")
    assert_torchrun_knows(torchrun.split())
    assert "--rdzv-endpoint=localhost:20102 " in torchrun
    assert cluster.calls("scontrol") == []


@pytest.mark.parametrize(
    ("signals", "requeued"),
    [([signal.SIGUSR1], True), ([signal.SIGUSR1, signal.SIGTERM], True), ([signal.SIGTERM], False)],
    ids=["time is nearly up", "time is up", "cancelled"],
)
def test_slurm_training_that_runs_out_of_time_is_saved_and_requeued(signals, requeued, cluster):
    job = cluster.start("train", act="save when asked", SLURM_JOB_ID="7")
    job.wait_until(lambda: bool(cluster.calls("dpocli")))
    assert status(cluster.work / "run")["state"] == "running"
    for number in signals:
        job.process.send_signal(number)
        time.sleep(0.1)
    code, said = job.ends()
    found = status(cluster.work / "run")
    assert (found["state"], found["exit_code"]) == ("preempted", 75), said
    assert cluster.calls("scontrol") == (["requeue 7"] if requeued else [])
    assert code == (75 if requeued else 1)


@pytest.mark.parametrize("act", ["save when asked", "finish when asked"])
def test_slurm_array_tasks_requeue_themselves_alone(act, cluster):
    """Also where the signal comes during the last part of one cache: the next cache is not begun."""
    job = cluster.start("precompute", act=act, SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    job.wait_until(lambda: bool(cluster.calls("dpocli")))
    job.process.send_signal(signal.SIGUSR1)
    _, said = job.ends()
    assert cluster.calls("scontrol") == ["requeue 7_3"], said
    assert cluster.calls("dpocli") == ["precompute align/ref-heldout 3/16"]
    state = "done" if act == "finish when asked" else "preempted"
    assert status(cluster.work / "ref-heldout", "-3-of-16")["state"] == state


def test_slurm_array_tasks_whose_time_is_up_while_they_start_are_requeued(cluster):
    job = cluster.start("precompute", act="end while it starts", SLURM_ARRAY_JOB_ID="7", SLURM_ARRAY_TASK_ID="3")
    job.wait_until(lambda: bool(cluster.calls("dpocli")))
    job.process.send_signal(signal.SIGUSR1)
    code, said = job.ends()
    assert (code, cluster.calls("scontrol")) == (75, ["requeue 7_3"]), said


def test_slurm_jobs_that_fail_are_not_requeued(cluster):
    code, said = cluster.start("train", act="fail").ends()
    assert (code, status(cluster.work / "run")["exit_code"]) == (1, 5), said
    code, said = cluster.start("evaluate", act="fail").ends()
    assert code == 5, said
    assert cluster.calls("scontrol") == []


@pytest.mark.slow
def test_slurm_script_aligns_a_model(real_cluster):
    code, said = real_cluster.start().ends(300)
    assert code == 0, said + real_cluster.logs()
    for name in ("ref", "ref-heldout"):
        assert len(list((real_cluster.work / name).glob("rows-*.parquet"))) == 3
        for suffix in ("-0-of-2", "-1-of-2"):
            assert status(real_cluster.work / name, suffix)["state"] == "done"
    assert status(real_cluster.work / "run")["state"] == "done"
    report = json.loads((real_cluster.work / "report" / "metrics.json").read_text())
    assert report["pairs"] == 24


@pytest.mark.slow
def test_slurm_training_resumes_when_requeued(real_cluster, monkeypatch):
    """torchrun and its workers are real: it returns 1, and the script reads the outcome from the status file."""
    monkeypatch.chdir(real_cluster.directory)
    for name, data in (("ref", "prefs.jsonl"), ("ref-heldout", "heldout.jsonl")):
        line = ["precompute", "--model", "my-model", "--data", data, "--out", f"align/{name}"]
        assert run_command_line(line) == 0
    real_cluster.change("--epochs 1", "--epochs 5000 --log-every 1 --eval-every 15000")
    metrics = real_cluster.work / "run" / "metrics.jsonl"

    def steps() -> int:
        return len(metrics.read_text().splitlines()) if metrics.exists() else 0

    last_step = 0
    for attempt in (1, 2):
        job, before = real_cluster.start("train"), steps()
        job.wait_until(lambda before=before: steps() > before + 2)
        job.process.send_signal(signal.SIGUSR1)
        _, said = job.ends()
        found = status(real_cluster.work / "run")
        assert found["state"] == "preempted", said
        assert len(real_cluster.calls("scontrol")) == attempt
        assert int(str(found["step"])) > last_step
        assert (f"Resuming after step {last_step} of 15000." in said) is (attempt == 2)
        last_step = int(str(found["step"]))
