"""Peak memory of scoring, dpocli beside TRL on the same batch. Anyone can run it (Linux, no GPU, about 9 GB free):

    python tests/benchmarks/scoring_memory.py [--repeats 3] [--venv DIRECTORY]

The batch: 8 pairs of random tokens, rows of 300 to 700 tokens, one Llama of 25 million parameters with 49,152
vocabulary entries, tied embeddings, float32, on the CPU. Two things are measured:

- scoring: log-probs of both sides without gradients. dpocli: `PairScorer`; TRL: `_precompute_ref_logps` of `DPOTrainer`,
  as its constructor runs it under `precompute_ref_log_probs=True`.
- training step: forward and backward pass of the DPO loss against given reference log-probs, no optimizer state.
  dpocli: `PairScorer` in `train`'s engine; TRL: the first `training_step` of `DPOTrainer.train()`.

TRL runs at its defaults but for float32 (its own is bfloat16 autocast) and gradient checkpointing, which its defaults
switch on: it is measured without and with. It gets an environment of its own (`--venv`, by default in the user's cache
directory), made at the first run, with the packages that requirements.txt pins.

Every figure is from a process of its own, and contenders take turns. After loading and a warm-up on one tiny pair, a
process writes down its resident memory (VmRSS), sets the kernel's high-water mark back (/proc/self/clear_refs), scores,
and reads the mark (VmHWM): the figure is the difference. The run fails, and writes nothing, unless both tools give the
same summed log-probs, loss and gradient norm.

The table goes to stdout and to the end of RESULTS.md.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import venv
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
REQUIREMENTS = ROOT / "requirements.txt"
RESULTS = HERE / "RESULTS.md"
TRL_VERSION = "1.16.0"

SUM_TOLERANCE = 0.01
"""Nats per side. TRL sums in float32, whose last digit stands for 0.0005 nats at sums of 4000."""
LOSS_TOLERANCE = 1e-3
GRAD_TOLERANCE = 1e-4
"""Relative."""


@dataclass(frozen=True)
class Contender:
    """A tool in one setting."""

    label: str
    tool: str
    flags: tuple[str, ...] = ()
    phases: tuple[str, ...] = ("scoring", "training")


CONTENDERS = (
    Contender("dpocli", "dpocli"),
    Contender(f"TRL {TRL_VERSION}", "trl"),
    Contender("dpocli, gradient checkpointing", "dpocli", ("checkpointing",), ("training",)),
    Contender(f"TRL {TRL_VERSION}, gradient checkpointing (its default)", "trl", ("checkpointing",), ("training",)),
    Contender("dpocli, cut by its default token budget", "dpocli", ("budget",)),
)


@dataclass(frozen=True)
class Run:
    """What one process said. See `Outcome` in scoring_memory_child.py."""

    megabytes: float
    sums: list[list[float]]
    loss: float | None
    grad_norm: float | None
    versions: dict[str, str]


Runs = dict[tuple[Contender, str], list[Run]]


def trl_python(directory: Path) -> Path:
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


def measure(python: Path, contender: Contender, phase: str) -> Run:
    """One process, from start to end."""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    environment["PYTHONPATH"] = str(ROOT) if contender.tool == "dpocli" else ""
    command = [str(python), str(HERE / "scoring_memory_child.py"), contender.tool, phase, *contender.flags]
    process = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if process.returncode:
        sys.exit(f"{contender.label}, {phase}: exit status {process.returncode}\n{process.stderr[-4000:]}")
    said = json.loads(process.stdout.splitlines()[-1])
    megabytes = (said["peak"] - said["before"]) / 1e6
    print(f"{contender.label}, {phase}: {megabytes:,.0f} MB", file=sys.stderr)
    return Run(megabytes, said["sums"], said["loss"], said["grad_norm"], said["versions"])


def largest_sum_difference(runs: Sequence[Run], baseline: Run) -> float:
    """Nats, over runs, pairs and sides."""
    return max(
        abs(value - expected)
        for run in runs
        for row, expected_row in zip(run.sums, baseline.sums, strict=True)
        for value, expected in zip(row, expected_row, strict=True)
    )


def largest_training_differences(runs: Sequence[Run], baseline: Run) -> tuple[float, float]:
    """Of the loss, and of the gradient's norm (relative)."""
    assert baseline.loss is not None
    assert baseline.grad_norm is not None
    losses = [abs(run.loss - baseline.loss) for run in runs if run.loss is not None]
    norms = [abs(run.grad_norm / baseline.grad_norm - 1) for run in runs if run.grad_norm is not None]
    return max(losses), max(norms)


def check(runs: Runs) -> None:
    """Exits unless every contender computed what the first one did."""
    for (contender, phase), its_runs in runs.items():
        baseline = runs[CONTENDERS[0], phase][0]
        if phase == "scoring":
            agree = largest_sum_difference(its_runs, baseline) <= SUM_TOLERANCE
        else:
            loss, norm = largest_training_differences(its_runs, baseline)
            agree = loss <= LOSS_TOLERANCE and norm <= GRAD_TOLERANCE
        if not agree:
            sys.exit(f"{contender.label}, {phase}: the numbers are not those of {CONTENDERS[0].label}; no result.")


def table(runs: Runs) -> str:
    """Markdown."""
    lines = [
        "| contender | scoring, peak MB | × dpocli | training step, peak MB | × dpocli | sums differ by | loss, gradient norm differ by |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for contender in CONTENDERS:
        cells = [contender.label]
        for phase in ("scoring", "training"):
            cells += _memory_cells(runs, contender, phase)
        cells += _difference_cells(runs, contender)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory_cells(runs: Runs, contender: Contender, phase: str) -> list[str]:
    if phase not in contender.phases:
        return ["", ""]
    figures = [run.megabytes for run in runs[contender, phase]]
    ratio = median(figures) / median(run.megabytes for run in runs[CONTENDERS[0], phase])
    return [f"{median(figures):,.0f} ({min(figures):,.0f} to {max(figures):,.0f})", f"{ratio:.2f}"]


def _difference_cells(runs: Runs, contender: Contender) -> list[str]:
    if contender == CONTENDERS[0]:
        return ["", ""]
    scored = runs.get((contender, "scoring"))
    sums = f"{largest_sum_difference(scored, runs[CONTENDERS[0], 'scoring'][0]):.1e} nats" if scored else ""
    loss, norm = largest_training_differences(runs[contender, "training"], runs[CONTENDERS[0], "training"][0])
    return [sums, f"{loss:.0e}, {norm:.0e}"]


def machine() -> str:
    """Cores, memory and CPU, without a name."""
    cpu = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    memory = re.search(r"^MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert memory
    cores = len(os.sched_getaffinity(0))
    return f"{cores} cores, {int(memory[1]) / 1e6:.0f} GB of memory, {cpu[1] if cpu else 'CPU not named'}"


def report(runs: Runs, repeats: int) -> str:
    """A section of RESULTS.md."""
    versions: dict[str, str] = {}
    for its_runs in runs.values():
        for run in its_runs:
            versions |= run.versions
    return f"""
## Peak memory of scoring, {date.today().isoformat()}

`python tests/benchmarks/scoring_memory.py --repeats {repeats}`

- Machine: {machine()}.
- Versions: {", ".join(f"{name} {number}" for name, number in versions.items())}.
- MB = 10⁶ bytes above the resident memory just before; median of {repeats} processes (smallest to largest).
- Tolerances, all kept: {SUM_TOLERANCE} nats per summed side, {LOSS_TOLERANCE} of the loss, {GRAD_TOLERANCE} of the gradient norm (relative).

{table(runs)}
"""


def main() -> None:
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes per figure")
    parser.add_argument("--venv", type=Path, default=cache / "dpocli" / f"trl-{TRL_VERSION}", help="TRL's environment")
    options = parser.parse_args()
    pythons = {"dpocli": Path(sys.executable), "trl": trl_python(options.venv.absolute())}
    runs: Runs = {(contender, phase): [] for contender in CONTENDERS for phase in contender.phases}
    for _ in range(options.repeats):
        for contender, phase in runs:
            runs[contender, phase].append(measure(pythons[contender.tool], contender, phase))
    check(runs)
    section = report(runs, options.repeats)
    print(section)
    with RESULTS.open("a") as file:
        file.write(section if file.tell() else f"# Results of the benchmarks\n{section}")


if __name__ == "__main__":
    main()
