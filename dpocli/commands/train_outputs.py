"""What a training leaves behind: the model, the curves and the summary."""

from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpocli.checkpoint.retention import latest
from dpocli.checkpoint.state import DamagedCheckpointError
from dpocli.commands.resume import inputs_of
from dpocli.commands.run_summary import facts
from dpocli.config.commands import TrainOptions
from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Console
from dpocli.errors import NumericsError, UsageError
from dpocli.model.identity import ModelFiles
from dpocli.model.load import source_dtype
from dpocli.model.save import merge, save_adapter, save_model
from dpocli.run.directory import RunDirectory
from dpocli.training.model_selection import agreed_best_step, best, evaluations
from dpocli.training.monitor import draw_curves_or_warn
from dpocli.training.trainer import Trainer


def finish(
    options: TrainOptions,
    loss: LossChoice,
    out: RunDirectory,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    files: ModelFiles,
    steps: int,
    console: Console,
) -> dict[str, Any]:
    """The model (with --keep-best, of the best step), the curves and the summary."""
    policy, checkpoints, model_step = trainer.policy, options.out / "checkpoints", steps
    if options.held_out.keep_best and (kept := agreed_best_step(checkpoints, policy.processes)) is not None:
        model_step = kept
        _go_back(trainer, checkpoints, kept, out, options)
    weights = policy.weights()
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise NumericsError(
            f"After step {model_step} {len(broken)} weights are not finite ({broken[0]}, …); no model was saved. Train again "
            "with a lower --learning-rate in another --out. The last good checkpoint: "
            f"{trainer.last_finite_checkpoint(checkpoints) or 'there is none'}."
        )
    rows = out.metrics.rows()
    summary: dict[str, Any] = {
        "out": str(options.out),
        "model": str(options.out / "model"),
        "loss": loss.model_dump(),
        "policy_weights": trainer.content.model_weights,
        "policy_settings": trainer.content.model_settings,
        "inputs": inputs_of(options),
        "pairs_digest": trainer.content.pairs,
        "held_out_digest": trainer.content.held_out,
        "pairs": trainer.schedule.num_pairs,
        "metrics": {key: value for row in rows for key, value in row.items()},
        "untrained": {key: value for key, value in (rows[0] if rows else {}).items() if key.startswith("eval/")},
        "held_out": next(
            (
                {key: value for key, value in row.items() if key.startswith("eval/")}
                for row in rows
                if row["step"] == model_step
            ),
            {},
        ),
        "scoring": trainer.throughput.summary(),
    } | facts(trainer, rows, steps, model_step)
    if policy.processes.is_first:
        provenance = trainer.provenance(model_step)
        dtype = getattr(torch, options.policy.save_dtype) if options.policy.save_dtype else None
        directory = options.out / "model"
        if policy.adapter:
            save_adapter(directory, policy.adapter, files, weights, tokenizer, dtype or torch.float32, provenance)
            if options.lora.merge:
                merge(options.out / "merged", files, directory, options.model, tokenizer, provenance)
        else:
            dtype = dtype or source_dtype(files, options.model)
            save_model(
                directory,
                policy.scorer.model,
                policy.source_config,
                weights,
                policy.buffers,
                tokenizer,
                dtype,
                provenance,
            )
        draw_curves_or_warn(out, console)
        out.write_summary(summary)
    policy.processes.wait()
    return summary


def _go_back(trainer: Trainer, checkpoints: Path, step: int, out: RunDirectory, options: TrainOptions) -> None:
    """The policy as it was after the best step.

    Raises:
        UsageError: that checkpoint is damaged; the message names the one that takes its place once it is removed.
    """
    try:
        trainer.go_back_to(checkpoints, step)
    except DamagedCheckpointError as error:
        newest = latest(checkpoints)
        if newest is None or newest[0] == step:
            raise
        left = [
            found
            for found in evaluations(out.metrics.rows())
            if found.step != step and (checkpoints / f"step-{found.step}").is_dir()
        ]
        assert options.held_out.keep_best
        following = best(left, options.held_out.keep_best)
        taken = (
            f"the next best of those that are left, step-{following.step}, then becomes OUT/model"
            if following
            else "the policy after the last step then becomes OUT/model, since none of those that are left was evaluated"
        )
        raise UsageError(
            f"{error.why} It is that of the best step by held-out {options.held_out.keep_best}. Put a copy of it back if there is one; "
            f"or remove that directory and give the same command line again: {taken}."
        ) from error
