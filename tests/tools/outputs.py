"""Record what dpocli writes and says, and compare two recordings: a refactor that changes no output shows no difference.

    python -m tests.tools.outputs record BEFORE --package path/to/the/old/checkout
    python -m tests.tools.outputs record AFTER
    python -m tests.tools.outputs compare BEFORE AFTER

`record` runs the dpocli of `--package` (default: the checkout of this file) on the sample data, each command line in a
process of its own with one thread, and keeps loss curves, digests of caches and models, reports, help, output and the
messages for bad input. Timings, hosts, versions and absolute paths are left out. Both recordings must come from the
same machine and library versions, since log-probs are compared to the last bit. All takes three to six minutes;
`--only precompute-messages train-dpo` records these cases alone (a case needs those that wrote what it reads).
"""

import argparse
import difflib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.tools.outputs_cases import CASES, Case, make_bad_inputs, make_inputs
from tests.tools.outputs_files import plain_json, plain_text, recorded

os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"  # where bad files are made
ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600
FAR_FUTURE = 4e9
BAD_INPUT = "bad-input"
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node")
TREES = ("ref*", "shards", "run-*", "report-*")
"""Directories that the commands wrote."""

BAD_INPUT_LOOP = """
import contextlib, io, json, os, shutil, sys
from dpocli.cli import run_command_line
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = int(run_command_line(line))
    left = sorted(os.listdir("out")) if os.path.isdir("out") else []
    print(json.dumps([code, out.getvalue(), err.getvalue(), left]), flush=True)
    shutil.rmtree("out", ignore_errors=True)
"""
"""In one process, since most of a refused command line is the import of the libraries."""


@dataclass(frozen=True)
class Recording:
    """A recording that is being made.

    Args:
        into: where the plain files go.
        work: the working directory of the commands.
        package: the directory that holds the `dpocli` to be run.
    """

    into: Path
    work: Path
    package: Path

    @property
    def places(self) -> dict[str, str]:
        """Absolute paths that may stand in outputs."""
        return {str(self.work): "<work>", str(self.package): "<package>", sys.prefix: "<prefix>"}

    def environment(self, columns: int) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DPOCLI", "SLURM", "HF_"))}
        fixed = {
            "PYTHONPATH": str(self.package),
            "OMP_NUM_THREADS": "1",
            "COLUMNS": str(columns),
            "HF_HUB_OFFLINE": "1",
        }
        return kept | fixed | {"TERM": "dumb", "NO_COLOR": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONHASHSEED": "0"}

    def python(self, *arguments: str, columns: int = 160, stdin: str = "") -> subprocess.CompletedProcess[str]:
        environment = self.environment(columns)
        command = [sys.executable, *arguments]
        options: dict[str, Any] = {"cwd": self.work, "env": environment, "input": stdin, "timeout": PATIENCE}
        return subprocess.run(command, capture_output=True, text=True, check=False, **options)

    def write(self, name: str, content: Any) -> None:
        path = self.into / name
        path.parent.mkdir(parents=True, exist_ok=True)
        is_text = isinstance(content, str)
        path.write_text(content if is_text else json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def run(self, case: Case) -> None:
        """Run a command line and keep its exit code, stdout and stderr."""
        launcher = (*TORCHRUN, str(case.processes), "-m") if case.processes > 1 else ()
        columns = int(case.name.split("-")[1]) if case.name.startswith("help-") else 160
        if case.stop_file:
            stop = self.work / case.stop_file
            stop.parent.mkdir(parents=True, exist_ok=True)
            stop.touch()
            os.utime(stop, (FAR_FUTURE, FAR_FUTURE))
        done = self.python("-m", *launcher, "dpocli", *shlex.split(case.line), columns=columns)
        if case.stop_file:
            stop.unlink()
        said = f"$ dpocli {case.line}\nexit {done.returncode}\n--- stderr\n{done.stderr}"
        if "--json" in case.line and done.stdout:
            self.write(f"said/{case.name}.stdout.json", plain_json(json.loads(done.stdout), self.places))
        else:
            said += f"--- stdout\n{done.stdout}"
        self.write(f"said/{case.name}.txt", plain_text(said, self.places))

    def run_bad_inputs(self) -> None:
        """Run what must be refused; exit code, stdout and stderr of each line go into one file."""
        lines = make_bad_inputs(self.work)
        done = self.python("-c", BAD_INPUT_LOOP, stdin=json.dumps(lines))
        results = [json.loads(line) for line in done.stdout.splitlines()]
        if len(results) < len(lines):
            raise SystemExit(f"The loop over bad input ended at {lines[len(results)]}:\n{done.stderr[-2000:]}")
        kept = {}
        for line, (code, out, err, left) in zip(lines, results, strict=True):
            said = {"stdout": plain_text(out, self.places), "stderr": plain_text(err, self.places)}
            kept[" ".join(line)] = {"exit code": code, **said, "left in --out": left}
        self.write("bad_input.json", kept)

    def keep_files(self) -> None:
        """Keep every file that the commands wrote, in plain form."""
        for directory in (path for pattern in TREES for path in sorted(self.work.glob(pattern))):
            for path in (path for path in sorted(directory.rglob("*")) if path.is_file()):
                for suffix, content in recorded(path, self.places):
                    self.write(f"files/{path.relative_to(self.work)}{suffix}", content)


def record(into: Path, package: Path, only: list[str]) -> None:
    """Record the dpocli of `package` into a new directory; `only` are beginnings of names of cases, empty for all."""
    if into.exists() and any(into.iterdir()):
        raise SystemExit(f"{into} is not empty. Name a new directory, or remove it.")
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="outputs-") as directory:
        recording = Recording(into.resolve(), Path(directory).resolve(), package.resolve())
        make_inputs(recording.work, ROOT / "sample_data")
        found = recording.python("-c", "import dpocli; print(dpocli.__file__)")
        if not found.stdout.startswith(str(recording.package)):
            raise SystemExit(f"{package} holds no dpocli: found {found.stdout.strip() or found.stderr}")
        cases = [case for case in CASES if not only or case.name.startswith(tuple(only))]
        for case in cases:
            recording.run(case)
        recording.keep_files()
        if not only or BAD_INPUT in only:
            recording.run_bad_inputs()
    num_files = sum(path.is_file() for path in into.rglob("*"))
    print(f"{into}: {num_files} files of {len(cases)} commands in {time.monotonic() - began:.0f} s")


def compare(old: Path, new: Path) -> int:
    """Print each difference between two recordings; how many there are."""
    names = sorted({str(path.relative_to(root)) for root in (old, new) for path in root.rglob("*") if path.is_file()})
    if not names:
        raise SystemExit(f"{old} and {new} hold no recording.")
    count = 0
    for name in names:
        for difference in differences(old / name, new / name, name):
            print(difference)
            count += 1
    print(f"{count} differences in {len(names)} files")
    return count


def differences(old: Path, new: Path, name: str) -> Iterator[str]:
    """What a file says otherwise: the keys of JSON one by one, a unified diff of text."""
    for path, only in ((old, "new"), (new, "old")):
        if not path.exists():
            yield f"{name}: only in the {only} recording"
            return
    before, after = old.read_text(), new.read_text()
    if before == after:
        return
    if not name.endswith(".json"):
        yield "\n".join(
            difflib.unified_diff(before.splitlines(), after.splitlines(), f"old/{name}", f"new/{name}", lineterm="")
        )
        return
    values, others = (dict(flat(json.loads(text))) for text in (before, after))
    for key in [*values, *(key for key in others if key not in values)]:
        value, other = (
            json.dumps(side[key], ensure_ascii=False) if key in side else "(absent)" for side in (values, others)
        )
        if value != other:
            yield f"{name}: {key}: {value} -> {other}"
    if list(values) != list(others) and set(values) == set(others):
        yield f"{name}: the same keys in another order"


def flat(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Each value with the path of keys that leads to it; empty containers are values."""
    if isinstance(value, dict | list) and value:
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in items:
            yield from flat(item, f"{key} > {name}" if key else str(name))
    else:
        yield key, value


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    recorder = commands.add_parser("record", help="run dpocli and write plain files into DIR")
    recorder.add_argument("into", metavar="DIR", type=Path)
    recorder.add_argument("--package", type=Path, default=ROOT, help="directory that holds the dpocli to run")
    recorder.add_argument("--only", metavar="NAME", nargs="+", default=[], help=f"cases that begin so, or {BAD_INPUT}")
    comparer = commands.add_parser("compare", help="print each difference; exit 1 if there is any")
    comparer.add_argument("old", metavar="A", type=Path)
    comparer.add_argument("new", metavar="B", type=Path)
    arguments = parser.parse_args()
    if arguments.command == "record":
        record(arguments.into, arguments.package, arguments.only)
    else:
        sys.exit(compare(arguments.old, arguments.new) > 0)


if __name__ == "__main__":
    main()
