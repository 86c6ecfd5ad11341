"""Every option of every command, declared once: flags, `--config` YAML, `--help` and `config.yaml` come from here.

A field's description is its help text; its bounds are its bounds everywhere. Fields are grouped in mix-ins, so that
what two commands share is one declaration: here are those; `models` puts them together.
"""

from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

from dpocli.config.catalogue import CATALOGUE, MIXTURES, all_hyperparameters, losses_using
from dpocli.config.hyperparameters import Value
from dpocli.config.loss_choice import LossChoice, choices_of, split_list


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
