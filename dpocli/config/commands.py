"""The options of the three commands: sections put together, and which options exclude each other."""

import os
from pathlib import Path
from typing import Self

from pydantic import model_validator

from dpocli.config.gates import Gate
from dpocli.config.loss_expression import LossChoice, split_list
from dpocli.config.options import (
    CommaList,
    DataOptions,
    LoadingOptions,
    LossOptions,
    ModelOptions,
    Options,
    Panel,
    Several,
    option,
)
from dpocli.config.training_options import (
    CheckpointOptions,
    HeldOutOptions,
    LoggingOptions,
    LoraOptions,
    OptimizerOptions,
    PolicyOptions,
)
from dpocli.errors import UsageError


class PrecomputeOptions(Options):
    """Score every pair with the frozen reference model, once."""

    model: ModelOptions
    data: DataOptions = DataOptions()
    reuse: list[Path] = option(
        [], Panel.MAIN, "old cache whose log-probs are reused for the pairs that it holds (repeatable)"
    )
    dry_run: bool = option(
        False, Panel.RUN, "report rows, tokens, parts, bytes and expected time; read only, write nothing"
    )
    verify: int | None = option(
        None, Panel.RUN, "score N random pairs of the finished cache again, and compare; write nothing", ge=1
    )
    shard: str = option(
        "0/1", Panel.RUN, "I/N: this worker fills the parts with index I modulo N", pattern=r"^\d+/\d+$"
    )
    rows_per_part: int = option(
        4096, Panel.RUN, "source rows per Parquet part, the unit that is lost when killed", ge=1
    )

    @model_validator(mode="after")
    def _data_and_shard(self) -> Self:
        if not self.data.files:
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


class TrainOptions(Options):
    """Train a policy on the pairs of a reference cache."""

    model: ModelOptions
    reference: Path | None = option(
        None, Panel.MAIN, "reference cache that precompute wrote; reference-free losses take --data"
    )
    data: DataOptions = DataOptions()
    loss: LossOptions = LossOptions()
    optimizer: OptimizerOptions = OptimizerOptions()
    lora: LoraOptions = LoraOptions()
    held_out: HeldOutOptions = HeldOutOptions()
    policy: PolicyOptions = PolicyOptions()
    checkpoints: CheckpointOptions = CheckpointOptions()
    logging: LoggingOptions = LoggingOptions()
    seed: int = option(0, Panel.OPTIMIZER, "order of the data and everything random", ge=0)
    dry_run: bool = option(False, Panel.RUN, "report pairs, steps, micro-batches, parameters and memory; write nothing")

    def for_model(self, *, is_adapter: bool) -> Self:
        """Fill in the defaults that depend on what `--model` is; an adapter's directory also names its base.

        Raises:
            UsageError: what is trained cannot be trained that way.
        """
        trains_adapter = is_adapter or self.lora.rank is not None
        if is_adapter and self.lora.rank:
            raise UsageError("--lora-rank: --model is an adapter, which is trained as it is; leave the option out.")
        if (quantization := self.model.quantization) and not trains_adapter:
            raise UsageError(
                f"--quantization {quantization}: quantized weights cannot be trained. Train an adapter on top: --lora-rank 16."
            )
        if self.lora.merge and not trains_adapter:
            raise UsageError("--merge: there is no adapter to merge; it belongs to --lora-rank and --adapter.")
        rate = self.optimizer.learning_rate or (5e-6 if trains_adapter else 5e-7)
        return self.model_copy(update={"optimizer": self.optimizer.model_copy(update={"learning_rate": rate})})

    def loss_choice(self) -> LossChoice:
        """The loss to train with. Errors as for `LossOptions.loss_choices`."""
        choices = self.loss.loss_choices()
        if len(choices) > 1:
            sum_of_all = "+".join(split_list(self.loss.name or ""))
            raise UsageError(
                f"--loss {self.loss.name}: a run trains with one loss. Write a weighted sum with +, as in {sum_of_all}, "
                "or start a run for each; evaluate takes several."
            )
        return choices[0]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.reference and self.data.files:
            raise ValueError("data: --reference already holds the encoded pairs; give one of --reference and --data")
        if self.held_out.reference and self.held_out.fraction:
            raise ValueError(
                "eval_fraction: held-out pairs come from --eval-reference or from --eval-fraction, not both"
            )
        if self.optimizer.epochs and self.optimizer.max_steps:
            raise ValueError("max_steps: the length of the run is set by --epochs or by --max-steps, not both")
        if unknown := set(self.logging.track) - {"tensorboard", "wandb"}:
            raise ValueError(f"track: {', '.join(sorted(unknown))} is not known; tensorboard and wandb are")
        if self.model.dtype == "float16":
            raise ValueError("dtype: gradients vanish in the narrow range of float16; train in bfloat16 or float32")
        if self.lora.rank is None and (idle := self.lora.changed(but=("merge",))):
            raise ValueError(f"lora_{idle[0]}: describes a new adapter, and there is none; give --lora-rank too")
        if self.lora.rank and self.model.adapter:
            raise ValueError("lora_rank: --adapter is trained as it is; give one of the two")
        if not self.held_out.is_given:
            for key, value in (
                ("eval_every", self.held_out.every),
                ("early_stopping", self.held_out.early_stopping),
                ("keep_best", self.held_out.keep_best),
            ):
                if value:
                    raise ValueError(f"{key}: there are no held-out pairs; give --eval-reference or --eval-fraction")
        _refuse_idle_data_options(self.data)
        return self


class EvaluateOptions(Options):
    """Reward accuracy and margins of a policy, or of several, over a cache."""

    models: Several = option(
        ...,
        Panel.MAIN,
        "model: a local directory, a run's checkpoint or a hub id; repeatable: the first is compared with each other",
        alias="model",
    )
    reference: Path | None = option(None, Panel.MAIN, "reference cache of the pairs to evaluate on")
    data: DataOptions = DataOptions()
    loss: LossOptions = LossOptions()
    loading: LoadingOptions = LoadingOptions()
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
        given = {name: getattr(self.loading, name) for name in self.loading.model_fields_set}
        return ModelOptions(name=model, **given)

    @model_validator(mode="after")
    def _models_and_gates(self) -> Self:
        for name in ("adapter", "revision"):
            if len(self.models) > 1 and getattr(self.loading, name):
                raise ValueError(
                    f"{name}: belongs to one --model, and there are {len(self.models)}; give directories (that of an adapter "
                    "names its base too)"
                )
        places = [os.path.realpath(model) if os.path.exists(model) else model for model in self.models]
        if twice := [model for model, place in zip(self.models, places, strict=True) if places.count(place) > 1]:
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
        if bool(self.reference) == bool(self.data.files):
            raise ValueError(
                "reference: give one of --reference (a cache) and --data (rows, for reference-free losses)"
            )
        _refuse_idle_data_options(self.data)
        return self


def _refuse_idle_data_options(data: DataOptions) -> None:
    """With a cache nothing is read or encoded, so options about it would be ignored: an error, not a surprise."""
    if data.files:
        return
    if idle := data.changed(but=("files", "scratch")):
        raise ValueError(
            f"{idle[0]}: has no effect here, since the pairs of --reference are encoded; it belongs to precompute"
        )
