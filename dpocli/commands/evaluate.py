"""`dpocli evaluate`: reward accuracy and margins of a policy over a cache."""

from collections.abc import Callable, Iterator
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.artifacts.cache_reader import PairStore
from dpocli.artifacts.pair_table import PairTable, ScoredPairs
from dpocli.artifacts.report import figures, render, write_report
from dpocli.artifacts.run_dir import RunDirectory
from dpocli.commands.inputs import Inputs, check_inputs, check_weights
from dpocli.commands.showcase import showcase, write_page
from dpocli.config.loss_choice import LossChoice, named
from dpocli.config.models import EvaluateOptions
from dpocli.engine.exactness import sample, settle
from dpocli.engine.locate import load_tokenizer, locate_model
from dpocli.engine.mesh import Processes, joined, pick_device
from dpocli.engine.model import dtype_name, environment, pick_dtype
from dpocli.engine.passes import FILLER, PairView, my_passes, score, token_budget
from dpocli.engine.saved_model import Provenance
from dpocli.engine.sharding import frozen_scorer
from dpocli.engine.stop import StopFlag
from dpocli.engine.throughput import Throughput
from dpocli.errors import NumericsError, PreemptedError
from dpocli.objective.logps import Wanted, pair_logps
from dpocli.objective.scoring import PairScorer
from dpocli.progress import Progress
from dpocli.terminal import Terminal

PAIRS_AT_ONCE = 4096
"""Pairs that are sorted by length together; beyond it they are read in the order of the cache, which is fast."""


def run(options: EvaluateOptions, terminal: Terminal) -> None:
    """Scores every pair with the policy, once, and reports what the rewards of each loss say."""
    device = pick_device(options.device, options.launcher)
    files = locate_model(options)
    provenance = Provenance.of(files.adapter or files.directory)
    files = replace(files, quantization=files.quantization or provenance.quantization)
    by_name = named(options.loss_choices(provenance.loss))
    losses = list(by_name.values())
    check_inputs(options, losses, provenance.trained_from)
    inputs = Inputs.open(options, losses, load_tokenizer(files, options), terminal)
    with (
        joined(device, options.launcher) as processes,
        RunDirectory(options.out, "evaluate", rank=processes.rank, say=terminal.say) as out,
        StopFlag() as stop,
    ):
        store = inputs.pairs(options.scratch or options.out, processes, terminal)
        for loss in losses:
            check_weights(loss, [PairView(store, np.arange(len(store)))])
        out.write_config(options)
        _tell_other_reference(provenance, store, terminal)
        dtype = pick_dtype(options.dtype, device, recorded=store.fingerprint.dtype)
        wanted = Wanted.by({need for loss in losses for need in loss.needs}, has_reference=store.has_reference)
        budget = token_budget(options.token_budget, device)
        team = processes.team(options.shards)
        scorer = frozen_scorer(files, options, dtype, team, budget, collision=wanted.collision)

        tried = sample(scorer, [PairView(store, np.arange(len(store)))], seed=0)
        settle(scorer, tried, options.scoring, processes, terminal.say)
        throughput = Throughput(scorer)

        def go_on() -> None:
            if processes.any(bool(stop) or out.stop_requested()):
                raise PreemptedError("Stopped on request. The same command line starts the evaluation again.")

        with terminal.progress(len(store), "evaluate") as progress, throughput.clock():
            parts = list(_scored(scorer, wanted, store, processes, progress, go_on))
        scored = ScoredPairs.joined(processes.gather(parts))
        _check_finite(scored.rows, scored.logps.matrix().numpy(), "log-probs")
        table = PairTable.of(scored, by_name, {name: _states(loss, provenance) for name, loss in by_name.items()})
        for name in by_name:
            _check_finite(scored.rows, table.column(table.name_of(name, "losses"))[:, None], f"losses ({name})")
        report = figures(table, by_name) | {
            "model": options.model,
            "reference": str(options.reference) if options.reference else None,
            "dtype": dtype_name(dtype),
            "environment": environment(device),
            "scoring": throughput.summary(),
        }
        shown = showcase(
            scorer, PairView(store, np.arange(len(store))), inputs.tokenizer, table, options.show_pairs, team
        )
        if processes.is_first:
            write_report(options.out, report, table)
            write_page(options, report, table, shown, store, terminal)
        terminal.result(report, lambda printer: render(printer, report))


def _scored(
    scorer: PairScorer,
    wanted: Wanted,
    store: PairStore,
    processes: Processes,
    progress: Progress,
    go_on: Callable[[], None],
) -> Iterator[ScoredPairs]:
    """This process's pairs, in pieces of a window each: one a pass would weigh more than what it holds."""
    for start in range(0, len(store), PAIRS_AT_ONCE):
        view = PairView(store, np.arange(start, min(start + PAIRS_AT_ONCE, len(store))))
        scored = []
        for positions, pairs in my_passes(view, np.arange(len(view)), scorer.packing, processes):
            go_on()
            with torch.no_grad():
                batch, tokens = score(scorer, pairs or [FILLER])
                if not pairs:
                    continue
                logps = pair_logps(tokens, batch, pairs, wanted)
            progress.update(pairs=len(pairs) * processes.count, tokens=batch.num_tokens * processes.count)
            scored.append(ScoredPairs.of(start + positions, pairs, logps, wanted))
        if scored:
            yield ScoredPairs.joined(scored)


def _check_finite(rows: NDArray[np.int64], values: NDArray[np.float64], what: str) -> None:
    """Raises NumericsError where a row of `values`, shape (pairs, columns), holds what is no number."""
    bad = rows[~np.isfinite(values).all(axis=1)]
    if len(bad):
        raise NumericsError(
            f"The policy gives {what} that are not finite for {len(bad)} pairs, the first of source rows "
            f"{', '.join(map(str, bad[:10].tolist()))}. Try --dtype float32, or look at the model's weights."
        )


def _states(loss: LossChoice, provenance: Provenance) -> dict[str, dict[str, float]]:
    """What the training left behind of the terms that are the same as there: other numbers have another scale."""
    trained = {term.name: term for term in provenance.loss.terms} if provenance.loss else {}
    return {
        term.name: provenance.loss_states[term.name]
        for term in loss.terms
        if term.name in provenance.loss_states and term.numbers == trained[term.name].numbers
    }


def _tell_other_reference(provenance: Provenance, store: PairStore, terminal: Terminal) -> None:
    trained_against = provenance.reference_digest
    if store.has_reference and trained_against and trained_against != store.fingerprint.reference_digest:
        terminal.warn(
            "The model was trained against another reference than the one that wrote this cache: its rewards here are "
            "not those that it was trained on."
        )
