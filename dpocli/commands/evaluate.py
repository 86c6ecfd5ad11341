"""`dpocli evaluate`: is a model better than where it started, how sure are we, and on what?"""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.cache.join import open_second
from dpocli.cache.reader import PairStore
from dpocli.cache.view import PairView
from dpocli.commands.example_pairs import remove_report, showcase, write_page
from dpocli.commands.gates import check_gates, judge_gates
from dpocli.commands.models import Candidate, candidates
from dpocli.commands.pairs import Inputs, check_inputs, check_weights
from dpocli.config.commands import EvaluateOptions
from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Console
from dpocli.console.progress import Progress
from dpocli.distributed.launch import pick_device
from dpocli.distributed.processes import Processes, init_processes
from dpocli.distributed.signals import StopFlag
from dpocli.errors import NumericsError, PreemptedError, UsageError
from dpocli.evaluation.pair_table import PairTable, ScoredPairs
from dpocli.evaluation.report import Evaluated, report_of, write_report
from dpocli.evaluation.second_reference import add_second_reference
from dpocli.model.load import dtype_name, pick_dtype
from dpocli.objective.logps import LogpColumns
from dpocli.report.terminal_table import render
from dpocli.report.token_heatmap import Showcase
from dpocli.run.directory import RunDirectory
from dpocli.scoring.frozen import frozen_scorer
from dpocli.scoring.layout_check import choose_layout, sample
from dpocli.scoring.passes import FILLER, my_passes, score, token_budget
from dpocli.scoring.scorer import PairScorer, environment
from dpocli.scoring.throughput import Throughput
from dpocli.scoring.token_logps import pair_logps
from dpocli.training.step0 import TOLERANCE

PAIRS_AT_ONCE = 4096
"""Pairs that are sorted by length together; beyond it they are read in the order of the cache, which is fast."""


def run(options: EvaluateOptions, console: Console) -> None:
    """Scores every pair with each model, one model after the other, and reports what the rewards of each loss say."""
    device = pick_device(options.device, options.launcher)
    models = candidates(options)
    inputs = []
    for model in models:  # all of them, before the first pair is scored
        losses = list(model.losses.values())
        check_inputs(options, losses, model.provenance.trained_from)
        inputs.append(Inputs.open(options, losses, model.tokenizer, console))
    with (
        init_processes(device, options.launcher) as processes,
        RunDirectory(options.out, "evaluate", rank=processes.rank, say=console.say) as out,
        StopFlag() as stop,
    ):
        stores: list[PairStore] = []
        for model, each in zip(models, inputs, strict=True):
            first = stores[0] if stores else None
            reads_the_same = first is not None and options.reference is not None
            scratch = options.data.scratch or options.out
            stores.append(first if first and reads_the_same else each.pairs(scratch, processes, console, beside=first))
            for loss in model.losses.values():
                check_weights(loss, [PairView(stores[-1], np.arange(len(stores[-1])))])
        _check_slices(options.slice_by, stores[0])
        second = open_second(options.second_reference, stores[0]) if options.second_reference else None
        check_gates(options.gates, models, stores, second)
        warnings = [text for each in zip(models, stores, strict=True) if (text := _other_reference(*each))]
        for text in warnings:
            console.warn(text)
        out.write_config(options)
        if processes.is_first:
            remove_report(options.out)

        def check_stop() -> None:
            if processes.any(bool(stop) or out.stop_requested()):
                raise PreemptedError("Stopped on request. The same command line starts the evaluation again.")

        evaluated, scoring, shown = [], [], []
        for index, (model, store) in enumerate(zip(models, stores, strict=True)):
            job = EvaluateJob(
                options, model, store, second, processes, console, check_stop, 0 if index else options.show_pairs
            )
            found, throughput, ends = job.evaluated()
            evaluated.append(found)
            scoring.append(throughput)
            shown.append(ends)
            gc.collect()  # a model holds on to itself in circles, and the next one needs its place
            if device.type == "cuda":
                torch.cuda.empty_cache()
        report = report_of(evaluated) | {
            "model": models[0].name,
            "reference": str(options.reference) if options.reference else None,
            "dtype": dtype_name(_dtype(options, stores[0], device)),
            "environment": environment(device),
            "scoring": scoring[0] | {"processes": processes.count},
            "warnings": warnings,
        }
        failed = judge_gates(options.gates, report)
        if processes.is_first:
            write_report(options.out, report, evaluated)
            write_page(options, report, evaluated[0].table, shown[0], stores[0], console)
        console.result(report, lambda printer: render(printer, report))
        if failed:
            raise failed


@dataclass(frozen=True, slots=True)
class EvaluateJob:
    """One model over the pairs."""

    options: EvaluateOptions
    model: Candidate
    store: PairStore
    second: PairStore | None
    processes: Processes
    console: Console
    check_stop: Callable[[], None]
    shows: int
    """Pairs at either end of the margins that are looked at token by token."""

    def evaluated(self) -> tuple[Evaluated, dict[str, Any], Showcase]:
        """What it makes of the pairs, how fast, and the pairs at both ends. It is out of memory again by then."""
        model, losses = self.model, self.model.losses
        dtype = _dtype(self.options, self.store, self.processes.device)
        needs = {need for loss in losses.values() for need in loss.needs}
        wanted = LogpColumns.by(needs, has_reference=self.store.has_reference)
        team = self.processes.team(self.options.loading.shards)
        budget = token_budget(self.options.scoring.token_budget, self.processes.device)
        scorer = frozen_scorer(model.files, model.options, dtype, team, budget, collision=wanted.collision)
        scored, throughput = self._scored(scorer, wanted)
        noise = _noise(dtype, self.store, losses.values())
        _check_finite(scored.rows, scored.logps.matrix().numpy(), "log-probs")
        table = PairTable.of(scored, losses, model.states, noise)
        for name in losses:
            _check_finite(scored.rows, table.column(table.name_of(name, "losses"))[:, None], f"losses ({name})")
        extra: dict[str, Any] = {"training": model.training}
        if self.second is not None:
            name = table.losses[0]
            extra["second_reference"] = add_second_reference(
                table, self.second, scored, losses[name], model.states[name], noise
            )
        view = PairView(self.store, np.arange(len(self.store)))
        compares = losses[table.losses[0]].ranked_by.spec.reward.log_ratio
        ends = showcase(scorer, view, model.tokenizer, table, self.shows, team, against_reference=compares)
        step, run = model.provenance.step, model.provenance.run
        return Evaluated(model.name, table, losses, step, run, extra), throughput, ends

    def _scored(self, scorer: PairScorer, wanted: LogpColumns) -> tuple[ScoredPairs, dict[str, Any]]:
        options, store, processes = self.options, self.store, self.processes
        tried = sample(scorer, [PairView(store, np.arange(len(store)))], seed=0)
        choose_layout(scorer, tried, options.scoring.layout, processes, self.console.say)
        throughput = Throughput(scorer)
        what = "evaluate" if len(options.models) == 1 else f"evaluate {self.model.name}"
        with self.console.progress(len(store), what) as progress, throughput.clock():
            parts = list(_scored(scorer, wanted, store, processes, progress, self.check_stop, options.slice_by))
        return ScoredPairs.init_processes(processes.gather(parts)), throughput.summary()


def _dtype(options: EvaluateOptions, store: PairStore, device: torch.device) -> torch.dtype:
    return pick_dtype(options.loading.dtype, device, recorded=store.fingerprint.dtype)


def _noise(dtype: torch.dtype, store: PairStore, losses: Iterable[LossChoice]) -> float:
    """How far rounding may move a token's log-prob, nats; or its log-ratio, where a loss looks at the reference: as far as
    the rougher of the two dtypes that it is made in."""
    if not any(loss.needs_reference for loss in losses) or not store.fingerprint.dtype:
        return TOLERANCE[dtype]
    return max(TOLERANCE[dtype], TOLERANCE[getattr(torch, store.fingerprint.dtype)])


def _check_slices(names: Sequence[str], store: PairStore) -> None:
    """Raises UsageError where the pairs carry no column of such a name."""
    kept = store.load([0])[0].kept
    if unknown := [name for name in names if name not in kept]:
        there = f"there are {', '.join(kept)}" if kept else "there is none"
        raise UsageError(
            f"--slice-by {unknown[0]}: the pairs carry no such column; {there}. Keep it with --keep-columns {unknown[0]} where "
            "the data are read: in precompute, or here with --data."
        )


def _scored(
    scorer: PairScorer,
    wanted: LogpColumns,
    store: PairStore,
    processes: Processes,
    progress: Progress,
    check_stop: Callable[[], None],
    kept: Sequence[str],
) -> Iterator[ScoredPairs]:
    """This process's pairs, in pieces of a window each: one a pass would weigh more than what it holds."""
    for start in range(0, len(store), PAIRS_AT_ONCE):
        view = PairView(store, np.arange(start, min(start + PAIRS_AT_ONCE, len(store))))
        passes = []
        for positions, pairs in my_passes(view, np.arange(len(view)), scorer.packing, processes):
            check_stop()
            with torch.no_grad():
                batch, tokens = score(scorer, pairs or [FILLER])
                if not pairs:
                    continue
                logps = pair_logps(tokens, batch, pairs, wanted)
            progress.update(pairs=len(pairs) * processes.count, tokens=batch.num_tokens * processes.count)
            passes.append((start + positions, pairs, logps))
        if passes:  # fetched here, so that no pass waits for the one before it to leave the accelerator
            yield ScoredPairs.init_processes([ScoredPairs.of(*each, wanted, kept) for each in passes])


def _check_finite(rows: NDArray[np.int64], values: NDArray[np.float64], what: str) -> None:
    """Raises NumericsError where a row of `values`, shape (pairs, columns), holds what is no number."""
    bad = rows[~np.isfinite(values).all(axis=1)]
    if len(bad):
        raise NumericsError(
            f"The policy gives {what} that are not finite for {len(bad)} pairs, the first of source rows "
            f"{', '.join(map(str, bad[:10].tolist()))}. Try --dtype float32, or look at the model's weights."
        )


def _other_reference(model: Candidate, store: PairStore) -> str | None:
    trained_against = model.provenance.reference_digest
    if not store.has_reference or not trained_against or trained_against == store.fingerprint.reference_digest:
        return None
    return (
        f"{model.name} was trained against another reference than the one that wrote this cache: its rewards here are not "
        "those that it was trained on."
    )
