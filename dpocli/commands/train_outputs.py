"""What a finished run leaves: the model, its summary, warnings, and the table for people."""

import os
import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpocli.cache.view import PairView
from dpocli.checkpoint.retention import latest
from dpocli.checkpoint.state import DamagedCheckpointError
from dpocli.commands.resume import inputs_of
from dpocli.config.commands import TrainOptions
from dpocli.config.flags import values_of
from dpocli.console.console import Console, Printer
from dpocli.distributed.processes import Processes
from dpocli.errors import NumericsError, UsageError
from dpocli.model.load import dtype_name, source_dtype
from dpocli.model.save import Provenance, merge, save_adapter, save_model
from dpocli.run.directory import RunDirectory
from dpocli.scoring.scorer import environment
from dpocli.training.diagnostics import RunWarning, truncation, warnings_of
from dpocli.training.model_selection import Evaluation, agreed_best_step, best, evaluations
from dpocli.training.monitor import RunStats, draw_curves_or_warn
from dpocli.training.policy import Policy
from dpocli.training.schedule import Schedule
from dpocli.training.trainer import Trainer, TrainSetup


def write_outputs(
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    steps: int,
    stats: RunStats,
    out: RunDirectory,
    console: Console,
) -> dict[str, Any]:
    """Write the model (with --keep-best, that of the best step), the curves and the summary, which is returned."""
    setup, model_step = trainer.setup, steps
    options, policy = setup.options, setup.policy
    if options.held_out.keep_best and (kept := agreed_best_step(setup.checkpoints, policy.processes)) is not None:
        model_step = kept
        _load_best(trainer, kept, out)
    weights = policy.weights()
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise NumericsError(
            f"After step {model_step} {len(broken)} weights are not finite ({broken[0]}, …); no model was saved. Train again "
            "with a lower --learning-rate in another --out. The last good checkpoint: "
            f"{trainer.last_finite_checkpoint() or 'there is none'}."
        )
    rows = out.metrics.rows()
    summary: dict[str, Any] = {
        "out": str(options.out),
        "model": str(options.out / "model"),
        "loss": setup.loss.model_dump(),
        "policy_weights": trainer.content.model_weights,
        "policy_settings": trainer.content.model_settings,
        "inputs": inputs_of(options),
        "pairs_digest": trainer.content.pairs,
        "held_out_digest": trainer.content.held_out,
        "pairs": setup.schedule.num_pairs,
        "metrics": {key: value for row in rows for key, value in row.items()},
        "untrained": _held_out_part(rows[0]) if rows else {},
        "held_out": next((_held_out_part(row) for row in rows if row["step"] == model_step), {}),
        "scoring": trainer.throughput.summary(),
    } | run_facts(setup, stats, rows, steps, model_step)
    if policy.processes.is_first:
        _write_model(options, policy, tokenizer, weights, trainer.provenance(model_step))
        draw_curves_or_warn(out, console)
        out.write_summary(summary)
    policy.processes.wait()
    return summary


def _write_model(
    options: TrainOptions,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor],
    provenance: Provenance,
) -> None:
    files, directory = policy.files, options.out / "model"
    assert files
    dtype = getattr(torch, options.policy.save_dtype) if options.policy.save_dtype else None
    if not policy.adapter:
        model, config = policy.scorer.model, policy.source_config
        dtype = dtype or source_dtype(files, options.model)
        save_model(directory, model, config, weights, policy.buffers, tokenizer, dtype, provenance)
        return
    save_adapter(directory, policy.adapter, files, weights, tokenizer, dtype or torch.float32, provenance)
    if options.lora.merge:
        merge(options.out / "merged", files, directory, options.model, tokenizer, provenance)


def _held_out_part(row: Mapping[str, float]) -> dict[str, float]:
    return {key: value for key, value in row.items() if key.startswith("eval/")}


def _load_best(trainer: Trainer, step: int, out: RunDirectory) -> None:
    """Return to the policy after the best step.

    Raises:
        UsageError: that checkpoint is damaged; the message names the one that is used once it is removed.
    """
    checkpoints, by = trainer.setup.checkpoints, trainer.setup.options.held_out.keep_best
    try:
        trainer.load(step)
    except DamagedCheckpointError as error:
        newest = latest(checkpoints)
        if newest is None or newest[0] == step:
            raise
        assert by
        left = [
            found
            for found in evaluations(out.metrics.rows())
            if found.step != step and (checkpoints / f"step-{found.step}").is_dir()
        ]
        following = best(left, by)
        taken = (
            f"the next best of those that are left, step-{following.step}, then becomes OUT/model"
            if following
            else "the policy after the last step then becomes OUT/model, since none of those that are left was evaluated"
        )
        raise UsageError(
            f"{error.why} It is that of the best step by held-out {by}. Put a copy of it back if there is one; or remove that "
            f"directory and rerun the same command: {taken}."
        ) from error


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
