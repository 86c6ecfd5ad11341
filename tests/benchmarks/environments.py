"""What the commands of the benchmarks share: TRL's environment, processes of their own, the machine, RESULTS.md.

Needs nothing but Python, so that the process that starts the others holds no memory and no threads of its own.
"""

import json
import os
import re
import subprocess
import sys
import venv
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = ROOT / "requirements.txt"
RESULTS = HERE / "RESULTS.md"
TITLE = "# Results of the benchmarks\n"
LAST_HEADING = "## What is missed, and why"
TRL_VERSION = "1.16.0"

SUM_TOLERANCE = 0.01
"""Nats per side. TRL sums in float32, whose last digit stands for 0.0005 nats at sums of 4000."""
LOSS_TOLERANCE = 1e-3
GRAD_TOLERANCE = 1e-4
"""Relative."""


def add_environment_options(parser: ArgumentParser) -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser.add_argument("--venv", type=Path, default=cache / "dpocli" / f"trl-{TRL_VERSION}", help="TRL's environment")
    parser.add_argument("--trl-python", type=Path, help="interpreter of an environment that has TRL already")


def interpreters(options: Namespace) -> dict[str, Path]:
    """The interpreter of each tool. TRL's environment is made where it is missing."""
    ready: Path | None = options.trl_python
    return {
        "dpocli": Path(sys.executable),
        "trl": ready.absolute() if ready else _trl_python(options.venv.absolute()),
    }


def _trl_python(directory: Path) -> Path:
    """The interpreter of the environment that holds TRL, made or completed where needed."""
    python = directory / "bin" / "python"
    probe = "import accelerate, torch, importlib.metadata as m; print(m.version('trl'))"
    if python.exists():
        answer = subprocess.run([python, "-c", probe], capture_output=True, text=True, check=False)
        if answer.stdout.strip() == TRL_VERSION:
            return python
    print(f"Installing TRL {TRL_VERSION} in {directory}", file=sys.stderr)
    venv.create(directory, with_pip=True)
    torch = re.search(r"^torch==\S+", REQUIREMENTS.read_text(), re.MULTILINE)
    assert torch, "requirements.txt pins torch"
    # torch first and by itself, so that an index with a smaller CPU build can serve it.
    for packages in ([torch[0]], [f"trl=={TRL_VERSION}", "accelerate"]):
        pip = [str(python), "-m", "pip", "install", "--quiet", "--constraint", str(REQUIREMENTS)]
        subprocess.run([*pip, *packages], check=True, stdout=sys.stderr)
    return python


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def in_own_process(python: Path, tool: str, what: str, script: str, *arguments: str) -> dict[str, Any]:
    """The JSON object in the last line that a script of this directory prints; exits where the script fails."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    environment["PYTHONPATH"] = str(ROOT) if tool == "dpocli" else ""
    command = [str(python), str(HERE / script), *arguments]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        sys.exit(f"{what}: exit status {process.returncode}\n{process.stderr[-4000:]}")
    said: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])
    return said


def largest_difference(sums: Iterable[Sequence[float]], expected: Iterable[Sequence[float]]) -> float:
    """Over all numbers of rows of numbers."""
    rows = zip(sums, expected, strict=True)
    return max(abs(value - other) for row, others in rows for value, other in zip(row, others, strict=True))


def spread(figures: Sequence[float], digits: int = 0) -> str:
    """Median (smallest to largest)."""
    return f"{median(figures):,.{digits}f} ({min(figures):,.{digits}f} to {max(figures):,.{digits}f})"


def markdown_table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """The first column is text, the others are figures."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def machine() -> str:
    """Cores, memory and CPU, without a name."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert memory
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {int(memory[1]) / 1e6:.0f} GB of memory, {cpu[1] if cpu else 'CPU not named'}"


def versions_line(found: Iterable[Mapping[str, str]]) -> str:
    """Versions of all packages that some process used."""
    versions: dict[str, str] = {}
    for some in found:
        versions |= some
    return ", ".join(f"{name} {number}" for name, number in versions.items())


def append_to_results(section: str) -> None:
    """At the end, but before what is said about all of it."""
    before, heading, last = (RESULTS.read_text() if RESULTS.exists() else TITLE).partition(LAST_HEADING)
    RESULTS.write_text(f"{before.rstrip()}\n{section.rstrip()}\n" + (f"\n{heading}{last}" if heading else ""))
