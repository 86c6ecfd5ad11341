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
from dpocli.model.load import dtype_name
from dpocli.scoring.scorer import environment
from dpocli.training.diagnostics import RunWarning, truncation, warnings_of
from dpocli.training.model_selection import Evaluation, best, evaluations
from dpocli.training.schedule import Schedule
from dpocli.training.trainer import Trainer

MetricRows = Sequence[Mapping[str, Any]]

NO_BETTER = "no better than untrained"


def facts(trainer: Trainer, rows: MetricRows, steps: int, model_step: int) -> dict[str, Any]:
    """What a run did, found and took. To be called on every process.

    Args:
        trainer: at the end of the run.
        rows: of `metrics.jsonl`.
        steps: optimizer steps done.
        model_step: the step whose weights are `OUT/model`.
    """
    options, account, processes = trainer.options, trainer.account, trainer.processes
    rate = trainer.throughput.share_of_the_rate(account.seconds_of_this_start("training"))
    seconds = account.seconds("training")
    pairs, tokens = _processed(trainer.schedule, trainer.view, steps)
    found = evaluations(rows)
    top = best([evaluation for evaluation in found if evaluation.step], options.held_out.keep_best or "loss")
    return {
        "steps": steps,
        "model_step": model_step,
        "stopped_early": steps < trainer.schedule.num_steps,
        "best": {"by": options.held_out.keep_best or "loss"} | asdict(top) if top else None,
        "warnings": [asdict(warning) for warning in run_warnings(trainer, rows, found)],
        "truncated_share": round(float(_truncated(trainer.view).mean()), 4),
        "options": _resolved(trainer),
        "environment": environment(processes.device) | _hardware(trainer),
        "step0": account.notes.get("step0"),
        "starts": account.starts,
        "seconds": account.to_json()["seconds"],
        "pairs_processed": pairs,
        "tokens_processed": tokens,
        "pairs_per_second": round(pairs / seconds, 2) if seconds else None,
        "tokens_per_second": round(tokens / seconds, 1) if seconds else None,
        "model_flop_utilisation": None if rate is None else round(rate, 4),
        "peak_memory_bytes": max(processes.gather([account.peak_bytes])),
    }


def run_warnings(trainer: Trainer, rows: MetricRows, found: Sequence[Evaluation]) -> list[RunWarning]:
    """All that were said in the course of the run, by whichever start of it, in the order of their steps."""
    first = truncation_warning(trainer.view)
    return [
        *([first] if first else []),
        *warnings_of(rows, trainer.loss, trainer.schedule),
        *_no_better(trainer, found),
    ]


def truncation_warning(training: PairView) -> RunWarning | None:
    """What is to be said of truncated pairs before the first step."""
    limit = training.store.fingerprint.settings.get("max_length")
    return truncation(int(_truncated(training).sum()), len(training), limit)


def _no_better(trainer: Trainer, found: Sequence[Evaluation]) -> list[RunWarning]:
    """Where the untrained policy was the best of all, which cannot be kept: it is --model."""
    by = trainer.options.held_out.keep_best
    if by is None or len(found) < 2 or best(found, by) != found[0] or found[0].step != 0:
        return []
    text = (
        f"No evaluation was better than that of the untrained policy (held-out {by}); OUT/model is the best of those after "
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


def _resolved(trainer: Trainer) -> dict[str, Any]:
    """The options, with what stood for "choose for me" filled in."""
    return values_of(trainer.options) | {
        "loss": str(trainer.loss),
        "beta": trainer.loss.ranked_by.beta,
        "batch_size": trainer.schedule.batch_size,
        "token_budget": trainer.policy.scorer.packing.token_budget,
        "dtype": dtype_name(trainer.policy.scorer.compute_dtype),
    }


def _hardware(trainer: Trainer) -> dict[str, Any]:
    hosts = trainer.processes.gather([socket.gethostname()])
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
        printer.say(
            f"It is the best by held-out {options.held_out.keep_best} of the {summary['steps']:,} steps that were done."
        )
