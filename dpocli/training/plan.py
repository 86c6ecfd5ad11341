"""The plan: what a training will do, and what it will take. Printed before the first step, and by `--dry-run`."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpocli.cache.view import PairView
from dpocli.console.console import Console, Printer
from dpocli.data.packing import Packing, deal
from dpocli.model.load import dtype_name
from dpocli.training.schedule import DEFAULT_BATCH_SIZE, Schedule, warmup_steps
from dpocli.training.token_budget import WEIGHT_BYTES, bytes_beside_weights, bytes_per_token
from dpocli.training.trainer import TrainSetup


@dataclass(frozen=True, slots=True)
class Plan:
    """The figures of a plan."""

    loss: str
    is_whole_batch: bool
    """Whether the loss of a pair depends on the others of its batch."""
    pairs: int
    held_out_pairs: int
    tokens: int
    """Of an epoch, each prompt once."""
    steps: int
    batch_size: int
    batch_size_is_given: bool
    epochs: float
    passes_per_step: float
    """Micro-batches of a step on one process, on average."""
    token_budget: int
    scoring: str
    processes: int
    optimizer: str
    learning_rate: float
    lr_schedule: str
    warmup_steps: int
    parameters: int
    """Trainable ones."""
    dtype: str
    bytes: int
    """Expected memory of each process."""

    @classmethod
    def of(cls, setup: TrainSetup) -> "Plan":
        options, loss, policy, schedule = setup.options, setup.loss, setup.policy, setup.schedule
        packing, count = policy.scorer.packing, policy.processes.count
        assert options.optimizer.learning_rate
        return cls(
            loss=str(loss),
            is_whole_batch=loss.is_whole_batch,
            pairs=len(setup.training),
            held_out_pairs=len(setup.held_out) if setup.held_out else 0,
            tokens=int(setup.training.num_tokens.sum()),
            steps=schedule.num_steps,
            batch_size=schedule.batch_size,
            batch_size_is_given=options.optimizer.batch_size is not None,
            epochs=schedule.num_steps / schedule.steps_per_epoch,
            passes_per_step=_passes_per_step(setup.training, schedule, count, packing),
            token_budget=packing.token_budget,
            scoring=str(packing.layout),
            processes=count,
            optimizer=options.optimizer.name,
            learning_rate=options.optimizer.learning_rate,
            lr_schedule=options.optimizer.lr_schedule,
            warmup_steps=warmup_steps(options.optimizer, schedule.num_steps),
            parameters=policy.num_parameters(),
            dtype=dtype_name(policy.scorer.compute_dtype),
            bytes=int(
                policy.num_parameters() * WEIGHT_BYTES
                + bytes_beside_weights(policy, options)
                + packing.token_budget * bytes_per_token(policy, options)
            ),
        )

    def show(self, console: Console) -> None:
        """Show it before the first step, with notices."""
        console.table("Plan", ["", ""], list(self._rows()))
        for notice in self._notices():
            console.say(notice)

    def render(self, printer: Printer) -> None:
        """Show it as a result."""
        printer.table("Plan (dry run: nothing was written)", ["", ""], list(self._rows()))
        for notice in self._notices():
            printer.say(notice)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "loss", self.loss
        if self.is_whole_batch:
            twice = self.passes_per_step > 1 or self.processes > 1
            cost = (
                "each is scored twice a step: about a third more compute"
                if twice
                else "which fit one pass: no extra cost"
            )
            yield "whole batch", f"the loss of a pair depends on all {self.batch_size} pairs of its batch; {cost}"
        held_out = f", {self.held_out_pairs:,} held out" if self.held_out_pairs else ""
        yield "pairs", f"{self.pairs:,} to train on{held_out}"
        yield "tokens", f"{self.tokens:,} an epoch, {self.tokens / self.pairs:,.0f} a pair"
        yield "steps", f"{self.steps:,} of {self.batch_size} pairs ({self.epochs:.3g} epochs)"
        yield (
            "micro-batches",
            f"{self.passes_per_step:.1f} a step and process, of at most {self.token_budget:,} tokens, {self.scoring}",
        )
        yield (
            "learning rate",
            f"{self.learning_rate:g} of {self.optimizer}, {self.lr_schedule}, {self.warmup_steps:,} steps of warm-up",
        )
        yield "parameters", f"{self.parameters:,} trainable, computing in {self.dtype}"
        yield "memory", f"about {self.bytes / 2**30:.1f} GiB on each of {self.processes} process(es)"

    def _notices(self) -> Iterator[str]:
        if not self.batch_size_is_given and self.batch_size < DEFAULT_BATCH_SIZE:
            yield (
                f"Batch size {self.batch_size}: a tenth of the {self.pairs:,} pairs, so that there are several steps "
                "(--batch-size sets it)."
            )
        if self.warmup_steps > self.steps:
            yield (
                f"The warm-up of {self.warmup_steps:,} steps is longer than the run of {self.steps:,}: the learning rate never "
                "reaches its peak (--warmup-steps sets it)."
            )


def _passes_per_step(view: PairView, schedule: Schedule, count: int, packing: Packing) -> float:
    """Mean over a sample of the steps."""
    sample = np.unique(np.linspace(1, schedule.num_steps, num=min(8, schedule.num_steps), dtype=np.int64))
    batches = [view.at(schedule.batch(int(step))).sizes(packing.layout).tolist() for step in sample]
    passes = [len(deal(sizes, count, packing)[0]) for sizes in batches]
    return float(np.mean(passes))
