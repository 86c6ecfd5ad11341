"""The plan that is printed before the first step: what will be done, and what it will take."""

import numpy as np
import torch

from dpocli.config.loss_choice import LossChoice
from dpocli.config.models import TrainOptions
from dpocli.data.batches import Packing, deal
from dpocli.engine.model import dtype_name
from dpocli.engine.passes import PairView
from dpocli.engine.policy import Policy
from dpocli.engine.schedule import Schedule
from dpocli.terminal import Terminal

MASTER_GRADIENT_AND_MOMENTS = 4 * 4
"""Bytes a parameter in float32: master weight, gradient, and AdamW's two moments."""


def describe(
    terminal: Terminal,
    options: TrainOptions,
    loss: LossChoice,
    policy: Policy,
    training: PairView,
    held_out: PairView | None,
    schedule: Schedule,
    dtype: torch.dtype,
) -> None:
    """Prints pairs, tokens, steps, micro-batches, parameters, expected memory and the loss."""
    packing = policy.scorer.packing
    passes = _passes_per_step(training, schedule, policy.processes.count, packing)
    lengths = training.num_tokens
    count = policy.processes.count
    rows: list[list[object]] = [
        ["loss", str(loss)],
        ["pairs", f"{len(training):,} to train on" + (f", {len(held_out):,} held out" if held_out else "")],
        ["tokens", f"{int(lengths.sum()):,} an epoch, {float(lengths.mean()):,.0f} a pair"],
        [
            "steps",
            f"{schedule.num_steps:,} of {schedule.batch_size} pairs "
            f"({schedule.num_steps / schedule.steps_per_epoch:.3g} epochs)",
        ],
        [
            "micro-batches",
            f"{passes:.1f} a step and process, of at most {packing.token_budget:,} tokens, {packing.layout}",
        ],
        ["learning rate", f"{options.learning_rate:g}, {options.lr_schedule}, warm-up {options.warmup_ratio:g}"],
        ["parameters", f"{policy.num_parameters():,} trainable, computing in {dtype_name(dtype)}"],
        [
            "memory",
            f"about {_expected_bytes(policy, dtype, options) / 2**30:.1f} GiB on each of {count} process(es)",
        ],
    ]
    if loss.is_whole_batch:
        twice = passes > 1 or count > 1
        cost = (
            "each is scored twice a step: about a third more compute" if twice else "which fit one pass: no extra cost"
        )
        rows.insert(
            1, ["whole batch", f"the loss of a pair depends on all {schedule.batch_size} pairs of its batch; {cost}"]
        )
    terminal.table("Plan", ["", ""], rows)
    if options.batch_size is None and schedule.batch_size < 128:
        terminal.say(
            f"Batch size {schedule.batch_size}: a tenth of the {len(training):,} pairs, so that there are several steps "
            "(--batch-size sets it)."
        )


def _passes_per_step(view: PairView, schedule: Schedule, count: int, packing: Packing) -> float:
    """Mean over a sample of the steps."""
    sample = np.unique(np.linspace(1, schedule.num_steps, num=min(8, schedule.num_steps), dtype=np.int64))
    batches = [view.at(schedule.batch(int(step))).sizes(packing.layout).tolist() for step in sample]
    passes = [len(deal(sizes, count, packing)[0]) for sizes in batches]
    return float(np.mean(passes))


def _expected_bytes(policy: Policy, dtype: torch.dtype, options: TrainOptions) -> float:
    """A rule of thumb: what every parameter carries, and what a micro-batch leaves behind for the backward pass."""
    config = policy.scorer.model.config.get_text_config()
    compute_copy = dtype.itemsize
    parameters = policy.num_parameters() * (MASTER_GRADIENT_AND_MOMENTS + compute_copy)
    hidden, layers = config.hidden_size, config.num_hidden_layers
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    kept = hidden if options.gradient_checkpointing else 8 * hidden + 4 * inner
    activations = float(policy.scorer.packing.token_budget * layers * kept * dtype.itemsize)
    return parameters + activations
