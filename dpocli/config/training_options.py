"""Sections of options that `train` alone has."""

from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from dpocli.config.options import CommaList, Dtype, Panel, Section, option

ADAMW_SETTINGS = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")


class OptimizerOptions(Section):
    """Optimizer, learning rate, batch size and length of a run."""

    name: Literal["adamw", "adamw-8bit", "rmsprop"] = option(
        "adamw",
        Panel.OPTIMIZER,
        "AdamW; AdamW with 8-bit moments (needs dpocli[quantization]); or RMSprop, as the original DPO code",
        alias="optimizer",
    )
    learning_rate: float | None = option(
        None, Panel.OPTIMIZER, "peak learning rate (default: 5e-7; 5e-6 for adapters)", gt=0
    )
    batch_size: int | None = option(
        None,
        Panel.OPTIMIZER,
        "pairs per optimizer step, over all processes (default: 128, at most a tenth of the pairs)",
        ge=1,
    )
    epochs: int | None = option(None, Panel.OPTIMIZER, "passes over the data (default: 1)", ge=1)
    max_steps: int | None = option(None, Panel.OPTIMIZER, "optimizer steps, instead of --epochs", ge=1)
    lr_schedule: Literal["linear", "cosine", "constant"] = option(
        "linear", Panel.OPTIMIZER, "decay of the learning rate after warm-up"
    )
    warmup_ratio: float = option(
        0.1, Panel.OPTIMIZER, "share of the steps in which the learning rate rises", ge=0, lt=1
    )
    warmup_steps: int | None = option(
        None, Panel.OPTIMIZER, "steps in which the learning rate rises, instead of --warmup-ratio", ge=0
    )
    weight_decay: float = option(0.0, Panel.OPTIMIZER, "weight decay of AdamW", ge=0)
    adam_beta1: float = option(0.9, Panel.OPTIMIZER, "AdamW: decay of the first moment", ge=0, lt=1)
    adam_beta2: float = option(0.999, Panel.OPTIMIZER, "AdamW: decay of the second moment", ge=0, lt=1)
    adam_epsilon: float = option(1e-8, Panel.OPTIMIZER, "AdamW: term in the denominator", gt=0)
    max_grad_norm: float = option(1.0, Panel.OPTIMIZER, "gradients are scaled down to this norm (0: never)", ge=0)

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        changed = self.changed()
        for name in ADAMW_SETTINGS:
            if self.name == "rmsprop" and name in changed:
                raise ValueError(f"{name}: a setting of AdamW, and --optimizer is rmsprop; leave it out")
        if self.warmup_steps is not None and "warmup_ratio" in changed:
            raise ValueError("warmup_steps: warm-up is set by --warmup-ratio or by --warmup-steps, not both")
        return self


class LoraOptions(Section):
    """A LoRA adapter trained in place of the model."""

    rank: int | None = option(
        None, Panel.ADAPTER, "train a LoRA adapter of this rank, and leave the model frozen", ge=1, alias="lora_rank"
    )
    alpha: float | None = option(
        None, Panel.ADAPTER, "scale of the adapter (default: twice the rank)", gt=0, alias="lora_alpha"
    )
    targets: CommaList = option(
        ["all-linear"],
        Panel.ADAPTER,
        "module names to adapt, separated by commas (all-linear: all but the head)",
        alias="lora_targets",
    )
    dropout: float = option(0.0, Panel.ADAPTER, "dropout before the adapter", ge=0, lt=1, alias="lora_dropout")
    variant: Literal["lora", "rslora", "dora"] = option("lora", Panel.ADAPTER, "LoRA variant", alias="lora_variant")
    merge: bool = option(False, Panel.ADAPTER, "also write the merged model, as OUT/merged")


class HeldOutOptions(Section):
    """Held-out pairs, and what their evaluations decide."""

    reference: Path | None = option(None, Panel.HELD_OUT, "reference cache of held-out pairs", alias="eval_reference")
    fraction: float = option(
        0.0,
        Panel.HELD_OUT,
        "share of prompts held out of --reference, by a hash of the prompt",
        alias="eval_fraction",
        ge=0,
        lt=1,
    )
    every: int | None = option(
        None,
        Panel.HELD_OUT,
        "steps between held-out evaluations (default: a tenth of the run)",
        alias="eval_every",
        ge=1,
    )
    early_stopping: int | None = option(
        None,
        Panel.HELD_OUT,
        "end the run when the held-out loss has not improved for N evaluations (default: never)",
        ge=1,
    )
    keep_best: Literal["loss", "accuracy"] | None = option(
        None,
        Panel.HELD_OUT,
        "keep the checkpoint with the best held-out metric, beside --keep-last, and save OUT/model from it",
    )

    @property
    def is_given(self) -> bool:
        """Whether there are held-out pairs."""
        return bool(self.reference or self.fraction)


class PolicyOptions(Section):
    """Memory and arithmetic of the policy under training."""

    cpu_offload: bool = option(
        False, Panel.MODEL, "keep weights and optimizer state in host memory: less device memory, more time"
    )
    gradient_checkpointing: bool = option(
        False, Panel.MODEL, "recompute activations in the backward pass: less memory, more time"
    )
    model_dropout: bool = option(False, Panel.MODEL, "keep the model's own dropout in training (default: 0 everywhere)")
    router_aux_loss_coef: float = option(
        0.0, Panel.MODEL, "weight of a mixture-of-experts router's auxiliary loss (0: off)", ge=0
    )
    save_dtype: Dtype | None = option(None, Panel.MODEL, "dtype of the saved model (default: the source's)")
    step0_tolerance: float | None = option(
        None, Panel.MODEL, "mean difference per token that the step-0 check allows, in nats", gt=0
    )


class CheckpointOptions(Section):
    """When a run saves, and when it stops."""

    save_every: int | None = option(None, Panel.RUN, "steps between checkpoints (default: a tenth of the run)", ge=1)
    keep_last: int = option(2, Panel.RUN, "checkpoints to keep, beside the newest that is known to be good", ge=1)
    max_minutes: float | None = option(
        None, Panel.RUN, "save and stop (exit code 75) after this time; rerun the same command to resume", gt=0
    )
    grace_seconds: float = option(
        30.0,
        Panel.RUN,
        "seconds between SIGTERM and SIGKILL; warn if a checkpoint takes longer",
        gt=0,
    )


class LoggingOptions(Section):
    """Where metrics go."""

    log_every: int = option(1, Panel.RUN, "steps between lines of metrics.jsonl", ge=1)
    track: CommaList = option([], Panel.RUN, "also log to: tensorboard, wandb (extras)")
