"""How many tokens a pass may have: measured on the device, where nobody says it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from dpocli.cache.view import PairView
from dpocli.config.commands import TrainOptions
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.errors import is_out_of_memory
from dpocli.scoring.passes import score, size_of_pass
from dpocli.training.optimizers import state_bytes
from dpocli.training.policy import Policy
from dpocli.training.shortage import can_be_undone, throw_away_gradients

PROBED_TOKENS = (2048, 6144)
"""Sizes of the two passes that are measured. From the difference follows what a token takes; the first is the smallest
budget that is chosen."""

MOST_TOKENS = 65536
"""Beyond this a pass becomes larger, but hardly faster (assumed, not measured)."""

SHARE = 0.9
"""Of the memory; the rest is for what the probe does not see: fragments, the largest pairs, workspaces."""

STEP = 256
"""Budgets are multiples of it."""

Meter = Callable[[Callable[[], None]], int]
"""Does some work, and gives the most memory that was taken meanwhile, in bytes, with what had been taken before."""


@dataclass(frozen=True, slots=True)
class Device:
    """The memory of a device."""

    total: int
    """Bytes that this process has or can have."""
    peak: Meter

    @classmethod
    def of(cls, device: torch.device) -> "Device | None":
        """None for the CPU, on which small passes are as fast as large ones, and memory is everybody's."""
        if device.type != "cuda":
            return None

        def peak(work: Callable[[], None]) -> int:
            torch.cuda.synchronize(device)
            torch.cuda.reset_peak_memory_stats(device)
            work()
            torch.cuda.synchronize(device)
            return torch.cuda.max_memory_allocated(device)

        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(device)
        return cls(free + torch.cuda.memory_allocated(device), peak)


def set_token_budget(policy: Policy, training: PairView, options: TrainOptions, device: Device | None) -> None:
    """Sets the token budget of the policy's passes by what fits into memory, where `--token-budget` is not given.

    Args:
        policy: laid out as it will train. All processes come to the same budget.
        training: the pairs, of which some are drawn to be tried.
        options: those of the run.
        device: whose memory it is; None: leave the budget as it is.
    """
    if options.scoring.token_budget is not None or device is None:
        return
    budget = min(policy.processes.gather([_measured(policy, training, options, device)]))
    policy.scorer.packing = replace(policy.scorer.packing, token_budget=budget)


def _measured(policy: Policy, training: PairView, options: TrainOptions, device: Device) -> int:
    layout = policy.scorer.packing.layout
    peaks: list[tuple[int, int]] = []
    try:
        for tokens in (PROBED_TOKENS[0], *PROBED_TOKENS):  # the first time, libraries take what they keep
            pairs = _some_pairs(training, tokens, layout, options.seed)
            peaks.append((size_of_pass(layout, pairs), device.peak(partial(_try, policy, pairs))))
    except Exception as error:
        if policy.processes.count > 1 or not is_out_of_memory(error) or not can_be_undone(policy):
            raise
    if len(peaks) == 1 + len(PROBED_TOKENS):
        return fitting(peaks[1], peaks[2], device.total, state_bytes(policy, options))
    throw_away_gradients(policy)
    return PROBED_TOKENS[0]  # and the first step finds out what less will do


def fitting(small: tuple[int, int], large: tuple[int, int], total: int, still_to_come: float) -> int:
    """The tokens for which memory is enough.

    Args:
        small: tokens of a pass, and the most memory that was taken in it.
        large: the same of a larger pass.
        total: bytes.
        still_to_come: bytes that are not taken yet in those passes, but will be in training.
    """
    per_token = (large[1] - small[1]) / max(large[0] - small[0], 1)
    if per_token <= 0:  # too little to be seen
        return MOST_TOKENS
    without_tokens = small[1] - per_token * small[0]
    tokens = int((SHARE * total - still_to_come - without_tokens) / per_token)
    return min(max(tokens // STEP * STEP, PROBED_TOKENS[0]), MOST_TOKENS)


def _try(policy: Policy, pairs: Sequence[EncodedPair]) -> None:
    """A forward and a backward pass, which leave nothing behind."""
    _, tokens = score(policy.scorer, pairs)
    policy.outer_gradient((tokens.chosen.sum() + tokens.rejected.sum()) * 0.0)


def _some_pairs(view: PairView, tokens: int, layout: Layout, seed: int) -> list[EncodedPair]:
    """Pairs drawn by the seed that together have so many tokens, again and again where there are too few of them."""
    order = np.random.default_rng([seed, 0x3E301]).permutation(len(view))
    sizes = view.sizes(layout)[order]
    times = int(np.ceil(tokens / max(int(sizes.sum()), 1)))
    order, ends = np.tile(order, times), np.cumsum(np.tile(sizes, times))
    return view.load(order[: int(np.searchsorted(ends, tokens)) + 1])
