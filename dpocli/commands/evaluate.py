"""`dpocli evaluate`: how a model ranks the pairs, with which certainty, and on which of them."""

import gc
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.cache.join import open_second
from dpocli.cache.reader import PairStore
from dpocli.cache.view import PairView
from dpocli.commands.example_pairs import score_examples, write_page
from dpocli.commands.finished_evaluation import finished_report, inputs_of, is_finished, write_results
from dpocli.commands.gates import available_for, available_in, check_gates, judge_gates
from dpocli.commands.models import EvaluatedModel, resolve_models
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
from dpocli.report.token_heatmap import ExamplePairs
from dpocli.run.directory import RunDirectory
from dpocli.run.status import Outcome, StatusFile, new_status
from dpocli.scoring.frozen import frozen_scorer
from dpocli.scoring.layout_check import choose_layout, sample
from dpocli.scoring.passes import FILLER, my_passes, score, token_budget
from dpocli.scoring.scorer import PairScorer, environment
from dpocli.scoring.throughput import Throughput
from dpocli.scoring.token_logps import pair_logps
from dpocli.training.step0 import TOLERANCE

PAIRS_AT_ONCE = 4096
"""Pairs that are sorted by length together. Beyond it they are read in the order of the cache, which is fast."""


def run(options: EvaluateOptions, console: Console) -> None:
    """Score the pairs with each model and report the figures; a finished evaluation is printed again, never replaced."""
    device = pick_device(options.device, options.launcher)
    models = resolve_models(options)
    for model in models:
        check_inputs(options, list(model.losses.values()), model.provenance.trained_from)
    if is_finished(options.out):
        _print_again(options, models, console)
        return
    sources = [Inputs.open(options, list(model.losses.values()), model.tokenizer, console) for model in models]
    with (
        init_processes(device, options.launcher) as processes,
        RunDirectory(options.out, "evaluate", rank=processes.rank, say=console.say) as out,
        StopFlag() as stop,
    ):
        stores = _load_pairs(options, models, sources, processes, console)
        second = open_second(options.second_reference, stores[0]) if options.second_reference else None
        _check_slices(options.slice_by, stores[0])
        check_gates(options.gates, models, available_for(models, stores[0], second))
        warnings = [text for each in zip(models, stores, strict=True) if (text := _other_reference(*each))]
        for text in warnings:
            console.warn(text)
        out.write_config(options)
        digests = [store.fingerprint.digest for store in stores]
        second_digest = [second.fingerprint.digest] if second else []
        inputs = processes.first_does(lambda: inputs_of(options, models, digests, second_digest))

        def check_stop() -> None:
            if processes.any(bool(stop) or out.stop_requested()):
                raise PreemptedError("Stopped on request. Rerun the same command to evaluate from the start.")

        results = [
            EvaluateJob(
                options, model, store, second, processes, console, check_stop, 0 if index else options.show_pairs
            ).run()
            for index, (model, store) in enumerate(zip(models, stores, strict=True))
        ]
        report = report_of([result.evaluated for result in results]) | {
            "model": models[0].name,
            "reference": str(options.reference) if options.reference else None,
            "dtype": dtype_name(_dtype(options, stores[0], device)),
            "environment": environment(device),
            "scoring": results[0].throughput | {"processes": processes.count},
            "warnings": warnings,
        }
        failed = judge_gates(options.gates, report)

        def write(directory: Path) -> None:
            write_report(directory, report, [result.evaluated for result in results])
            write_page(directory, options, report, results[0].evaluated.table, results[0].examples, stores[0], console)

        if processes.is_first:
            write_results(options.out, inputs, write)
        console.result(report, lambda printer: render(printer, report))
        if failed:
            raise failed


def _print_again(options: EvaluateOptions, models: Sequence[EvaluatedModel], console: Console) -> None:
    """Print the finished report, judged by the gates given now. `status.json` is written only for another outcome."""
    report = finished_report(options, models)
    report.pop("requirements", None)
    check_gates(options.gates, models, available_in(report))
    failed = judge_gates(options.gates, report)
    console.result(report, lambda printer: render(printer, report))
    file, outcome = StatusFile(options.out), Outcome.of(failed)
    status = file.read()
    if console.rank == 0 and not (status and (status.is_alive or status.exit_code == outcome.exit_code)):
        file.write(replace(new_status("evaluate"), **asdict(outcome)))
    if failed:
        raise failed


def _load_pairs(
    options: EvaluateOptions,
    models: Sequence[EvaluatedModel],
    sources: Sequence[Inputs],
    processes: Processes,
    console: Console,
) -> list[PairStore]:
    """The pairs for each model: one cache for all, or the rows of `--data` encoded by each tokenizer."""
    stores: list[PairStore] = []
    for model, source in zip(models, sources, strict=True):
        first = stores[0] if stores else None
        if first is not None and options.reference:
            stores.append(first)
        else:
            stores.append(source.pairs(options.data.scratch or options.out, processes, console, beside=first))
        for loss in model.losses.values():
            check_weights(loss, [PairView(stores[-1], np.arange(len(stores[-1])))])
    return stores


@dataclass(frozen=True, slots=True)
class Result:
    """What one model gives."""

    evaluated: Evaluated
    throughput: dict[str, Any]
    examples: ExamplePairs


@dataclass(frozen=True, slots=True)
class EvaluateJob:
    """One model over the pairs."""

    options: EvaluateOptions
    model: EvaluatedModel
    store: PairStore
    second: PairStore | None
    processes: Processes
    console: Console
    check_stop: Callable[[], None]
    num_examples: int
    """Pairs with the lowest, and with the highest margins, of which the report shows every token."""

    def run(self) -> Result:
        """Load the model, score the pairs, and free its memory."""
        result = self._result()
        gc.collect()  # a model refers to itself in circles, and the next one needs its memory
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        return result

    def _result(self) -> Result:
        model, losses = self.model, self.model.losses
        dtype = _dtype(self.options, self.store, self.processes.device)
        needs = {need for loss in losses.values() for need in loss.needs}
        columns = LogpColumns.by(needs, has_reference=self.store.has_reference)
        team = self.processes.team(self.options.loading.shards)
        budget = token_budget(self.options.scoring.token_budget, self.processes.device)
        scorer = frozen_scorer(model.files, model.options, dtype, team, budget, collision=columns.collision)
        scored, throughput = self._score(scorer, columns)
        noise = _noise(dtype, self.store, losses.values())
        _check_finite(scored.rows, scored.logps.matrix().numpy(), "log-probs")
        table = PairTable.of(scored, losses, model.states, noise)
        for name in losses:
            _check_finite(scored.rows, table.column(table.name_of(name, "losses"))[:, None], f"losses ({name})")
        name, view = table.losses[0], PairView(self.store, np.arange(len(self.store)))
        extra: dict[str, Any] = {"training": model.training}
        if self.second is not None:
            extra["second_reference"] = add_second_reference(
                table, self.second, scored, losses[name], model.states[name], noise
            )
        compares = losses[name].ranked_by.spec.reward.log_ratio
        examples = score_examples(
            scorer, view, model.tokenizer, table, self.num_examples, team, against_reference=compares
        )
        provenance = model.provenance
        evaluated = Evaluated(model.name, table, losses, provenance.step, provenance.run, extra)
        return Result(evaluated, throughput, examples)

    def _score(self, scorer: PairScorer, columns: LogpColumns) -> tuple[ScoredPairs, dict[str, Any]]:
        options, store, processes = self.options, self.store, self.processes
        tried = sample(scorer, [PairView(store, np.arange(len(store)))], seed=0)
        choose_layout(scorer, tried, options.scoring.layout, processes, self.console.say)
        throughput = Throughput(scorer)
        what = "evaluate" if len(options.models) == 1 else f"evaluate {self.model.name}"
        with self.console.progress(len(store), what) as progress, throughput.clock():
            parts = list(self._windows(scorer, columns, progress))
        return ScoredPairs.joined(processes.gather(parts)), throughput.summary()

    def _windows(self, scorer: PairScorer, columns: LogpColumns, progress: Progress) -> Iterator[ScoredPairs]:
        """This process's pairs, a window at a time: objects of a single pass would weigh more than their values."""
        processes, kept = self.processes, self.options.slice_by
        for start in range(0, len(self.store), PAIRS_AT_ONCE):
            view = PairView(self.store, np.arange(start, min(start + PAIRS_AT_ONCE, len(self.store))))
            passes = []
            for positions, pairs in my_passes(view, np.arange(len(view)), scorer.packing, processes):
                self.check_stop()
                with torch.no_grad():
                    batch, tokens = score(scorer, pairs or [FILLER])
                    if not pairs:
                        continue
                    logps = pair_logps(tokens, batch, pairs, columns)
                progress.update(pairs=len(pairs) * processes.count, tokens=batch.num_tokens * processes.count)
                passes.append((start + positions, pairs, logps))
            if passes:  # copied to the host here, so that no pass waits for the one before it
                yield ScoredPairs.joined([ScoredPairs.of(*each, columns, kept) for each in passes])


def _dtype(options: EvaluateOptions, store: PairStore, device: torch.device) -> torch.dtype:
    return pick_dtype(options.loading.dtype, device, recorded=store.fingerprint.dtype)


def _noise(dtype: torch.dtype, store: PairStore, losses: Iterable[LossChoice]) -> float:
    """Rounding error of a token's log-prob, nats; where a loss looks at the reference, of its log-ratio: that of the rougher
    of the two dtypes."""
    if not any(loss.needs_reference for loss in losses) or not store.fingerprint.dtype:
        return TOLERANCE[dtype]
    return max(TOLERANCE[dtype], TOLERANCE[getattr(torch, store.fingerprint.dtype)])


def _check_slices(names: Sequence[str], store: PairStore) -> None:
    """Raise UsageError where the pairs have no column of such a name."""
    kept = store.load([0])[0].kept
    if unknown := [name for name in names if name not in kept]:
        there = f"there are {', '.join(kept)}" if kept else "there is none"
        raise UsageError(
            f"--slice-by {unknown[0]}: the pairs carry no such column; {there}. Keep it with --keep-columns {unknown[0]} where "
            "the data are read: in precompute, or here with --data."
        )


def _check_finite(rows: NDArray[np.int64], values: NDArray[np.float64], what: str) -> None:
    """Raise NumericsError where `values`, shape (pairs, columns), are not all finite."""
    bad = rows[~np.isfinite(values).all(axis=1)]
    if len(bad):
        raise NumericsError(
            f"The policy gives {what} that are not finite for {len(bad)} pairs, the first of source rows "
            f"{', '.join(map(str, bad[:10].tolist()))}. Try --dtype float32, or look at the model's weights."
        )


def _other_reference(model: EvaluatedModel, store: PairStore) -> str | None:
    trained_against = model.provenance.reference_digest
    if not store.has_reference or not trained_against or trained_against == store.fingerprint.reference_digest:
        return None
    return (
        f"{model.name} was trained against another reference than the one that wrote this cache: its rewards here differ from "
        "those in training."
    )
