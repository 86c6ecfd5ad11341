"""Options of training alone: the optimizer, and adapters."""

from typing import Literal, Self

from pydantic import BaseModel, model_validator

from dpocli.config.shared_options import CommaList, Panel, option

ADAMW_SETTINGS = ("weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon")
NEW_ADAPTER_SETTINGS = ("lora_alpha", "lora_targets", "lora_dropout", "lora_variant")
"""They describe an adapter that `--lora-rank` asks for."""


class OptimizerOptions(BaseModel):
    """How the policy moves, and how far."""

    optimizer: Literal["adamw", "adamw-8bit", "rmsprop"] = option(
        "adamw",
        Panel.OPTIMIZER,
        "AdamW; with moments of 8 bits (needs dpocli[quantization]); or RMSprop, as the original DPO code",
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
    seed: int = option(0, Panel.OPTIMIZER, "order of the data and everything random", ge=0)

    @model_validator(mode="after")
    def _nothing_idle(self) -> Self:
        fields = type(self).model_fields
        for name in ADAMW_SETTINGS:
            if self.optimizer == "rmsprop" and getattr(self, name) != fields[name].default:
                raise ValueError(f"{name}: a setting of AdamW, and --optimizer is rmsprop; leave it out")
        if self.warmup_steps is not None and self.warmup_ratio != fields["warmup_ratio"].default:
            raise ValueError("warmup_steps: warm-up is set by --warmup-ratio or by --warmup-steps, not both")
        return self


class AdapterOptions(BaseModel):
    """A low-rank adapter to be trained in place of the model."""

    lora_rank: int | None = option(
        None, Panel.ADAPTER, "train a LoRA adapter of this rank, and leave the model frozen", ge=1
    )
    lora_alpha: float | None = option(None, Panel.ADAPTER, "scale of the adapter (default: twice the rank)", gt=0)
    lora_targets: CommaList = option(
        ["all-linear"],
        Panel.ADAPTER,
        "names of the layers that get one, separated by commas (all-linear: all but the head)",
    )
    lora_dropout: float = option(0.0, Panel.ADAPTER, "dropout before the adapter", ge=0, lt=1)
    lora_variant: Literal["lora", "rslora", "dora"] = option("lora", Panel.ADAPTER, "which of the family")
    merge: bool = option(False, Panel.ADAPTER, "also write the merged model, as OUT/merged")


class StoppingOptions(BaseModel):
    """When a run leaves its machines, and what it leaves there."""

    max_minutes: float | None = option(
        None, Panel.RUN, "save and stop (exit code 75) after this time; the same line goes on", gt=0
    )
    grace_seconds: float = option(
        30.0, Panel.RUN, "time from a stop signal to the kill, to warn where saving takes longer", gt=0
    )
