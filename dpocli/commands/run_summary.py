"""`summary.json` of a training run: everything that a report on it needs, and the table at its end."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dpocli.cache.view import PairView
from dpocli.config.commands import TrainOptions
from dpocli.config.flags import values_of
from dpocli.console.console import Printer
from dpocli.distributed.processes import Processes
from dpocli.model.load import dtype_name
from dpocli.scoring.scorer import environment
from dpocli.training.diagnostics import RunWarning, truncation, warnings_of
from dpocli.training.model_selection import Evaluation, best, evaluations
from dpocli.training.monitor import RunStats
from dpocli.training.schedule import Schedule
from dpocli.training.trainer import TrainSetup

MetricRows = Sequence[Mapping[str, Any]]

NO_BETTER = "no better than untrained"


def run_facts(setup: TrainSetup, stats: RunStats, rows: MetricRows, steps: int, model_step: int) -> dict[str, Any]:
    """What a run did, found and took. Collective.

    Args:
        setup: of the run.
        stats: at its end.
        rows: of `metrics.jsonl`.
        steps: optimizer steps done.
        model_step: the step whose weights are `OUT/model`.
    """
    options, processes, seconds = setup.options, setup.processes, stats.seconds("training")
    pairs, tokens = _processed(setup.schedule, setup.training, steps)
    found = evaluations(rows)
    top = best([evaluation for evaluation in found if evaluation.step], options.held_out.keep_best or "loss")
    return {
        "steps": steps,
        "model_step": model_step,
        "stopped_early": steps < setup.schedule.num_steps,
        "best": {"by": options.held_out.keep_best or "loss"} | asdict(top) if top else None,
        "warnings": [asdict(warning) for warning in run_warnings(setup, rows, found)],
        "truncated_share": round(float(_truncated(setup.training).mean()), 4),
        "options": _resolved(setup),
        "environment": environment(processes.device) | _hardware(processes),
        "step0": stats.notes.get("step0"),
        "starts": stats.starts,
        "seconds": stats.to_json()["seconds"],
        "pairs_processed": pairs,
        "tokens_processed": tokens,
        "pairs_per_second": round(pairs / seconds, 2) if seconds else None,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "peak_memory_bytes": max(processes.gather([stats.peak_bytes])),
    }


def run_warnings(setup: TrainSetup, rows: MetricRows, found: Sequence[Evaluation]) -> list[RunWarning]:
    """All warnings of the run, from every start of it, in the order of their steps."""
    first = truncation_warning(setup.training)
    return [
        *([first] if first else []),
        *warnings_of(rows, setup.loss, setup.schedule),
        *_no_better(setup.options, found),
    ]


def truncation_warning(training: PairView) -> RunWarning | None:
    """The warning of many truncated pairs, before the first step."""
    limit = training.store.fingerprint.settings.get("max_length")
    return truncation(int(_truncated(training).sum()), len(training), limit)


def _no_better(options: TrainOptions, found: Sequence[Evaluation]) -> list[RunWarning]:
    """Where the untrained policy was the best of all, which cannot be kept: it is --model."""
    by = options.held_out.keep_best
    if by is None or len(found) < 2 or best(found, by) != found[0] or found[0].step != 0:
        return []
    text = (
        f"No evaluation was better than that of the untrained policy (held-out {by}); OUT/model is the best after "
        "it. Try a lower --learning-rate, and look at whether held-out and training pairs are of one kind."
    )
    return [RunWarning(NO_BETTER, found[-1].step, text)]


def no_better_warning(summary: Mapping[str, Any]) -> str | None:
    """The one warning that can only be given at the end."""
    return next((warning["text"] for warning in summary["warnings"] if warning["kind"] == NO_BETTER), None)


def _truncated(view: PairView) -> np.ndarray[Any, np.dtype[np.bool_]]:
    return view.store.columns.truncated[view.members]


def _processed(schedule: Schedule, view: PairView, steps: int) -> tuple[int, int]:
    """Pairs and distinct tokens of all steps that are done."""
    epochs, rest = divmod(steps, schedule.steps_per_epoch)
    partial = [schedule.batch(epochs * schedule.steps_per_epoch + place + 1) for place in range(rest)]
    last = np.concatenate(partial) if partial else np.zeros(0, dtype=np.int64)
    tokens = view.num_tokens
    return epochs * len(view) + len(last), epochs * int(tokens.sum()) + int(tokens[last].sum())


def _resolved(setup: TrainSetup) -> dict[str, Any]:
    """The options, with defaults that were chosen by the run filled in."""
    return values_of(setup.options) | {
        "loss": str(setup.loss),
        "beta": setup.loss.ranked_by.beta,
        "batch_size": setup.schedule.batch_size,
        "token_budget": setup.policy.scorer.packing.token_budget,
        "dtype": dtype_name(setup.policy.scorer.compute_dtype),
    }


def _hardware(processes: Processes) -> dict[str, Any]:
    hosts = processes.gather([socket.gethostname()])
    return {"processes": len(hosts), "hosts": len(set(hosts)), "cpus": os.cpu_count()}


def render(printer: Printer, summary: Mapping[str, Any], options: TrainOptions) -> None:
    """The table at the end of a run."""
    metrics, untrained, held_out = summary["metrics"], summary["untrained"], summary["held_out"]
    names = ["loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected"]
    if "logratios/margins" in metrics:
        names += ["logratios/accuracies", "logratios/margins"]
    rows = [[name, metrics.get(name), untrained.get(f"eval/{name}"), held_out.get(f"eval/{name}")] for name in names]
    printer.table(
        f"{summary['model']} after {summary['model_step']:,} steps",
        ["", "last step", "held-out before", "held-out"],
        rows,
    )
    if options.held_out.keep_best:
        printer.say(f"It is the best by held-out {options.held_out.keep_best} of {summary['steps']:,} steps.")
