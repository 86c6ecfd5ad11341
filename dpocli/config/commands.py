"""The options of the three commands: what they share and what is their own, and what does not go together."""

import os
from pathlib import Path
from typing import Literal, Self

from pydantic import model_validator

from dpocli.config.gates import Gate
from dpocli.config.loss_expression import LossChoice, split_list
from dpocli.config.options import (
    NEW_ADAPTER_SETTINGS,
    AdapterOptions,
    CommaList,
    DataOptions,
    Dtype,
    LoadingOptions,
    LossOptions,
    ModelOptions,
    OptimizerOptions,
    Options,
    Panel,
    Several,
    StoppingOptions,
    option,
)
from dpocli.errors import UsageError


class PrecomputeOptions(ModelOptions, DataOptions, Options):
    """Score every pair with the frozen reference model, once."""

    reuse: list[Path] = option(
        [], Panel.MAIN, "old cache whose log-probs are taken over for the pairs that it holds (repeatable)"
    )
    dry_run: bool = option(False, Panel.RUN, "tell rows, tokens, parts, bytes and expected time; touch nothing")
    verify: int | None = option(
        None, Panel.RUN, "score N random pairs of the finished cache again, and compare; write nothing", ge=1
    )

    shard: str = option("0/1", Panel.RUN, "I/N: this worker does the tiles with index I modulo N", pattern=r"^\d+/\d+$")
    rows_per_part: int = option(
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


class TrainOptions(LossOptions, OptimizerOptions, AdapterOptions, StoppingOptions, ModelOptions, DataOptions, Options):
    """Train a policy on the pairs of a reference cache."""

    reference: Path | None = option(
        None, Panel.MAIN, "reference cache that precompute wrote; reference-free losses take --data"
    )
    eval_reference: Path | None = option(None, Panel.HELD_OUT, "reference cache of held-out pairs")
    eval_fraction: float = option(
        0.0, Panel.HELD_OUT, "share of prompts held out of --reference, by a hash of the prompt", ge=0, lt=1
    )
    eval_every: int | None = option(
        None, Panel.HELD_OUT, "steps between held-out evaluations (default: a tenth of the run)", ge=1
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
        "keep the checkpoint that is the best on the held-out pairs, beside --keep-last, and make OUT/model of it",
    )
    cpu_offload: bool = option(
        False, Panel.MODEL, "keep weights and optimizer in the memory of the host: less device memory, more time"
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
    log_every: int = option(1, Panel.RUN, "steps between lines of metrics.jsonl", ge=1)
    save_every: int | None = option(None, Panel.RUN, "steps between checkpoints (default: a tenth of the run)", ge=1)
    keep_last: int = option(2, Panel.RUN, "checkpoints to keep, beside the newest that is known to be good", ge=1)
    track: CommaList = option([], Panel.RUN, "also log to: tensorboard, wandb (extras)")
    dry_run: bool = option(False, Panel.RUN, "tell pairs, steps, micro-batches, parameters and memory; write nothing")

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
        for name in NEW_ADAPTER_SETTINGS:
            if self.lora_rank is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name}: describes a new adapter, and there is none; give --lora-rank too")
        if self.lora_rank and self.adapter:
            raise ValueError("lora_rank: --adapter is trained on as it is; give one of the two")
        for name in ("eval_every", "early_stopping", "keep_best"):
            if getattr(self, name) and not (self.eval_reference or self.eval_fraction):
                raise ValueError(f"{name}: there are no held-out pairs; give --eval-reference or --eval-fraction")
        _no_idle_data_options(self)
        return self


class EvaluateOptions(LossOptions, LoadingOptions, DataOptions, Options):
    """Reward accuracy and margins of a policy, or of several, over a cache."""

    model: Several = option(
        ...,
        Panel.MAIN,
        "model: a local directory, a run's checkpoint or a hub id; repeatable: the first is compared with each other",
    )
    reference: Path | None = option(None, Panel.MAIN, "reference cache of the pairs to evaluate on")
    show_pairs: int = option(
        10, Panel.MAIN, "pairs with the lowest and with the highest margins that report.html shows token by token", ge=0
    )
    second_reference: Path | None = option(
        None, Panel.MAIN, "another reference's cache of the same pairs: its accuracy, and the rewards against it"
    )
    require: list[str] = option(
        [], Panel.MAIN, 'figure that must hold, else exit 6: "reward_accuracy>=0.65" (repeatable)'
    )
    slice_by: CommaList = option([], Panel.MAIN, "kept columns to slice the pairs by, separated by commas")

    @property
    def gates(self) -> list[Gate]:
        return [Gate.of(text) for text in self.require]

    def of_model(self, model: str) -> ModelOptions:
        """How one of the models is loaded."""
        loading = {name: getattr(self, name) for name in LoadingOptions.model_fields if name in self.model_fields_set}
        return ModelOptions(model=model, **loading)

    @model_validator(mode="after")
    def _models_and_gates(self) -> Self:
        for name in ("adapter", "revision"):
            if len(self.model) > 1 and getattr(self, name):
                raise ValueError(
                    f"{name}: belongs to one --model, and there are {len(self.model)}; give directories (that of an adapter "
                    "stands for its base with the adapter)"
                )
        places = [os.path.realpath(model) if os.path.exists(model) else model for model in self.model]
        if twice := [model for model, place in zip(self.model, places, strict=True) if places.count(place) > 1]:
            raise ValueError(f"model: {' and '.join(dict.fromkeys(twice))}: given twice")
        if self.second_reference and not self.reference:
            raise ValueError("second_reference: there is no first; give --reference")
        for text in self.require:
            try:
                Gate.of(text)
            except ValueError as error:
                raise ValueError(f"require: {error}") from None
        return self

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
