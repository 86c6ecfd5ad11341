"""Every option of every command, declared once: flags, `--config` YAML, `--help` and `config.yaml` come from here.

A field's description is its help text; its bounds are its bounds everywhere. Fields are grouped in mix-ins, so that
what two commands share is one declaration.
"""

from datetime import date
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, create_model, model_validator

from dpocli.config.catalogue import CATALOGUE, MIXTURES, all_hyperparameters, losses_using
from dpocli.config.hyperparameters import Value
from dpocli.config.loss_choice import LossChoice, choices_of, split_list
from dpocli.errors import UsageError


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


def _option(default: Any, panel: Panel, help_text: str, **bounds: Any) -> Any:
    return Field(default, description=help_text, json_schema_extra={"panel": panel.value}, **bounds)


def _split_commas(value: object) -> object:
    parts = [value] if isinstance(value, str) else value
    if not isinstance(parts, list) or not all(isinstance(part, str) for part in parts):
        return value
    return [name.strip() for part in parts for name in part.split(",") if name.strip()]


CommaList = Annotated[list[str], BeforeValidator(_split_commas)]
Dtype = Literal["float32", "bfloat16", "float16"]


class Options(BaseModel):
    """Base of the three commands' options."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=False, allow_inf_nan=False)

    out: Path = _option(..., Panel.MAIN, "directory to write; running the same line again goes on where it stopped")
    as_json: bool = _option(
        False, Panel.RUN, "print the result as one JSON object on stdout and nothing else", alias="json"
    )
    device: Literal["auto", "cpu", "cuda"] = _option("auto", Panel.RUN, "where to compute (auto: CUDA if there is one)")
    scoring: Literal["auto", "shared", "packed", "padded"] = _option(
        "auto",
        Panel.RUN,
        "how pairs stand in rows: prompts once, several pairs a row, or padded; speed, never values (auto: the fastest that "
        "is exact for the model)",
    )
    token_budget: int | None = _option(
        None,
        Panel.RUN,
        "tokens per forward pass: memory and speed, never values (default: 1024 on CPU, 16384 on CUDA)",
        ge=16,
    )


class ModelOptions(BaseModel):
    """Which model, and in which arithmetic."""

    model: str = _option(..., Panel.MAIN, "model: a local directory or a hub id")
    revision: str | None = _option(None, Panel.MODEL, "revision of a hub model")
    adapter: Path | None = _option(None, Panel.MODEL, "LoRA adapter on top of --model: a directory that peft wrote")
    quantization: Literal["nf4", "int8"] | None = _option(
        None, Panel.MODEL, "load the linear layers of --model in few bits (needs dpocli[quantization])"
    )
    trust_remote_code: bool = _option(False, Panel.MODEL, "run code that comes with the model")
    dtype: Dtype | None = _option(
        None,
        Panel.MODEL,
        "weights and activations in the forward pass (default: the cache's; else bfloat16 on CUDA devices that have it, else float32)",
    )


class DataOptions(BaseModel):
    """How source rows become pairs of tokens. All of it decides values, so all of it is in the fingerprint."""

    data: list[str] = _option(
        [],
        Panel.MAIN,
        "preference rows: .jsonl, .jsonl.gz, .json, .parquet, a directory of them, or a data set (repeatable)",
    )
    data_split: str = _option("train", Panel.DATA, "split of a data set in the datasets format")
    limit: int | None = _option(None, Panel.DATA, "use only the first N rows", ge=1)
    prompt_field: str = _option("prompt", Panel.DATA, "name of the prompt field")
    chosen_field: str = _option("chosen", Panel.DATA, "name of the field with the preferred answer")
    rejected_field: str = _option("rejected", Panel.DATA, "name of the field with the other answer")
    keep_columns: CommaList = _option([], Panel.DATA, "columns to carry along, separated by commas")
    text_as: Literal["text", "messages"] = _option(
        "text", Panel.DATA, "take text rows as they stand, or wrap them as user and assistant turns"
    )
    max_length: int = _option(2048, Panel.DATA, "tokens of prompt + the longer side", ge=2)
    truncation: Literal["keep-start", "keep-end", "drop"] = _option(
        "keep-start", Panel.DATA, "what gives way: the ends of the sides, the start of the prompt, or the pair"
    )
    scored_turns: Literal["assistant", "all"] = _option(
        "assistant", Panel.DATA, "which turns of a side of several messages are scored"
    )
    template_date: date = _option(date(2025, 1, 1), Panel.DATA, "the date that chat templates print")
    on_bad_row: Literal["error", "skip"] = _option(
        "error", Panel.DATA, "stop at a row that cannot be read, or count and list it"
    )
    max_skipped: float = _option(0.5, Panel.DATA, "share of rows that may be skipped before it is an error", ge=0, le=1)
    scratch: Path | None = _option(None, Panel.RUN, "directory for large temporary files (default: inside --out)")


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
                _option(
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

    loss: str | None = _option(
        None,
        Panel.LOSS,
        "loss, or a weighted sum such as dpo+0.2*sft (default: dpo; evaluate: the model's). There are "
        + ", ".join((*CATALOGUE, *MIXTURES)),
    )
    beta: float | None = _option(None, Panel.LOSS, "strength of the pull to the reference (default: the paper's)", gt=0)

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


class PrecomputeOptions(ModelOptions, DataOptions, Options):
    """Score every pair with the frozen reference model, once."""

    reuse: list[Path] = _option(
        [], Panel.MAIN, "old cache whose log-probs are taken over for the pairs that it holds (repeatable)"
    )
    dry_run: bool = _option(False, Panel.RUN, "tell rows, tokens, parts, bytes and expected time; touch nothing")
    verify: int | None = _option(
        None, Panel.RUN, "score N random pairs of the finished cache again, and compare; write nothing", ge=1
    )

    shard: str = _option(
        "0/1", Panel.RUN, "I/N: this worker does the tiles with index I modulo N", pattern=r"^\d+/\d+$"
    )
    launcher: Literal["torchrun", "slurm"] = _option(
        "torchrun",
        Panel.RUN,
        "whose environment says which of several processes this is: torchrun's (nothing where it did not start this), or that "
        "of srun with one process per device",
    )
    rows_per_part: int = _option(
        4096, Panel.RUN, "source rows per Parquet part (the unit that is lost when killed)", ge=1
    )

    @model_validator(mode="after")
    def _data_and_shard(self) -> Self:
        if not self.data:
            raise ValueError("data: missing; give the preference rows, for example --data prefs.jsonl")
        if self.dry_run and self.verify:
            raise ValueError("verify: --dry-run touches no cache, and --verify looks into one; give one of them")
        if self.out.resolve() in [old.resolve() for old in self.reuse]:
            raise ValueError("reuse: --out names the same cache; an old cache is never written")
        index, count = self.worker
        if not index < count:
            raise ValueError(f"shard: {self.shard} is no worker; I/N needs 0 <= I < N, so the last of N is N-1/N")
        return self

    @property
    def worker(self) -> tuple[int, int]:
        """(index, count) of this worker."""
        index, count = self.shard.split("/")
        return int(index), int(count)


class TrainOptions(LossOptions, ModelOptions, DataOptions, Options):
    """Train a policy on the pairs of a reference cache."""

    reference: Path | None = _option(
        None, Panel.MAIN, "reference cache that precompute wrote; reference-free losses take --data"
    )
    eval_reference: Path | None = _option(None, Panel.HELD_OUT, "reference cache of held-out pairs")
    eval_fraction: float = _option(
        0.0, Panel.HELD_OUT, "share of prompts held out of --reference, by a hash of the prompt", ge=0, lt=1
    )
    eval_every: int | None = _option(
        None, Panel.HELD_OUT, "steps between held-out evaluations (default: a tenth of the run)", ge=1
    )
    lora_rank: int | None = _option(
        None, Panel.ADAPTER, "train a LoRA adapter of this rank, and leave the model frozen", ge=1
    )
    lora_alpha: float | None = _option(None, Panel.ADAPTER, "scale of the adapter (default: twice the rank)", gt=0)
    lora_targets: CommaList = _option(
        ["all-linear"],
        Panel.ADAPTER,
        "names of the layers that get one, separated by commas (all-linear: all but the head)",
    )
    lora_dropout: float = _option(0.0, Panel.ADAPTER, "dropout before the adapter", ge=0, lt=1)
    lora_variant: Literal["lora", "rslora", "dora"] = _option("lora", Panel.ADAPTER, "which of the family")
    merge: bool = _option(False, Panel.ADAPTER, "also write the merged model, as OUT/merged")
    learning_rate: float | None = _option(
        None, Panel.OPTIMIZER, "peak learning rate of AdamW (default: 5e-7; 5e-6 for adapters)", gt=0
    )
    batch_size: int | None = _option(
        None,
        Panel.OPTIMIZER,
        "pairs per optimizer step, over all processes (default: 128, at most a tenth of the pairs)",
        ge=1,
    )
    epochs: int | None = _option(None, Panel.OPTIMIZER, "passes over the data (default: 1)", ge=1)
    max_steps: int | None = _option(None, Panel.OPTIMIZER, "optimizer steps, instead of --epochs", ge=1)
    lr_schedule: Literal["linear", "cosine", "constant"] = _option(
        "linear", Panel.OPTIMIZER, "decay of the learning rate after warm-up"
    )
    warmup_ratio: float = _option(
        0.1, Panel.OPTIMIZER, "share of the steps in which the learning rate rises", ge=0, lt=1
    )
    weight_decay: float = _option(0.0, Panel.OPTIMIZER, "weight decay of AdamW", ge=0)
    adam_beta1: float = _option(0.9, Panel.OPTIMIZER, "AdamW: decay of the first moment", ge=0, lt=1)
    adam_beta2: float = _option(0.999, Panel.OPTIMIZER, "AdamW: decay of the second moment", ge=0, lt=1)
    adam_epsilon: float = _option(1e-8, Panel.OPTIMIZER, "AdamW: term in the denominator", gt=0)
    max_grad_norm: float = _option(1.0, Panel.OPTIMIZER, "gradients are scaled down to this norm (0: never)", ge=0)
    seed: int = _option(0, Panel.OPTIMIZER, "order of the data and everything random", ge=0)
    gradient_checkpointing: bool = _option(
        False, Panel.MODEL, "recompute activations in the backward pass: less memory, more time"
    )
    model_dropout: bool = _option(
        False, Panel.MODEL, "keep the model's own dropout in training (default: 0 everywhere)"
    )
    router_aux_loss_coef: float = _option(
        0.0, Panel.MODEL, "weight of a mixture-of-experts router's auxiliary loss (0: off)", ge=0
    )
    save_dtype: Dtype | None = _option(None, Panel.MODEL, "dtype of the saved model (default: the source's)")
    step0_tolerance: float | None = _option(
        None, Panel.MODEL, "mean difference per token that the step-0 check allows, in nats", gt=0
    )
    log_every: int = _option(1, Panel.RUN, "steps between lines of metrics.jsonl", ge=1)
    save_every: int | None = _option(None, Panel.RUN, "steps between checkpoints (default: a tenth of the run)", ge=1)
    keep_last: int = _option(2, Panel.RUN, "checkpoints to keep", ge=1)
    track: CommaList = _option([], Panel.RUN, "also log to: tensorboard, wandb (extras)")

    def for_model(self, *, is_adapter: bool) -> Self:
        """These options once it is known what `--model` is: an adapter's directory also stands for its base.

        Raises:
            UsageError: what is trained cannot be trained that way.
        """
        trains_adapter = is_adapter or self.lora_rank is not None
        if is_adapter and self.lora_rank:
            raise UsageError("--lora-rank: --model is an adapter, which is trained on as it is; leave the option out.")
        if self.quantization and not trains_adapter:
            raise UsageError(
                f"--quantization {self.quantization}: quantized weights cannot be trained. Train an adapter on top: --lora-rank 16."
            )
        if self.merge and not trains_adapter:
            raise UsageError("--merge: there is no adapter to merge; it belongs to --lora-rank and --adapter.")
        rate = self.learning_rate or (5e-6 if trains_adapter else 5e-7)
        return self.model_copy(update={"learning_rate": rate})

    def loss_choice(self) -> LossChoice:
        """The loss to train with. Arguments and errors as for `loss_choices`."""
        choices = self.loss_choices()
        if len(choices) > 1:
            raise UsageError(
                f"--loss {self.loss}: a run trains with one loss. Write a weighted sum with +, as in {'+'.join(split_list(self.loss or ''))}, "
                "or start a run for each; evaluate takes several."
            )
        return choices[0]

    @model_validator(mode="after")
    def _inputs_fit_the_loss(self) -> Self:
        if self.reference and self.data:
            raise ValueError("data: --reference already holds the encoded pairs; give one of --reference and --data")
        if self.eval_reference and self.eval_fraction:
            raise ValueError(
                "eval_fraction: held-out pairs come from --eval-reference or from --eval-fraction, not both"
            )
        if self.epochs and self.max_steps:
            raise ValueError("max_steps: the length of the run is set by --epochs or by --max-steps, not both")
        if unknown := set(self.track) - {"tensorboard", "wandb"}:
            raise ValueError(f"track: {', '.join(sorted(unknown))} is not known; tensorboard and wandb are")
        if self.dtype == "float16":
            raise ValueError("dtype: gradients vanish in the narrow range of float16; train in bfloat16 or float32")
        for name in ("lora_alpha", "lora_targets", "lora_dropout", "lora_variant"):
            if self.lora_rank is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: describes a new adapter, and there is none; give --lora-rank too")
        if self.lora_rank and self.adapter:
            raise ValueError("lora_rank: --adapter is trained on as it is; give one of the two")
        if self.eval_every and not (self.eval_reference or self.eval_fraction):
            raise ValueError("eval_every: there are no held-out pairs; give --eval-reference or --eval-fraction")
        _no_idle_data_options(self)
        return self


class EvaluateOptions(LossOptions, ModelOptions, DataOptions, Options):
    """Reward accuracy and margins of a policy over a cache."""

    reference: Path | None = _option(None, Panel.MAIN, "reference cache of the pairs to evaluate on")

    @model_validator(mode="after")
    def _one_input(self) -> Self:
        if bool(self.reference) == bool(self.data):
            raise ValueError(
                "reference: give one of --reference (a cache) and --data (rows, for reference-free losses)"
            )
        _no_idle_data_options(self)
        return self


def _no_idle_data_options(options: TrainOptions | EvaluateOptions) -> None:
    """With a cache, nothing is read or encoded, so options about it would be ignored: an error rather than a surprise."""
    if options.data:
        return
    for name, field in DataOptions.model_fields.items():
        if name not in ("data", "scratch") and getattr(options, name) != field.default:
            raise ValueError(
                f"{name}: has no effect here, since the pairs of --reference are encoded; it belongs to precompute"
            )
