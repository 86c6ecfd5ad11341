"""What a training leaves behind: the model, the curves and the summary."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dpocli.checkpoint.retention import latest
from dpocli.checkpoint.state import DamagedCheckpointError
from dpocli.commands.resume import inputs_of
from dpocli.commands.run_summary import run_facts
from dpocli.config.commands import TrainOptions
from dpocli.console.console import Console
from dpocli.errors import NumericsError, UsageError
from dpocli.model.load import source_dtype
from dpocli.model.save import Provenance, merge, save_adapter, save_model
from dpocli.run.directory import RunDirectory
from dpocli.training.model_selection import agreed_best_step, best, evaluations
from dpocli.training.monitor import RunStats, draw_curves_or_warn
from dpocli.training.policy import Policy
from dpocli.training.trainer import Trainer


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
