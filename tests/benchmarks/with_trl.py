"""TRL's `DPOTrainer` as a contender, at its defaults but for what the arguments say."""

import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import measuring
import trl.trainer.utils  # type: ignore[import-not-found]
from datasets import Dataset
from measuring import Outcome, Pair, PeakMemory, Stopwatch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import DPOConfig, DPOTrainer


def scored(model: Path, pairs: list[Pair], *, batch: int, restricted: bool = False) -> Outcome:
    """What `DPOTrainer(precompute_ref_log_probs=True)` runs in its constructor: the reference scores the data set.

    The time ends with the last batch: what is done with the log-probs afterwards does not count, here as elsewhere.

    Args:
        model: the reference's directory.
        pairs: to score, in this order.
        batch: pairs in a padded batch.
        restricted: see `_restrict_head`.
    """
    outcomes: list[Outcome] = []

    class Scoring(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset  # has its token ids already

        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
            self.watch = Stopwatch()
            super()._precompute_ref_logps(_table(measuring.warm_up_pairs(), reference=False), name, batch_size)
            with PeakMemory() as memory:
                self.watch = Stopwatch()
                scored = super()._precompute_ref_logps(dataset, name, batch_size)
            sums = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in scored]
            outcomes.append(Outcome(memory.before, memory.peak, self.watch.seconds, sums=sums))
            return scored

        def compute_ref_log_probs(self, model: nn.Module, inputs: dict[str, Any]) -> Any:
            logps = super().compute_ref_log_probs(model, inputs)
            self.watch.lap()
            return logps

    if restricted:
        _restrict_head()
    with tempfile.TemporaryDirectory() as directory:
        _trainer(Scoring, model, _table(pairs, reference=False), directory, batch)
    return outcomes[0]


def trained(
    model: Path, pairs: list[Pair], *, batch: int, restricted: bool = False, checkpointing: bool = False
) -> Outcome:
    """The training steps of one optimizer step of `DPOTrainer.train()`: `compute_loss` and the backward pass.

    Args:
        model: the policy's directory.
        pairs: those of the optimizer step, with reference log-probs; TRL shuffles them.
        batch: pairs in a padded batch; gradients are accumulated over the batches.
        restricted: see `_restrict_head`.
        checkpointing: of gradients.
    """
    outcomes: list[Outcome] = []
    accumulation, rest = divmod(len(pairs), batch)
    assert not rest, "TRL weights batches alike, so a smaller last one would change the gradient"

    class Training(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
            return dataset  # has its reference columns already

        def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
            if not self.losses:
                super().training_step(
                    model, self.data_collator(list(_table(measuring.warm_up_pairs(), reference=True)))
                )
                model.zero_grad()
                self.memory = self.stack.enter_context(PeakMemory())
                self.watch = Stopwatch()
            loss: Tensor = super().training_step(model, inputs, *rest, **named)
            self.losses.append(float(loss))
            if len(self.losses) == accumulation:
                self.watch.lap()
                self.stack.close()
                norm = measuring.grad_norm(model.parameters())
                memory, seconds = self.memory, self.watch.seconds
                outcomes.append(Outcome(memory.before, memory.peak, seconds, loss=sum(self.losses), grad_norm=norm))
            return loss

    if restricted:
        _restrict_head()
    with tempfile.TemporaryDirectory() as directory:
        trainer = _trainer(
            Training, model, _table(pairs, reference=True), directory, batch, accumulation, checkpointing
        )
        trainer.losses, trainer.stack = [], ExitStack()
        trainer.train()
    return outcomes[0]


def _restrict_head() -> None:
    """Makes TRL's fused head skip the positions of prompts and padding.

    It does so by itself where it has its Triton kernel, and asks for that first. Here the question is answered with yes
    where positions are picked, and with no, as before, where the kernel would start: so the decoder runs on the padded
    batch, the states that predict completion tokens are picked, and TRL's own plain torch operations score them.
    """
    assert hasattr(trl.trainer.utils, "_use_triton"), "this TRL picks positions in another way"
    trl.trainer.utils._use_triton = lambda _: True


def _table(pairs: list[Pair], *, reference: bool) -> Dataset:
    rows = []
    for pair in pairs:
        row: dict[str, Any] = {name: getattr(pair, name) for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        if reference:
            row["ref_chosen_logps"], row["ref_rejected_logps"] = pair.reference_sums
        rows.append(row)
    return Dataset.from_list(rows)


def _trainer(
    kind: Callable[..., Any],
    model: Path,
    table: Dataset,
    directory: str,
    batch: int,
    accumulation: int = 1,
    checkpointing: bool = False,
) -> Any:
    """TRL's defaults but for float32 (its own is bfloat16 autocast), one step, and no reports, files or progress."""
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(special.values())}, unk_token="<pad>"))
    arguments = DPOConfig(
        output_dir=directory,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        precompute_ref_log_probs=True,
        gradient_checkpointing=checkpointing,
        beta=measuring.BETA,
        bf16=False,
        use_cpu=True,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return kind(
        model=AutoModelForCausalLM.from_pretrained(model, dtype="float32"),
        args=arguments,
        train_dataset=table,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
    )
