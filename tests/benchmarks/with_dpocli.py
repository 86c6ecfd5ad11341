"""dpocli as a contender: scoring and a training step through the code that its commands run."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import measuring
import numpy as np
import torch
from measuring import Outcome, Pair, PeakMemory, Stopwatch
from torch import Tensor

from dpocli.cache.reader import PairStore
from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.config.loss_expression import LossChoice
from dpocli.config.options import ModelOptions
from dpocli.console.progress import Progress
from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout, pack
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.distributed.processes import Processes, init_processes
from dpocli.model import load
from dpocli.model.identity import ModelFiles
from dpocli.model.load import load_model
from dpocli.objective import losses
from dpocli.objective.logps import LogpColumns
from dpocli.scoring import head as head_module
from dpocli.scoring import scorer as scoring
from dpocli.scoring.head import Head, token_logps
from dpocli.scoring.layout import TokenRows
from dpocli.scoring.passes import reference_logps, token_budget
from dpocli.scoring.scorer import PairScorer
from dpocli.scoring.throughput import Throughput, matmul_rate
from dpocli.training.gradients import GlobalBatch, Gradients, Step
from dpocli.training.policy import Policy

CPU = torch.device("cpu")
ALONE = Processes(0, 1, CPU)
UNLIMITED = 10**9
"""A token budget that puts all pairs into one pass."""


def scored(model: Path, pairs: list[Pair], *, without: str | None = None, budget: int | None = None) -> Outcome:
    """Log-probs of both sides without gradients, as `precompute` makes them.

    Args:
        model: the reference's directory.
        pairs: to score.
        without: one of `ABLATIONS`, to be switched off.
        budget: tokens of a pass (default: that of the commands).
    """
    with _switched_off(without):
        scorer = _scorer(model, without, budget)
        throughput = Throughput(scorer)
        _reference(scorer, encoded(measuring.warm_up_pairs()))
        todo = [replace(pair, reference=None) for pair in encoded(pairs)]
        with PeakMemory() as memory, throughput.clock():
            watch = Stopwatch()
            done = _reference(scorer, todo)
            watch.lap()
    return Outcome(
        memory.before,
        memory.peak,
        watch.seconds,
        sums=[list(pair.reference_sums) for pair in done],
        logps=[(pair.reference.chosen.tolist(), pair.reference.rejected.tolist()) for pair in done if pair.reference],
        floor_flops=throughput.flops(),
        flops_per_second=matmul_rate(scorer),
    )


def trained(
    model: Path,
    pairs: list[Pair],
    *,
    without: str | None = None,
    budget: int | None = None,
    checkpointing: bool = False,
    live: bool = False,
    cache: Path | None = None,
) -> Outcome:
    """Forward and backward pass of the DPO loss over one batch in `train`'s own engine, one process, no optimizer.

    Args:
        model: the policy's directory.
        pairs: one batch, with reference log-probs.
        without: one of `ABLATIONS`, to be switched off.
        budget: tokens of a pass (default: that of the commands).
        checkpointing: of gradients.
        live: a frozen copy of the model scores the batch just before, and its log-probs are used.
        cache: one from which to read as many pairs, outside the measured part.
    """
    choice = LossChoice.of("dpo", {"beta": measuring.BETA})
    options = build_options(
        TrainOptions, out=Path("unused"), model="unused", reference=Path("unused"), gradient_checkpointing=checkpointing
    )
    wanted = LogpColumns(reference=True)
    with _switched_off(without), init_processes(CPU, even_alone=True) as processes:
        frozen = _scorer(model, without, budget) if live else None
        policy = Policy(_scorer(model, without, budget), options, torch.float32, processes)
        throughput = Throughput(policy.scorer, backward=True)
        gradients = Gradients(policy, choice, wanted, 0.0, measuring.SEED)

        def step(batch: list[EncodedPair]) -> float:
            if frozen is not None:
                batch = _reference(frozen, batch)
            packing = policy.scorer.packing
            sizes = [packing.layout.size(*map(len, pair.all_ids)) for pair in batch]
            passes = [(np.array(members), [batch[index] for index in members]) for members in pack(sizes, packing)]
            together = GlobalBatch(np.arange(len(batch)), wanted, processes)
            weights = torch.ones(len(batch), dtype=torch.float64)
            logps, states = gradients.accumulate(Step(1, passes, together, weights), {})
            return float(losses.compute(choice, logps, states).losses.mean())

        todo = encoded(pairs)
        step(encoded(measuring.warm_up_pairs()))
        policy.scorer.zero_grad()
        with PeakMemory() as memory, throughput.clock():
            watch = Stopwatch()
            loss = step(todo)
            watch.lap()
        return Outcome(
            memory.before,
            memory.peak,
            watch.seconds,
            loss=loss,
            grad_norm=measuring.grad_norm(policy.scorer.parameters()),
            floor_flops=throughput.flops(),
            flops_per_second=matmul_rate(policy.scorer),
            cache_seconds=None if cache is None else _reading_seconds(cache, len(pairs)),
        )


def encoded(pairs: list[Pair]) -> list[EncodedPair]:
    """As the commands hold them."""
    return [
        EncodedPair(
            row=row,
            pair_id=f"{row:032x}",
            prompt_ids=np.array(pair.prompt_ids, dtype=np.int32),
            chosen_ids=np.array(pair.chosen_ids, dtype=np.int32),
            rejected_ids=np.array(pair.rejected_ids, dtype=np.int32),
            reference=pair.reference and ReferenceLogps(*(np.array(side, dtype=np.float32) for side in pair.reference)),
        )
        for row, pair in enumerate(pairs)
    ]


def _reference(scorer: PairScorer, pairs: list[EncodedPair]) -> list[EncodedPair]:
    return reference_logps(scorer, pairs, Progress(), lambda: None, ALONE)


def _reading_seconds(cache: Path, count: int) -> float:
    store = PairStore.open(cache)
    watch = Stopwatch()
    store.load(range(min(count, len(store))))
    watch.lap()
    return watch.seconds


def _scorer(model: Path, without: str | None, budget: int | None) -> PairScorer:
    kind = _EveryPosition if without == "completion positions only" else PairScorer
    tokens = 16 if without == "several pairs a pass" else token_budget(budget, CPU)
    scorer = kind(
        load_model(ModelFiles(model), ModelOptions(model=str(model)), torch.float32, CPU), token_budget=tokens
    )
    without_layout = {"shared prompts": Layout.PACKED, "packed rows": Layout.PADDED}
    scorer.lay_out(without_layout.get(without or "", Layout.SHARED))
    return scorer


def _switched_off(part: str | None) -> AbstractContextManager[object]:
    """Puts something simpler in the place of what is switched off, where that is no layout."""
    match part:
        case "tiles of the vocabulary":
            return patch.object(scoring, "token_logps", _untiled)
        case "completion positions only":
            return patch.object(scoring, "token_logps", _of_every_position)
        case "logits kept for the backward pass":
            return patch.object(head_module, "CPU_CACHED_BYTES", 0)
        case "memory kept when freed":
            return patch.object(load, "keep_freed_memory", lambda: None)
        case _:
            return nullcontext()


def _untiled(hidden: Tensor, head: Head, targets: Tensor, *, collision: bool = False) -> tuple[Tensor, Tensor | None]:
    """All logits of a pass at once, and torch's own softmax and gradient."""
    log_probs = torch.log_softmax(head.logits(hidden, slice(None)), dim=-1)
    return log_probs.gather(-1, targets[:, None])[:, 0], None


class _EveryPosition(PairScorer):
    """Its head gets the states of every position: first those that predict something, as ever, then the others."""

    def _rows(self, batch: PairBatch) -> TokenRows:
        rows = super()._rows(batch)
        others = torch.ones(rows.input_ids.numel(), dtype=torch.bool)
        others[rows.predicting] = False
        return replace(rows, predicting=torch.cat([rows.predicting, others.nonzero()[:, 0]]))


def _of_every_position(
    hidden: Tensor, head: Head, targets: Tensor, *, collision: bool = False
) -> tuple[Tensor, Tensor | None]:
    """The head as ever; of the positions that predict nothing, it looks for token 0, and nobody looks at that."""
    padded = torch.nn.functional.pad(targets, (0, len(hidden) - len(targets)))
    logps, collisions = token_logps(hidden, head, padded, collision=collision)
    return logps[: len(targets)], None if collisions is None else collisions[: len(targets)]
