"""Which pairs make up each step, and with which learning rate. A function of (seed, step) alone: nothing to save."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from dpocli.config.training_options import OptimizerOptions
from dpocli.errors import DataError, UsageError

DEFAULT_BATCH_SIZE = 128


@dataclass(frozen=True, slots=True)
class Schedule:
    """The steps of a run: each epoch is a uniform random permutation of the pairs, cut into global batches."""

    num_pairs: int
    batch_size: int
    num_steps: int
    seed: int

    @classmethod
    def plan(cls, options: OptimizerOptions, num_pairs: int, num_processes: int, seed: int) -> "Schedule":
        """Raises UsageError where a global batch has fewer pairs than there are processes."""
        if not num_pairs:
            raise DataError("There is no pair to train on: every pair is held out or was skipped.")
        batch_size = min(options.batch_size or default_batch_size(num_pairs), num_pairs)
        if batch_size < num_processes:
            raise UsageError(
                f"--batch-size {batch_size}: fewer pairs a step than the {num_processes} processes. It counts pairs over "
                "all processes; give a multiple of their number."
            )
        steps_per_epoch = math.ceil(num_pairs / batch_size)
        return cls(
            num_pairs,
            batch_size,
            options.max_steps or steps_per_epoch * (options.epochs or 1),
            seed,
        )

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(self.num_pairs / self.batch_size)

    def batch(self, step: int) -> NDArray[np.int64]:
        """The pairs of step 1, 2, …: positions into the training pairs. The last batch of an epoch may be smaller."""
        epoch, place = divmod(step - 1, self.steps_per_epoch)
        order = _order(self.seed, epoch, self.num_pairs)
        return order[place * self.batch_size : (place + 1) * self.batch_size].copy()


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, num_pairs: int) -> NDArray[np.int64]:
    """Kept for the steps of an epoch, and for the one that is read ahead: to shuffle a million pairs takes a while."""
    return np.random.default_rng([seed, epoch]).permutation(num_pairs)


def default_batch_size(num_pairs: int) -> int:
    """128, but at most a tenth of the pairs, so that a small data set still gets several steps."""
    return max(1, min(DEFAULT_BATCH_SIZE, num_pairs // 10))


def learning_rates(options: OptimizerOptions, num_steps: int) -> Callable[[int], float]:
    """Learning rate of step 1, 2, …, as transformers' schedules have it (whose module loads peft and bitsandbytes).

    Those are 0 at their first and last point; the steps are laid between the two, so that no batch is wasted.
    """
    warmup = warmup_steps(options, num_steps)
    assert options.learning_rate
    peak = options.learning_rate

    def rate(step: int) -> float:
        if step < warmup:
            return peak * (step / warmup)
        left = (num_steps + 1 - step) / max(1, num_steps + 1 - warmup)
        match options.lr_schedule:
            case "constant":
                return peak
            case "linear":
                return peak * max(0.0, left)
            case "cosine":
                done = (step - warmup) / max(1, num_steps + 1 - warmup)
                return peak * max(0.0, 0.5 * (1.0 + math.cos(math.pi * done)))

    return rate


def warmup_steps(options: OptimizerOptions, num_steps: int) -> int:
    """Steps in which the learning rate rises; more than `num_steps` where it never comes to its peak."""
    return math.ceil(options.warmup_ratio * num_steps) if options.warmup_steps is None else options.warmup_steps
