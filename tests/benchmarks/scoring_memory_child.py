"""One measurement of `scoring_memory.py`, in its own process: prints a JSON object as the last line of stdout.

It imports dpocli or TRL, never both, so that it runs in either environment. Both sides build the same model and the
same pairs from the seed; that they did is seen from the log-probs, which the parent compares.
"""

import ctypes
import gc
import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

VOCABULARY = 49_152
NUM_PAIRS = 8
BETA = 0.1
SEED = 0
PACKAGES = ("torch", "transformers", "accelerate", "trl", "dpocli")


@dataclass(frozen=True)
class Pair:
    """Random tokens, and reference log-probs as of a uniform reference."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def reference(self) -> tuple[float, float]:
        """Sums of the two sides, nats."""
        return -math.log(VOCABULARY) * len(self.chosen_ids), -math.log(VOCABULARY) * len(self.rejected_ids)


@dataclass(frozen=True)
class Outcome:
    """What one process measured and computed."""

    before: int
    """Resident bytes just before the measured part."""
    peak: int
    """Largest number of resident bytes during it."""
    sums: list[list[float]] = field(default_factory=list)
    """Scoring: per pair, summed log-probs of the chosen and of the rejected side."""
    loss: float | None = None
    grad_norm: float | None = None
    """Training step: the batch's DPO loss, and the norm of its gradient."""
    versions: dict[str, str] = field(default_factory=dict)


class PeakMemory:
    """Resident memory of this process while the block runs, from the kernel's own high-water mark (Linux).

    The mark (VmHWM) is set back at the start, so that what loading the model took does not count.
    """

    before = peak = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.peak = _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def random_model() -> PreTrainedModel:
    """A Llama of 25 million parameters with tied embeddings, float32, its log-probs far from uniform."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    return LlamaForCausalLM(config).float().eval()


def random_pairs(count: int, shortest: int, longest: int, seed: int) -> list[Pair]:
    """Pairs whose prompt and sides have from `shortest` to `longest` tokens each."""
    generator = np.random.default_rng(seed)
    lengths = generator.integers(shortest, longest + 1, size=(count, 3))
    return [Pair(*(generator.integers(3, VOCABULARY, size=length).tolist() for length in row)) for row in lengths]


def measured_pairs() -> list[Pair]:
    """The batch: rows of 300 to 700 tokens."""
    return random_pairs(NUM_PAIRS, 150, 350, SEED)


def warm_up_pairs() -> list[Pair]:
    """So small that they leave no trace, they pay for everything that is made once: threads, late imports, buffers."""
    return random_pairs(1, 4, 8, SEED + 1)


def grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole: list[Tensor] = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return float(torch.stack([grad.double().square().sum() for grad in whole]).sum().sqrt())


def dpocli_scoring(*, budget: bool, checkpointing: bool) -> Outcome:
    """`PairScorer` without gradients, as `precompute` calls it."""
    from dpocli.data.batches import PairBatch
    from dpocli.objective.logps import Wanted, pair_logps
    from dpocli.objective.scoring import PairScorer

    del checkpointing  # without gradients there is nothing to checkpoint
    scorer = PairScorer(random_model())

    def score(pairs: list[Pair]) -> list[list[float]]:
        sums: list[list[float]] = [[]] * len(pairs)
        for members in _micro_batches(pairs, budget):
            encoded = _encoded([pairs[index] for index in members])
            batch = PairBatch.of(encoded)
            with torch.no_grad():
                logps = pair_logps(scorer(batch), batch, encoded, Wanted())
            columns = zip(logps.policy_chosen.tolist(), logps.policy_rejected.tolist(), strict=True)
            for index, both in zip(members, columns, strict=True):
                sums[index] = list(both)
        return sums

    pairs = measured_pairs()
    score(warm_up_pairs())
    with PeakMemory() as memory:
        sums = score(pairs)
    return Outcome(memory.before, memory.peak, sums=sums)


def dpocli_training(*, budget: bool, checkpointing: bool) -> Outcome:
    """Forward and backward pass of the DPO loss in `train`'s own engine, one process."""
    from dpocli.config.loss_choice import LossChoice
    from dpocli.config.models import TrainOptions
    from dpocli.data.batches import PairBatch
    from dpocli.engine.mesh import joined
    from dpocli.engine.policy import Policy
    from dpocli.objective import losses
    from dpocli.objective.logps import Wanted, pair_logps
    from dpocli.objective.scoring import PairScorer

    choice = LossChoice.of("dpo", {"beta": BETA})
    options = TrainOptions(
        out=Path("unused"), model="unused", reference=Path("unused"), gradient_checkpointing=checkpointing
    )
    device = torch.device("cpu")
    with joined(device, even_alone=True) as processes:
        policy = Policy(PairScorer(random_model()), options, torch.float32, processes)

        def step(pairs: list[Pair]) -> float:
            total = 0.0
            for members in _micro_batches(pairs, budget):
                encoded = _encoded([pairs[index] for index in members])
                batch = PairBatch.of(encoded)
                logps = pair_logps(policy.scorer(batch), batch, encoded, Wanted(reference=True))
                loss = losses.compute(choice, logps).losses.sum() / len(pairs)
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            return total

        pairs = measured_pairs()
        step(warm_up_pairs())
        policy.scorer.zero_grad()
        with PeakMemory() as memory:
            loss = step(pairs)
        norm = grad_norm(policy.scorer.parameters())
    return Outcome(memory.before, memory.peak, loss=loss, grad_norm=norm)


def _micro_batches(pairs: list[Pair], budget: bool) -> list[list[int]]:
    """Members of each pass: all pairs at once, or cut by the commands' default token budget."""
    if not budget:
        return [list(range(len(pairs)))]
    from dpocli.data.batches import pack
    from dpocli.engine.passes import token_budget

    lengths = [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    return pack(lengths, token_budget(None, torch.device("cpu")))


def _encoded(pairs: list[Pair]) -> list[Any]:
    from dpocli.data.preference import EncodedPair, ReferenceLogps

    def uniform(ids: list[int]) -> Any:
        return np.full(len(ids), -math.log(VOCABULARY), dtype=np.float32)

    return [
        EncodedPair(
            row=row,
            pair_id=f"{row:032x}",
            prompt_ids=np.array(pair.prompt_ids, dtype=np.int32),
            chosen_ids=np.array(pair.chosen_ids, dtype=np.int32),
            rejected_ids=np.array(pair.rejected_ids, dtype=np.int32),
            reference=ReferenceLogps(uniform(pair.chosen_ids), uniform(pair.rejected_ids)),
        )
        for row, pair in enumerate(pairs)
    ]


def trl_scoring(*, budget: bool, checkpointing: bool) -> Outcome:
    """What `DPOTrainer(precompute_ref_log_probs=True)` runs in its constructor: the reference scores the data set."""
    from datasets import Dataset
    from trl import DPOTrainer  # type: ignore[import-not-found]

    outcomes: list[Outcome] = []

    class Scoring(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset  # has its token ids already

        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
            super()._precompute_ref_logps(_table(warm_up_pairs()), name, batch_size)
            with PeakMemory() as memory:
                scored = super()._precompute_ref_logps(dataset, name, batch_size)
            sums = [[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in scored]
            outcomes.append(Outcome(memory.before, memory.peak, sums=sums))
            return scored

    with tempfile.TemporaryDirectory() as directory:
        _trl_trainer(Scoring, _table(measured_pairs()), directory, checkpointing)
    return outcomes[0]


def trl_training(*, budget: bool, checkpointing: bool) -> Outcome:
    """The first `training_step` of `DPOTrainer.train()`: `compute_loss` and the backward pass."""
    from datasets import Dataset
    from trl import DPOTrainer

    outcomes: list[Outcome] = []

    class Training(DPOTrainer):  # type: ignore[misc]
        def _prepare_dataset(self, dataset: Dataset, *_: object) -> Dataset:
            return dataset

        def _precompute_ref_logps(self, dataset: Dataset, name: str, batch_size: int) -> Dataset:
            return dataset  # has its reference columns already

        def training_step(self, model: nn.Module, inputs: dict[str, Any], *rest: Any, **named: Any) -> Tensor:
            super().training_step(model, self.data_collator(list(_table(warm_up_pairs(), reference=True))))
            model.zero_grad()
            with PeakMemory() as memory:
                loss: Tensor = super().training_step(model, inputs, *rest, **named)
            outcomes.append(
                Outcome(memory.before, memory.peak, loss=float(loss), grad_norm=grad_norm(model.parameters()))
            )
            return loss

    with tempfile.TemporaryDirectory() as directory:
        _trl_trainer(Training, _table(measured_pairs(), reference=True), directory, checkpointing).train()
    return outcomes[0]


def _table(pairs: list[Pair], *, reference: bool = False) -> Any:
    from datasets import Dataset

    rows = [asdict(pair) for pair in pairs]
    if reference:
        for row, pair in zip(rows, pairs, strict=True):
            row["ref_chosen_logps"], row["ref_rejected_logps"] = pair.reference
    return Dataset.from_list(rows)


def _trl_trainer(kind: Callable[..., Any], table: Any, directory: str, checkpointing: bool) -> Any:
    """TRL's defaults but for float32 (its own is bfloat16 autocast), one step, and no reports, files or progress."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl import DPOConfig

    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    words = Tokenizer(WordLevel({word: number for number, word in enumerate(special.values())}, unk_token="<pad>"))
    arguments = DPOConfig(
        output_dir=directory,
        per_device_train_batch_size=NUM_PAIRS,
        precompute_ref_log_probs=True,
        gradient_checkpointing=checkpointing,
        beta=BETA,
        bf16=False,
        use_cpu=True,
        max_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    return kind(
        model=random_model(),
        args=arguments,
        train_dataset=table,
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, **special),
    )


MEASUREMENTS: dict[tuple[str, str], Callable[..., Outcome]] = {
    ("dpocli", "scoring"): dpocli_scoring,
    ("dpocli", "training"): dpocli_training,
    ("trl", "scoring"): trl_scoring,
    ("trl", "training"): trl_training,
}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"python": sys.version.split()[0], "threads": str(torch.get_num_threads())}


def main(tool: str, phase: str, *flags: str) -> None:
    os.environ["TQDM_DISABLE"] = "1"
    outcome = MEASUREMENTS[tool, phase](budget="budget" in flags, checkpointing="checkpointing" in flags)
    print(json.dumps(asdict(outcome) | {"versions": _versions()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
