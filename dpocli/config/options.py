"""Every option of every command, declared once: flags, `--config` YAML, `--help` and `config.yaml` come from here.

A field's description is its help text; its bounds are its bounds everywhere. Fields are grouped in mix-ins, so that
what two commands share is one declaration: here are those; `models` puts them together.
"""

from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from dpocli.config.hyperparameters import Value
from dpocli.config.loss_expression import LossChoice, choices_of, split_list
from dpocli.config.losses import CATALOGUE, MIXTURES, all_hyperparameters, losses_using


class Panel(StrEnum):
    """Headings of `--help`."""

    MAIN = "What to do"
    DATA = "Reading and encoding"
    LOSS = "Loss"
    OPTIMIZER = "Optimization"
    ADAPTER = "Adapter"
    HELD_OUT = "Held-out evaluation"
    MODEL = "Model and arithmetic"
    RUN = "Running"


def option(default: Any, panel: Panel, help_text: str, **bounds: Any) -> Any:
    """A field of an options model: what it is and under which heading of `--help` it stands."""
    return Field(default, description=help_text, json_schema_extra={"panel": panel.value}, **bounds)


def _split_commas(value: object) -> object:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return value
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


CommaList = Annotated[list[str], BeforeValidator(_split_commas)]

Several = Annotated[list[str], BeforeValidator(lambda value: [value] if isinstance(value, str) else value)]
"""What may be given once or repeated; commas are part of it."""

Dtype = Literal["float32", "bfloat16", "float16"]


class Options(BaseModel):
    """Base of the three commands' options."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False, allow_inf_nan=False)

    out: Path = option(..., Panel.MAIN, "directory to write; running the same line again goes on where it stopped")
    as_json: bool = option(
        False, Panel.RUN, "print the result as one JSON object on stdout and nothing else", alias="json"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", Panel.RUN, "where to compute (auto: CUDA if there is one)")
    launcher: Literal["torchrun", "slurm"] = option(
        "torchrun",
        Panel.RUN,
        "whose environment says which of several processes this is: torchrun's (nothing where it did not start this), or that "
        "of srun with one process per device",
    )
    scoring: Literal["auto", "shared", "packed", "padded"] = option(
        "auto",
        Panel.RUN,
        "how pairs stand in rows: prompts once, several pairs a row, or padded; speed, never values (auto: the fastest that "
        "is exact for the model)",
    )
    token_budget: int | None = option(
        None,
        Panel.RUN,
        "tokens per forward pass: memory and speed, never values (default: 1024 on CPU; on CUDA 16384, and in train what fits)",
        ge=16,
    )


class LoadingOptions(BaseModel):
    """How a model is loaded, in which arithmetic, and over how many devices."""

    revision: str | None = option(None, Panel.MODEL, "revision of a hub model")
    adapter: Path | None = option(None, Panel.MODEL, "LoRA adapter on top of --model: a directory that peft wrote")
    quantization: Literal["nf4", "int8"] | None = option(
        None, Panel.MODEL, "load the linear layers of --model in few bits (needs dpocli[quantization])"
    )
    shards: int = option(
        1, Panel.RUN, "processes that share one copy of the model, for models larger than one device", ge=1
    )
    trust_remote_code: bool = option(False, Panel.MODEL, "run code that comes with the model")
    dtype: Dtype | None = option(
        None,
        Panel.MODEL,
        "weights and activations in the forward pass (default: the cache's; else bfloat16 on CUDA devices that have it, else float32)",
    )


class ModelOptions(LoadingOptions):
    """The one model of a command, and how it is loaded."""

    model: str = option(..., Panel.MAIN, "model: a local directory or a hub id")


class DataOptions(BaseModel):
    """How source rows become pairs of tokens. All of it decides values, so all of it is in the fingerprint."""

    data: list[str] = option(
        [],
        Panel.MAIN,
        "preference rows: .jsonl, .jsonl.gz, .json, .parquet, a directory of them, or a data set (repeatable)",
    )
    data_split: str = option("train", Panel.DATA, "split of a data set in the datasets format")
    limit: int | None = option(None, Panel.DATA, "use only the first N rows", ge=1)
    prompt_field: str = option("prompt", Panel.DATA, "name of the prompt field")
    chosen_field: str = option("chosen", Panel.DATA, "name of the field with the preferred answer")
    rejected_field: str = option("rejected", Panel.DATA, "name of the field with the other answer")
    keep_columns: CommaList = option([], Panel.DATA, "columns to carry along, separated by commas")
    text_as: Literal["text", "messages"] = option(
        "text", Panel.DATA, "take text rows as they stand, or wrap them as user and assistant turns"
    )
    max_length: int = option(2048, Panel.DATA, "tokens of prompt + the longer side", ge=2)
    truncation: Literal["keep-start", "keep-end", "drop"] = option(
        "keep-start", Panel.DATA, "what gives way: the ends of the sides, the start of the prompt, or the pair"
    )
    scored_turns: Literal["assistant", "all"] = option(
        "assistant", Panel.DATA, "which turns of a side of several messages are scored"
    )
    template_date: date = option(date(2025, 1, 1), Panel.DATA, "the date that chat templates print")
    on_bad_row: Literal["error", "skip"] = option(
        "error", Panel.DATA, "stop at a row that cannot be read, or count and list it"
    )
    max_skipped: float = option(0.5, Panel.DATA, "share of rows that may be skipped before it is an error", ge=0, le=1)
    scratch: Path | None = option(None, Panel.RUN, "directory for large temporary files (default: inside --out)")


if TYPE_CHECKING:

    class _Hyperparameters(BaseModel):
        """An option for each hyperparameter of the catalogue."""
else:
    # Made from the catalogue, so that a loss is declared in one place. These bounds are the widest; `LossChoice` knows
    # those of the losses that are chosen.
    _Hyperparameters = create_model(
        "_Hyperparameters",
        **{
            name: (
                (Literal[parameter.choices] if parameter.choices else float) | None,
                option(
                    None,
                    Panel.LOSS,
                    f"{parameter.help} (of {', '.join(losses_using(name))})",
                    ge=parameter.minimum,
                    gt=parameter.above,
                    le=parameter.maximum,
                    lt=parameter.below,
                ),
            )
            for name, parameter in all_hyperparameters().items()
        },
    )


class LossOptions(_Hyperparameters):
    """The loss and its hyperparameters. A hyperparameter that the loss does not use is an error."""

    loss: str | None = option(
        None,
        Panel.LOSS,
        "loss, or a weighted sum such as dpo+0.2*sft (default: dpo; evaluate: the model's). There are "
        + ", ".join((*CATALOGUE, *MIXTURES)),
    )
    beta: float | None = option(None, Panel.LOSS, "strength of the pull to the reference (default: the paper's)", gt=0)

    def loss_choices(self, default: LossChoice | None = None) -> list[LossChoice]:
        """The losses of `--loss a,b,c`, each with every number filled in.

        Args:
            default: the loss where none is named, and whose numbers a loss of the same name takes before the paper's.

        Raises:
            UsageError: there is no such loss, or it does not use or allow a number that is given.
        """
        texts = split_list(self.loss) if self.loss else [default.label if default else "dpo"]
        return choices_of(texts, self._given_numbers, default)

    @property
    def _given_numbers(self) -> dict[str, Value]:
        values = {name: getattr(self, name) for name in NUMBERS_OF_LOSSES}
        return {name: value for name, value in values.items() if value is not None}


NUMBERS_OF_LOSSES = ("beta", *all_hyperparameters())

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
