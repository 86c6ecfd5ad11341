"""`dpocli evaluate`: reward accuracy and margins of a policy over a cache."""

from collections.abc import Callable, Iterator

import numpy as np
import torch

from dpocli.artifacts.cache_reader import PairStore
from dpocli.artifacts.report import PairTable, figures, render, write_report
from dpocli.artifacts.run_dir import RunDirectory
from dpocli.commands.inputs import Inputs, check_inputs
from dpocli.config.models import EvaluateOptions, LossChoice
from dpocli.engine.mesh import Processes, joined, pick_device
from dpocli.engine.model import (
    Provenance,
    dtype_name,
    environment,
    load_model,
    load_tokenizer,
    locate_model,
    pick_dtype,
)
from dpocli.engine.passes import PairView, my_passes, score, token_budget
from dpocli.engine.stop import StopFlag
from dpocli.errors import NumericsError, PreemptedError
from dpocli.objective import losses
from dpocli.objective.logps import pair_logps
from dpocli.objective.scoring import PairScorer
from dpocli.progress import Progress
from dpocli.terminal import Terminal

PAIRS_AT_ONCE = 4096
"""Pairs that are sorted by length together; beyond it they are read in the order of the cache, which is fast."""


def run(options: EvaluateOptions, terminal: Terminal) -> None:
    """Scores every pair with the policy and reports what the loss's rewards say."""
    device = pick_device(options.device)
    directory = locate_model(options)
    provenance = Provenance.of(directory)
    loss = LossChoice.from_options(options, provenance.loss)
    check_inputs(options, loss, provenance.trained_from)
    inputs = Inputs.open(options, loss, load_tokenizer(directory, options), terminal)
    with (
        joined(device) as processes,
        RunDirectory(options.out, "evaluate", rank=processes.rank, say=terminal.say) as out,
        StopFlag() as stop,
    ):
        store = inputs.pairs(options.scratch or options.out, processes, terminal)
        out.write_config(options)
        _tell_other_reference(provenance, store, terminal)
        dtype = pick_dtype(options.dtype, device, recorded=store.fingerprint.dtype)
        model = load_model(directory, options, dtype, device)
        scorer = PairScorer(model, collision=loss.spec.needs_collision)
        budget = token_budget(options.token_budget, device)

        def go_on() -> None:
            if processes.any(bool(stop) or out.stop_requested()):
                raise PreemptedError("Stopped on request. The same command line starts the evaluation again.")

        with terminal.progress(len(store), "evaluate") as progress:
            parts = list(_scored(scorer, loss, store, budget, processes, progress, go_on))
        table = PairTable.joined(processes.gather(parts))
        _check_finite(table)
        report = figures(table) | {
            "model": options.model,
            "reference": str(options.reference) if options.reference else None,
            "loss_choice": loss.model_dump(),
            "dtype": dtype_name(dtype),
            "environment": environment(device),
        }
        if processes.is_first:
            write_report(options.out, report, table)
        terminal.result(report, lambda printer: render(printer, report))


def _scored(
    scorer: PairScorer,
    loss: LossChoice,
    store: PairStore,
    budget: int,
    processes: Processes,
    progress: Progress,
    go_on: Callable[[], None],
) -> Iterator[PairTable]:
    """This process's pairs, in pieces, with everything that is reported of them."""
    for start in range(0, len(store), PAIRS_AT_ONCE):
        view = PairView(store, np.arange(start, min(start + PAIRS_AT_ONCE, len(store))))
        for positions, pairs in my_passes(view, np.arange(len(view)), budget, processes):
            go_on()
            if not pairs:
                continue
            with torch.no_grad():
                batch, tokens = score(scorer, pairs, processes.device)
                logps = pair_logps(tokens, batch, pairs, reference=store.has_reference)
                output = losses.compute(loss, logps)
            progress.update(pairs=len(pairs) * processes.count, tokens=batch.num_tokens * processes.count)
            yield PairTable.of(start + positions, pairs, logps, output)


def _check_finite(table: PairTable) -> None:
    bad = table.column("row")[
        ~np.isfinite(sum(table.column(name) for name in ("policy_chosen_logps", "policy_rejected_logps", "losses")))
    ]
    if len(bad):
        raise NumericsError(
            f"The policy gives log-probs or losses that are not finite for {len(bad)} pairs, the first of source rows "
            f"{', '.join(map(str, bad[:10].tolist()))}. Try --dtype float32, or look at the model's weights."
        )


def _tell_other_reference(provenance: Provenance, store: PairStore, terminal: Terminal) -> None:
    trained_against = provenance.reference_digest
    if store.has_reference and trained_against and trained_against != store.fingerprint.reference_digest:
        terminal.warn(
            "The model was trained against another reference than the one that wrote this cache: its rewards here are "
            "not those that it was trained on."
        )
