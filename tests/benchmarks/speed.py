"""Speed of scoring and of a training step, dpocli beside TRL's DPOTrainer. Anyone can run it (Linux, no GPU):

    python tests/benchmarks/speed.py --model DIRECTORY --data dpo_en_demo.json [--repeats 3] [--ablate] [--sweep]

`--model` is a directory with SmolLM2-135M, `--data` LLaMA-Factory's 300 preference pairs. `--models 25m` leaves the
model's weights alone: a Llama of 25 million random parameters and 49,152 vocabulary entries is measured, and only the
tokenizer of `--model` is used. `--quick` is a trial of a few minutes.

What is measured, in float32 on the CPU, both tools on the same token ids and the same weights:

- precompute: log-probs of both sides of all pairs. dpocli: `reference_logps`, prompts shared, the default token budget.
  TRL: `_precompute_ref_logps` of `DPOTrainer`, at its default batch of 8 pairs, at 1, with `--sweep` also at 2 and 4, and
  at 1 with its head restricted. Pairs come in the order of the data. Writing the log-probs down counts for neither.
- train: forward and backward pass of the DPO loss over one batch of pairs, with the reference's log-probs given, without
  the optimizer. dpocli: `Gradients` of `train`'s engine. TRL: `training_step` without gradient checkpointing (its
  default has it, which is slower), in batches of 8 or 1 with accumulation, each also with its head restricted.
- live: the same step of dpocli, but a frozen copy of the model scores the batch just before, where the cache would have
  been read; and the time to read as many pairs from a cache, in full and with all bytes verified.
- ablate, only when asked for: dpocli with each of its parts switched off in turn, by patches in with_dpocli.py.

TRL's restricted head: off CUDA, TRL's head scores every position of the padded batch, prompts included; on CUDA only
those of completions. Restricted, it takes the latter way here, with its plain torch operations (see with_trl.py). That
is not a setting that its users have.

Data sets: "demo", encoded as dpocli does it, at most 1024 tokens for prompt + the longer side; "prompt-heavy", made from
them: each prompt is lengthened by those next to it, and sides are cut, until it has four times the tokens of the longer
side (speed_data.py).

Every figure is from a process of its own, contenders take turns, and a figure is the median of `--repeats`. Time starts
when model and pairs are loaded and one tiny pair has gone through; peak memory is what comes on top of what is resident
then (as in scoring_memory.py). The fraction of the FLOP floor is the time that the multiplications no method can leave
out (every distinct token once through the layers, every completion token once through the head) would take at the
rate of a large matrix product, measured in dpocli's processes just after each run, by the time taken; the floor is the
same for all contenders. The largest differences from an oracle (the model in float64, one side a row) are over the
first pairs, and beside them stands that of transformers itself in float32: nobody who computes in float32 is nearer
than that but by chance. A run fails, and writes nothing, unless all contenders give the same sums, or the same loss and
gradient norm.

What this cannot say: anything about GPUs. There TRL's head has a Triton kernel on completion positions alone, batches
of 1 leave the device idle, attention of packed rows is FlexAttention, launches and transfers matter, and the dtype is
bfloat16. Nor are these figures those of a whole run: reading, encoding, writing and the optimizer's step are left out.

The tables go to stdout and, without `--no-write`, to the end of RESULTS.md.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

from environments import (
    GRAD_TOLERANCE,
    LOSS_TOLERANCE,
    SUM_TOLERANCE,
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
from speed_task import ABLATIONS, Task

MODELS = {"25m": "25M parameters, random", "smollm2": "SmolLM2-135M"}
SETS = ("demo", "prompt-heavy")
PARTS = ("precompute", "train", "live", "ablate")
TRAIN_PAIRS = {"25m": 16, "smollm2": 8}
TRL_BATCH = 8
"""TRL's default."""


@dataclass(frozen=True)
class Contender:
    """A tool in one setting."""

    label: str
    tool: str = "dpocli"
    batch: int = 0
    restricted: bool = False
    without: str | None = None
    live: bool = False


DPOCLI = Contender("dpocli")
LIVE = Contender("dpocli, live reference", live=True)
WITHOUT = tuple(Contender(f"dpocli without {part}", without=part) for part in ABLATIONS)


def trl(batch: int, *, restricted: bool = False) -> Contender:
    return Contender(
        f"TRL, batch {batch}{', restricted head' if restricted else ''}", "trl", batch, restricted=restricted
    )


Said = dict[str, Any]
"""What one process said. See `Outcome` in measuring.py."""
Sides = tuple[list[float], list[float]]
"""Log-probs of the tokens of a pair's sides."""


@dataclass
class Case:
    """One phase of one model on one data set."""

    phase: str
    model: str
    data_set: str
    num_pairs: int
    num_tokens: int
    """Distinct ones."""
    default_batch: int
    """TRL's, at most all pairs."""
    oracle: list[Sides] = field(default_factory=list)
    """Log-probs in float64 of the first pairs."""
    plain: list[Sides] = field(default_factory=list)
    """The same as transformers makes them in float32."""
    runs: dict[Contender, list[Said]] = field(default_factory=dict)

    @property
    def title(self) -> str:
        return f"{self.phase}, {MODELS[self.model]}, {self.data_set} pairs"

    def figures(self, contender: Contender, name: str) -> list[float]:
        return [said[name] for said in self.runs[contender]]

    def seconds(self, contender: Contender) -> float:
        return median(self.figures(contender, "seconds"))

    def ratio(self, contender: Contender, base: Contender = DPOCLI) -> float:
        return self.seconds(contender) / self.seconds(base)

    def megabytes(self, contender: Contender) -> float:
        figures: list[float] = [(said["peak"] - said["before"]) / 1e6 for said in self.runs[contender]]
        return median(figures)

    def floor_share(self, contender: Contender) -> float:
        rate = median(self.figures(DPOCLI, "flops_per_second"))
        return median(self.figures(DPOCLI, "floor_flops")) / rate / self.seconds(contender)

    def token_error(self, contender: Contender) -> float | None:
        """The largest difference from the oracle, in nats; None where the tool shows sums only."""
        if not self.oracle or not all(said["logps"] for said in self.runs[contender]):
            return None
        return max(self._off_oracle(said["logps"]) for said in self.runs[contender])

    def plain_error(self) -> float:
        """That of transformers in float32."""
        return self._off_oracle(self.plain)

    def _off_oracle(self, logps: Sequence[Sides]) -> float:
        first = logps[: len(self.oracle)]
        return max(largest_difference(sides, expected) for sides, expected in zip(first, self.oracle, strict=True))

    def side_error(self, contender: Contender) -> float | None:
        """The same for summed sides."""
        if not self.oracle or not all(said["sums"] for said in self.runs[contender]):
            return None
        expected = [[sum(side) for side in sides] for sides in self.oracle]
        return max(largest_difference(said["sums"][: len(expected)], expected) for said in self.runs[contender])

    def fastest_trl(self, *, restricted: bool) -> Contender:
        """Of TRL's settings; the restricted head is none of them, but can be let in."""
        able = (each for each in self.runs if each.tool == "trl" and (restricted or not each.restricted))
        return min(able, key=self.seconds)


def contenders(phase: str, default_batch: int, options: argparse.Namespace) -> list[Contender]:
    found = [DPOCLI]
    if phase in options.only:
        found += [trl(default_batch), trl(1), trl(1, restricted=True)]
        if phase == "precompute" and options.sweep:
            found += [trl(2), trl(4)]
        if phase == "train":
            found.append(trl(default_batch, restricted=True))
    if "ablate" in options.only:
        found += WITHOUT if phase == "train" else WITHOUT[:-1]
    if phase == "train" and "live" in options.only:
        found.append(LIVE)
    return list(dict.fromkeys(found))


class Benchmark:
    """All processes of one run."""

    def __init__(self, options: argparse.Namespace, work: Path) -> None:
        self.options = options
        self.work = work
        self.pythons = interpreters(options)

    def run(self) -> list[Case]:
        options = self.options
        most = max([options.pairs, *(self.train_pairs(model) for model in options.models)])
        self._do(Task("data", rows=str(options.data), model=str(options.model), count=most, out=str(self.work)))
        cases = []
        for model in options.models:
            for data_set in options.sets:
                if {"precompute", "ablate"} & set(options.only):
                    cases.append(self._precompute(model, data_set))
                if {"train", "live", "ablate"} & set(options.only):
                    cases.append(self._train(model, data_set))
        return cases

    def train_pairs(self, model: str) -> int:
        return self.options.train_pairs or TRAIN_PAIRS[model]

    def facts(self, data_set: str) -> str:
        """What the pairs of `precompute` are like."""
        pairs = _lengths(self.work / f"{data_set}.json", self.options.pairs)
        unique = sum(map(sum, pairs))
        padded = sum(
            2 * len(batch) * max(prompt + max(sides) for prompt, *sides in batch)
            for batch in (pairs[start : start + TRL_BATCH] for start in range(0, len(pairs), TRL_BATCH))
        )
        prompt, chosen, rejected = (median(part) for part in zip(*pairs, strict=True))
        return (
            f"{data_set}: {len(pairs)} pairs, {unique:,} distinct tokens (median: prompt {prompt:,.0f}, chosen {chosen:,.0f}, "
            f"rejected {rejected:,.0f}); padded to batches of {TRL_BATCH}, {padded / unique:.1f} times as many"
        )

    def _precompute(self, model: str, data_set: str) -> Case:
        file = self.work / f"{data_set}.json"
        count = min(self.options.oracle_pairs, self.options.pairs)
        case = self._case("precompute", model, data_set, file, self.options.pairs)
        if count:
            case.oracle, case.plain = (
                self._do(Task(what, model=self._directory(model), pairs=str(file), count=count))["logps"]
                for what in ("oracle", "plain")
            )
        return self._measured(case, file)

    def _train(self, model: str, data_set: str) -> Case:
        file, count = self.work / f"{data_set}-{model}-train.json", self.train_pairs(model)
        source = str(self.work / f"{data_set}.json")
        self._do(Task("reference", model=self._directory(model), pairs=source, count=count, out=str(file)))
        return self._measured(self._case("train", model, data_set, file, count), file)

    def _case(self, phase: str, model: str, data_set: str, file: Path, count: int) -> Case:
        num_tokens = sum(map(sum, _lengths(file, count)))
        batch = min(TRL_BATCH, count) if phase == "train" else TRL_BATCH
        return Case(phase, model, data_set, count, num_tokens, batch)

    def _measured(self, case: Case, file: Path) -> Case:
        todo = contenders(case.phase, case.default_batch, self.options)
        case.runs = {contender: [] for contender in todo}
        for _ in range(self.options.repeats):
            for contender in todo:
                task = Task(
                    case.phase,
                    contender.tool,
                    model=self._directory(case.model),
                    pairs=str(file),
                    count=case.num_pairs,
                    batch=contender.batch,
                    restricted=contender.restricted,
                    without=contender.without,
                    live=contender.live,
                    cache=str(self.work / "cache") if contender.tool == "dpocli" and case.phase == "train" else "",
                )
                said = self._do(task, f"{case.title}: {contender.label}")
                say(f"{case.title}: {contender.label}: {said['seconds']:,.2f} s")
                case.runs[contender].append(said)
        check(case)
        say(case_table(case))
        return case

    def _directory(self, model: str) -> str:
        return str(self.work / model if model == "25m" else self.options.model.absolute())

    def _do(self, task: Task, what: str | None = None) -> Said:
        return in_own_process(
            self.pythons[task.tool], task.tool, what or task.what, "speed_child.py", task.as_argument()
        )


def _lengths(file: Path, count: int) -> list[list[int]]:
    """Tokens of prompt, chosen and rejected side."""
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    return [[len(pair[name]) for name in names] for pair in json.loads(file.read_text())[:count]]


def check(case: Case) -> None:
    """Exits unless every contender computed what dpocli did in its first run."""
    baseline = case.runs[DPOCLI][0]
    for contender, runs in case.runs.items():
        for said in runs:
            if case.phase == "precompute":
                off = largest_difference(said["sums"], baseline["sums"])
                agree, found = off <= SUM_TOLERANCE, f"sums differ by {off:.2g} nats"
            else:
                loss = abs(said["loss"] - baseline["loss"])
                norm = abs(said["grad_norm"] / baseline["grad_norm"] - 1)
                agree = loss <= LOSS_TOLERANCE and norm <= GRAD_TOLERANCE
                found = f"losses differ by {loss:.2g}, gradient norms by {norm:.2g} of theirs"
            if not agree:
                sys.exit(f"{case.title}: {contender.label} does not give what dpocli gives ({found}); no result.")


def case_table(case: Case) -> str:
    header = [
        f"{case.num_pairs} pairs, {case.num_tokens:,} distinct tokens",
        "seconds",
        "ms per pair",
        "µs per distinct token",
        "time × dpocli",
        "peak MB",
        "peak × dpocli",
        "of the FLOP floor",
    ]
    errors = case.phase == "precompute" and bool(case.oracle)
    if errors:
        header += ["off the oracle, per token", "per summed side"]
    rows = []
    for contender in case.runs:
        seconds, megabytes = case.seconds(contender), case.megabytes(contender)
        cells = [
            contender.label,
            spread(case.figures(contender, "seconds"), 2),
            f"{1e3 * seconds / case.num_pairs:,.0f}",
            f"{1e6 * seconds / case.num_tokens:,.0f}",
            f"{case.ratio(contender):.2f}",
            f"{megabytes:,.0f}",
            f"{megabytes / case.megabytes(DPOCLI):.2f}",
            f"{case.floor_share(contender):.2f}",
        ]
        if errors:
            cells += [_error(case.token_error(contender)), _error(case.side_error(contender))]
        rows.append(cells)
    return markdown_table(header, rows)


def _error(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


RATIO_TARGETS: dict[tuple[str, str, str], tuple[float | None, float | None]] = {
    ("precompute", "smollm2", "demo"): (4, 2.3),
    ("precompute", "smollm2", "prompt-heavy"): (4, 2.9),
    ("precompute", "25m", "demo"): (8.5, 5.2),
    ("precompute", "25m", "prompt-heavy"): (9, 6),
    ("train", "25m", "demo"): (9.5, 3.2),
    ("train", "25m", "prompt-heavy"): (10.5, 2.6),
    ("train", "smollm2", "demo"): (3, None),
    ("train", "smollm2", "prompt-heavy"): (4, None),
}
"""By phase, model and data set. Precompute: against TRL's default batch, and its fastest setting. Train: against TRL's
default batch, without and with the restricted head."""


def targets_table(cases: Sequence[Case]) -> str:
    rows = [row for case in cases for row in _target_rows(case)]
    return markdown_table(["", "target", "measured", "kept?"], rows)


def _target_rows(case: Case) -> list[list[str]]:
    default, restricted = trl(case.default_batch), trl(case.default_batch, restricted=True)
    rows = []

    def row(name: str, measured: float, target: float | None, form: str, *, at_most: bool = False) -> None:
        kept = "" if target is None else "kept" if (measured <= target if at_most else measured >= target) else "missed"
        limit = "" if target is None else f"{'at most ' if at_most else ''}{form.format(target)}"
        rows.append([f"{case.title}: {name}", limit, form.format(measured), kept])

    if default in case.runs:
        to_default, to_other = RATIO_TARGETS[case.phase, case.model, case.data_set]
        row(f"time of {default.label} / dpocli", case.ratio(default), to_default, "{:.2f}x")
        fastest, any_head = case.fastest_trl(restricted=False), case.fastest_trl(restricted=True)
        at_best = to_other if case.phase == "precompute" else None
        row(f"time of TRL at its best ({fastest.label}) / dpocli", case.ratio(fastest), at_best, "{:.2f}x")
        if restricted in case.runs:
            row(f"time of {restricted.label} / dpocli", case.ratio(restricted), to_other, "{:.2f}x")
        row(f"time of the fastest TRL with any head ({any_head.label}) / dpocli", case.ratio(any_head), None, "{:.2f}x")
        share = case.megabytes(DPOCLI) / case.megabytes(default)
        row(f"peak memory of dpocli / {default.label}", share, 0.25, "{:.2f}", at_most=True)
    row("fraction of the FLOP floor", case.floor_share(DPOCLI), 0.75, "{:.3f}")
    if (error := case.token_error(DPOCLI)) is not None:
        row("log-probs off the float64 oracle, per token", error, 1e-5, "{:.1e}", at_most=True)
        row("the same of transformers itself in float32", case.plain_error(), None, "{:.1e}")
    if LIVE in case.runs:
        row("time with a live reference / with the cache", case.ratio(LIVE), 1.3, "{:.2f}x")
    if case.phase == "train" and case.data_set == "demo":
        cost = median(case.figures(DPOCLI, "cache_seconds")) / case.seconds(DPOCLI)
        row("reading the pairs from the cache / the step", cost, 0.01, "{:.2%}", at_most=True)
    return rows


def report(cases: Sequence[Case], options: argparse.Namespace, facts: Sequence[str]) -> str:
    """A section of RESULTS.md."""
    versions = versions_line(said["versions"] for case in cases for runs in case.runs.values() for said in runs)
    rate = median(rate for case in cases for rate in case.figures(DPOCLI, "flops_per_second"))
    tables = "\n".join(f"\n### {case.title[0].upper()}{case.title[1:]}\n\n{case_table(case)}\n" for case in cases)
    return f"""
## Speed of scoring and training, {date.today().isoformat()}

`{_command(options)}`

- Machine: {machine()}.
- Versions: {versions}.
- Float32 on the CPU; a large matrix product runs at {rate / 1e9:,.0f} GFLOP/s there (median).
- Median of {options.repeats} processes (smallest to largest), contenders in turn.
- Data: {"; ".join(facts)}.
- Tolerances, all kept: {SUM_TOLERANCE} nats per summed side, {LOSS_TOLERANCE} of the loss, {GRAD_TOLERANCE} of the gradient norm (relative).

{targets_table(cases)}
{tables}"""


def _command(options: argparse.Namespace) -> str:
    """The options that decide figures, without this machine's paths."""
    words = ["python tests/benchmarks/speed.py --model SMOLLM2_DIRECTORY --data dpo_en_demo.json"]
    words += [f"--pairs {options.pairs} --repeats {options.repeats}"]
    words += [f"--train-pairs {options.train_pairs}"] if options.train_pairs else []
    words += [f"--{name} {' '.join(getattr(options, name))}" for name in ("models", "sets", "only")]
    words += ["--sweep"] if options.sweep else []
    return " ".join(words)


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", type=Path, required=True, help="directory of SmolLM2-135M, whose tokenizer encodes all pairs")
    add("--data", type=Path, required=True, help="the preference rows")
    add("--models", nargs="+", choices=MODELS, default=list(MODELS), help="which models")
    add("--sets", nargs="+", choices=SETS, default=list(SETS), help="which data sets")
    add("--only", nargs="+", choices=PARTS, default=list(PARTS[:3]), help="which parts (default: all but ablate)")
    add("--ablate", action="store_true", help="also dpocli with each part switched off (the same as ablate in --only)")
    add("--sweep", action="store_true", help="also TRL's precompute in batches of 2 and 4")
    add("--repeats", type=int, default=3, help="processes per figure")
    add("--pairs", type=int, default=48, help="pairs to precompute")
    by_model = ", ".join(f"{count} with {model}" for model, count in TRAIN_PAIRS.items())
    add("--train-pairs", type=int, help=f"pairs of the training step (default: {by_model})")
    add("--oracle-pairs", type=int, default=4, help="pairs to compare with the float64 oracle (0: none)")
    add(
        "--quick", action="store_true", help="a trial: the random model, 8 pairs, 1 process per figure, nothing written"
    )
    add("--no-write", action="store_true", help="leave RESULTS.md alone")
    add_environment_options(parser)
    options = parser.parse_args()
    options.only = list(dict.fromkeys([*options.only, *(["ablate"] if options.ablate else [])]))
    if options.quick:
        options.models, options.pairs, options.train_pairs, options.repeats = ["25m"], 8, 8, 1
        options.no_write = True
    odd = options.train_pairs and options.train_pairs > TRL_BATCH and options.train_pairs % TRL_BATCH
    if odd or min(options.pairs, options.repeats) < 1 or (options.train_pairs or 1) < 1:
        parser.error(f"--train-pairs: at most {TRL_BATCH}, or a multiple of it, since TRL weights batches alike")
    return options


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as directory:
        benchmark = Benchmark(options, Path(directory))
        cases = benchmark.run()
        section = report(cases, options, [benchmark.facts(data_set) for data_set in options.sets])
    print(section)
    if not options.no_write:
        append_to_results(section)


if __name__ == "__main__":
    main()
