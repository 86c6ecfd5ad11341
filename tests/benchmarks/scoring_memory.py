"""Peak memory of scoring, dpocli beside TRL on the same batch. Anyone can run it (Linux, no GPU, about 9 GB free):

    python tests/benchmarks/scoring_memory.py [--repeats 3] [--venv DIRECTORY]

The batch: 8 pairs of random tokens, rows of 300 to 700 tokens, one Llama of 25 million parameters with 49,152
vocabulary entries, tied embeddings, float32, on the CPU. Two things are measured:

- scoring: log-probs of both sides without gradients. dpocli: `PairScorer` as `precompute` calls it, all pairs in one
  row; TRL: `_precompute_ref_logps` of `DPOTrainer`, as its constructor runs it under `precompute_ref_log_probs=True`.
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
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import median

from environments import (
    GRAD_TOLERANCE,
    LOSS_TOLERANCE,
    SUM_TOLERANCE,
    TRL_VERSION,
    add_environment_options,
    append_to_results,
    in_own_process,
    interpreters,
    largest_difference,
    machine,
    markdown_table,
    say,
    spread,
    versions_line,
)


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
    """What one process said. See `Outcome` in measuring.py."""

    megabytes: float
    sums: list[list[float]]
    loss: float | None
    grad_norm: float | None
    versions: dict[str, str]


Runs = dict[tuple[Contender, str], list[Run]]


def measure(python: Path, contender: Contender, phase: str) -> Run:
    """One process, from start to end."""
    what = f"{contender.label}, {phase}"
    said = in_own_process(
        python, contender.tool, what, "scoring_memory_child.py", contender.tool, phase, *contender.flags
    )
    megabytes = (said["peak"] - said["before"]) / 1e6
    say(f"{what}: {megabytes:,.0f} MB")
    return Run(megabytes, said["sums"], said["loss"], said["grad_norm"], said["versions"])


def largest_sum_difference(runs: Sequence[Run], baseline: Run) -> float:
    """Nats, over runs, pairs and sides."""
    return max(largest_difference(run.sums, baseline.sums) for run in runs)


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
    header = [
        "contender",
        "scoring, peak MB",
        "× dpocli",
        "training step, peak MB",
        "× dpocli",
        "sums differ by",
        "loss, gradient norm differ by",
    ]
    rows = []
    for contender in CONTENDERS:
        cells = [contender.label]
        for phase in ("scoring", "training"):
            cells += _memory_cells(runs, contender, phase)
        rows.append(cells + _difference_cells(runs, contender))
    return markdown_table(header, rows)


def _memory_cells(runs: Runs, contender: Contender, phase: str) -> list[str]:
    if phase not in contender.phases:
        return ["", ""]
    figures = [run.megabytes for run in runs[contender, phase]]
    ratio = median(figures) / median(run.megabytes for run in runs[CONTENDERS[0], phase])
    return [spread(figures), f"{ratio:.2f}"]


def _difference_cells(runs: Runs, contender: Contender) -> list[str]:
    if contender == CONTENDERS[0]:
        return ["", ""]
    scored = runs.get((contender, "scoring"))
    sums = f"{largest_sum_difference(scored, runs[CONTENDERS[0], 'scoring'][0]):.1e} nats" if scored else ""
    loss, norm = largest_training_differences(runs[contender, "training"], runs[CONTENDERS[0], "training"][0])
    return [sums, f"{loss:.0e}, {norm:.0e}"]


def report(runs: Runs, repeats: int) -> str:
    """A section of RESULTS.md."""
    versions = versions_line(run.versions for its_runs in runs.values() for run in its_runs)
    return f"""
## Peak memory of scoring, {date.today().isoformat()}

`python tests/benchmarks/scoring_memory.py --repeats {repeats}`

- Machine: {machine()}.
- Versions: {versions}.
- MB = 10⁶ bytes above the resident memory just before; median of {repeats} processes (smallest to largest).
- Tolerances, all kept: {SUM_TOLERANCE} nats per summed side, {LOSS_TOLERANCE} of the loss, {GRAD_TOLERANCE} of the gradient norm (relative).

{table(runs)}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="processes per figure")
    add_environment_options(parser)
    options = parser.parse_args()
    pythons = interpreters(options)
    runs: Runs = {(contender, phase): [] for contender in CONTENDERS for phase in contender.phases}
    for _ in range(options.repeats):
        for contender, phase in runs:
            runs[contender, phase].append(measure(pythons[contender.tool], contender, phase))
    check(runs)
    section = report(runs, options.repeats)
    print(section)
    append_to_results(section)


if __name__ == "__main__":
    main()
