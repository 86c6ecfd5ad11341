"""The README is checked like code: its commands parse and run, its tables and its file tree are those of the package.

The SLURM script runs with stand-ins for SLURM's commands on PATH; the fast tests also have stand-ins for torchrun and for
the work of dpocli (its command line, status file and signals are the real ones).
"""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from dpocli import __version__
from dpocli.cache.schema import SMALL_COLUMNS, TOKEN_COLUMNS
from dpocli.cli import run_command_line
from dpocli.config.commands import PrecomputeOptions, TrainOptions
from dpocli.config.flags import COMMANDS, build_options, options_of
from dpocli.config.gates import ALIASES
from dpocli.config.loss_expression import LossChoice
from dpocli.config.options import LossOptions
from dpocli.config.other_tools import FOREIGN_OPTIONS
from dpocli.config.parsing import load_options
from dpocli.data.formats import to_preference
from dpocli.data.row_file import RawRow
from dpocli.errors import ExitCode
from tests.readme_tables import with_tables

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)
SHELL = [text for language, text in BLOCKS if language in ("sh", "bash")]
(SLURM_SCRIPT,) = (text for language, text in BLOCKS if language == "bash")
(TUTORIAL,) = (text for text in SHELL if text.startswith("dpocli precompute"))
OPTIONS = {option.key: option for model in COMMANDS.values() for option in options_of(model)}


def section(heading: str) -> str:
    return README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


def table(heading: str) -> list[list[str]]:
    """The cells of the table below a heading."""
    lines = [line for line in section(heading).splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block that has no variables."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


DPOCLI_LINES = [
    words[words.index("dpocli") + 1 :]
    for block in SHELL
    if block != SLURM_SCRIPT
    for words in commands(block)
    if "dpocli" in words
]


# the shell blocks


@pytest.mark.parametrize("block", SHELL, ids=lambda block: block.splitlines()[0][:40])
def test_shell_blocks_are_valid(block):
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    checks = [["bash", "-n"]] + ([[shellcheck, "--shell=bash", "-"]] if shellcheck else [])
    for check in checks:
        done = subprocess.run(check, input=block, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", DPOCLI_LINES, ids=" ".join)
def test_command_lines_parse(line, monkeypatch, capsys):
    def run(options, console):
        if isinstance(options, LossOptions):
            options.loss_choices()

    for name in COMMANDS:
        monkeypatch.setitem(sys.modules, f"dpocli.commands.{name}", SimpleNamespace(run=run))
    assert run_command_line(line) == 0, capsys.readouterr().err


def test_there_are_command_lines_to_parse():
    assert {line[0] for line in DPOCLI_LINES} == {*COMMANDS, "--help"}


def test_torchrun_lines_parse():
    lines = [words for block in SHELL if block != SLURM_SCRIPT for words in commands(block) if words[0] == "torchrun"]
    assert lines
    for words in lines:
        assert_torchrun_knows(words[1:])


def assert_torchrun_knows(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    parsed = get_args_parser().parse_args(arguments)
    assert (parsed.module, parsed.training_script) == (True, "dpocli")


def test_every_flag_that_is_mentioned_exists():
    text = re.sub(
        r"^```(?:bash\n|sh\n(?:torchrun|accelerate launch)).*?^```$", "", README, flags=re.MULTILINE | re.DOTALL
    )
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))
    launchers = {"--shutdown-timeout", "--signals-to-handle", "--signal", "--multi_gpu", "--num_processes", "--cpu"}
    assert mentioned - launchers <= {"--config", "--help"} | {
        flag for option in OPTIONS.values() for flag in option.flags
    }


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", README, re.MULTILINE):
        assert f"\n{''.join(target)}:" in makefile


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, source, count in (("prefs.jsonl", "train.jsonl", 24), ("heldout.jsonl", "heldout.jsonl", 8)):
        rows = (ROOT / "sample_data" / source).read_text(encoding="utf-8").splitlines(keepends=True)
        Path(name).write_text("".join(rows[:count]), encoding="utf-8")
    Path("my-model").symlink_to(ROOT / "sample_data" / "tiny-model")
    for words in commands(TUTORIAL):
        if words[0] == "dpocli":
            assert run_command_line(words[1:]) == 0, capsys.readouterr().err
        else:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    assert status(Path("run"))["state"] == "done"
    assert Path("run/model/dpocli.json").is_file()
    before, after = (json.loads(Path(f"report-{when}/metrics.json").read_text()) for when in ("before", "after"))
    assert abs(before["rewards/margins"]) < 1e-5 < abs(after["rewards/margins"])


# the tables and the tree


def test_the_examples_of_rows_are_read():
    options = build_options(PrecomputeOptions, model="m", out="o", data=["d"])
    examples = table("Rows")
    assert len(examples) == 7
    for form, example in examples:
        preference = to_preference(RawRow(0, "README.md", json.loads(example.strip("`"))), options)
        assert "Name a tree." in str(preference.prompt), form
        assert "Oak." in str(preference.chosen), form
        assert "Granite." in str(preference.rejected), form


def test_the_tables_of_losses_are_the_catalogue():
    assert with_tables(README) == README, "python -m tests.readme_tables writes them"


def test_the_sum_in_yaml_is_the_one_of_the_line(tmp_path):
    (block,) = re.findall(r"```yaml\n(loss:.*?)```", README, flags=re.DOTALL)
    (tmp_path / "c.yaml").write_text(block)
    given = {"model": "m", "out": "o", "reference": "r", "config": str(tmp_path / "c.yaml")}
    (line,) = [line for line in DPOCLI_LINES if "run-sum" in line]
    assert load_options(TrainOptions, given).loss_choice() == LossChoice.of(line[line.index("--loss") + 1])


def test_the_table_of_exit_codes_is_the_enumeration():
    rows = {int(code): state for code, _, state in table("Stopping, resuming, exit codes")}
    states = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
    assert rows == {code: states.get(code, "failed") for code in ExitCode}


def test_every_name_that_gates_know_is_listed():
    assert {*ALIASES} <= {*re.findall(r"`(\w+)`", README.partition("\n#### Gates\n")[2].partition("\n## ")[0])}


def test_names_from_trl_are_recognised():
    for theirs, _ in table("Coming from TRL"):
        for name in re.findall(r"`([a-z]\w+)", theirs):
            assert name in FOREIGN_OPTIONS or name in OPTIONS, name


def test_the_file_tree_is_the_package():
    """Every module by name; an `__init__.py`, recipes and templates are described where their directory is."""
    path: list[str] = []
    listed = []
    for line in section("The files").partition("```text\n")[2].partition("```")[0].splitlines():
        name, description = line.split(maxsplit=1)
        depth = (len(line) - len(line.lstrip())) // 2
        path[depth:] = [name.rstrip("/")]
        listed.append("/".join(path) + ("/" if name.endswith("/") else ""))
        assert description
    files = [file.relative_to(ROOT) for file in (ROOT / "dpocli").rglob("*.py")]
    modules = {str(file) for file in files if file.name != "__init__.py"}
    assert len(set(listed)) == len(listed)
    files += [file.relative_to(ROOT) for kind in ("*.yaml", "*.j2") for file in (ROOT / "dpocli").rglob(kind)]
    assert set(listed) == modules | {f"{file.parent}/" for file in files}


def test_the_changelog_names_this_version_and_the_columns_beyond_the_first_design():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## [{__version__}]" in changelog
    first = "row pair_id source weight num_turns prompt_ids chosen_ids rejected_ids chosen_mask rejected_mask "
    first += "ref_chosen_token_logps ref_rejected_token_logps ref_chosen_logps ref_rejected_logps"
    sentence = changelog.partition("beyond the first design")[2].partition(".")[0]
    added = {*SMALL_COLUMNS.names, *TOKEN_COLUMNS.names} - {*first.split()}
    assert {*re.findall(r"`([a-z_]+)`", sentence)} == added


# the SLURM script

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
# Passes SIGTERM on, and makes 1 of every exit code.
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
    """A script that runs."""

    def __init__(self, process: "subprocess.Popen[bytes]", log: Path) -> None:
        self.process, self._log = process, log

    def ends(self, seconds: float = 300) -> tuple[int, str]:
        """Exit code and what it said."""
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
        self.script = SLURM_SCRIPT
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
        """What was called, less the name."""
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
    """dpocli and torchrun are the real ones; only SLURM is not."""
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
    """Also where the signal comes during the last part of one cache: the next is not begun."""
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
def test_slurm_training_goes_on_when_requeued(real_cluster, monkeypatch):
    """torchrun and its workers are real: it returns 1, and the script finds the truth in the status file."""
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
