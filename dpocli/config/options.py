"""Every option, declared once: flags, `--config` YAML, `--help` and `config.yaml` come from here.

Options are grouped in sections, small frozen models which `commands` composes. A field's description is its help text, and
its bounds hold everywhere. The alias of a field is its name on the command line and in YAML, where that is another one.
"""

from collections.abc import Collection
from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model

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
    """A field of a section, with its heading in `--help`."""
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


class Section(BaseModel):
    """Base of the sections of options, and of a command's options."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=False, allow_inf_nan=False, populate_by_name=True
    )

    def changed(self, *, but: Collection[str] = ()) -> list[str]:
        """Names of the fields that differ from their defaults, less `but`."""
        fields = type(self).model_fields
        return [name for name, field in fields.items() if name not in but and getattr(self, name) != field.default]


class ScoringOptions(Section):
    """How pairs go through a model: speed and memory, never values."""

    layout: Literal["auto", "shared", "packed", "padded"] = option(
        "auto",
        Panel.RUN,
        "batch layout: prompts shared by both sides, several pairs a row, or padded; affects speed, not results (auto: the "
        "fastest that is exact for the model)",
        alias="scoring",
    )
    token_budget: int | None = option(
        None,
        Panel.RUN,
        "tokens per forward pass; affects memory and speed, not results (default: 1024 on CPU; on CUDA 16384, in train what "
        "fits)",
        ge=16,
    )


class Options(Section):
    """What the three commands share."""

    out: Path = option(..., Panel.MAIN, "directory to write; rerun the same command to resume")
    as_json: bool = option(
        False, Panel.RUN, "print the result as one JSON object on stdout and nothing else", alias="json"
    )
    device: Literal["auto", "cpu", "cuda"] = option("auto", Panel.RUN, "where to compute (auto: CUDA if there is one)")
    launcher: Literal["torchrun", "slurm"] = option(
        "torchrun",
        Panel.RUN,
        "whose environment variables give rank and world size: torchrun, or srun with one process per device",
    )
    scoring: ScoringOptions = ScoringOptions()


class LoadingOptions(Section):
    """How a model is loaded, in which dtype, and over how many devices."""

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

    name: str = option(..., Panel.MAIN, "model: a local directory or a hub id", alias="model")


class DataOptions(Section):
    """How source rows become pairs of tokens. All of it decides values, so all of it is in the fingerprint."""

    files: list[str] = option(
        [],
        Panel.MAIN,
        "preference rows: .jsonl, .jsonl.gz, .json, .parquet, a directory of them, or a data set (repeatable)",
        alias="data",
    )
    data_split: str = option("train", Panel.DATA, "split of a data set in the datasets format")
    limit: int | None = option(None, Panel.DATA, "use only the first N rows", ge=1)
    prompt_field: str = option("prompt", Panel.DATA, "name of the prompt field")
    chosen_field: str = option("chosen", Panel.DATA, "name of the field with the preferred answer")
    rejected_field: str = option("rejected", Panel.DATA, "name of the field with the other answer")
    keep_columns: CommaList = option([], Panel.DATA, "columns to carry along, separated by commas")
    text_as: Literal["text", "messages"] = option(
        "text", Panel.DATA, "text rows as they are, or wrapped as user and assistant turns"
    )
    max_length: int = option(2048, Panel.DATA, "tokens of the prompt and the longer answer together", ge=2)
    truncation: Literal["keep-start", "keep-end", "drop"] = option(
        "keep-start",
        Panel.DATA,
        "what to cut when a pair is too long: the ends of the answers, the start of the prompt; or drop the pair",
    )
    scored_turns: Literal["assistant", "all"] = option(
        "assistant", Panel.DATA, "which turns of an answer of several messages are scored"
    )
    template_date: date = option(date(2025, 1, 1), Panel.DATA, "the date that chat templates print")
    on_bad_row: Literal["error", "skip"] = option(
        "error", Panel.DATA, "stop at a row that cannot be read, or count and list it"
    )
    max_skipped: float = option(0.5, Panel.DATA, "share of rows that may be skipped before it is an error", ge=0, le=1)
    scratch: Path | None = option(None, Panel.RUN, "directory for large temporary files (default: inside --out)")


class _Loss(Section):
    """The loss and its beta, which come first in `--help`."""

    name: str | None = option(
        None,
        Panel.LOSS,
        "loss, or a weighted sum such as dpo+0.2*sft (default: dpo; evaluate: the model's). There are "
        + ", ".join((*CATALOGUE, *MIXTURES)),
        alias="loss",
    )
    beta: float | None = option(
        None, Panel.LOSS, "strength of the KL penalty to the reference (default: the paper's)", gt=0
    )


if TYPE_CHECKING:

    class _Hyperparameters(_Loss):
        """An option for each hyperparameter of the catalogue."""
else:
    # Made from the catalogue, so that a loss is declared in one place. These bounds are the widest; `LossChoice` knows
    # the bounds of the chosen losses.
    _Hyperparameters = create_model(
        "_Hyperparameters",
        __base__=_Loss,
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

    def loss_choices(self, default: LossChoice | None = None) -> list[LossChoice]:
        """The losses of `--loss a,b,c`, each with every number filled in.

        Args:
            default: the loss where none is named, and whose numbers a loss of the same name takes before the paper's.

        Raises:
            UsageError: there is no such loss, or it does not use or allow a number that is given.
        """
        texts = split_list(self.name) if self.name else [default.label if default else "dpo"]
        return choices_of(texts, self._given_numbers, default)

    @property
    def _given_numbers(self) -> dict[str, Value]:
        values = {name: getattr(self, name) for name in NUMBERS_OF_LOSSES}
        return {name: value for name, value in values.items() if value is not None}


NUMBERS_OF_LOSSES = ("beta", *all_hyperparameters())
