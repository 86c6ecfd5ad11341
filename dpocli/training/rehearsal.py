"""Rehearsal of the largest passes of a run, from small to large, with gradients and optimizer state in place.

No pass is tried before the measured ones show that it fits, so that no failed pass has to be undone.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.cache.view import PairView
from dpocli.data.packing import Layout, Packing
from dpocli.data.preference import EncodedPair
from dpocli.scoring.passes import FILLER, score, size_of_pass
from dpocli.training.policy import Policy

FIRST, GROWTH, PROGRESS = 128, 4, 1.02
"""Tokens of the first probe; how many times as many the next may have at most; and where the next would gain less than 2%,
probing ends."""

SHARE = 0.9
"""Share of the device's memory that a probe may take; the rest is for fragments and workspaces."""

GRANULARITY = 32 * 2**20
"""Bytes by which a measured peak may be off: allocators reserve whole segments."""


class Memory(Protocol):
    """The memory of a device."""

    def limit(self) -> int:
        """Bytes that this process may take, with what it has now."""

    def peak(self, work: Callable[[], None]) -> int:
        """Do some work; the most bytes that this process held meanwhile, with what it held before."""


class CudaMemory:
    """The memory of a GPU, as torch's allocator reserves it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def limit(self) -> int:
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(SHARE * (free + torch.cuda.memory_reserved(self._device)))

    def peak(self, work: Callable[[], None]) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        work()
        torch.cuda.synchronize(self._device)
        return torch.cuda.max_memory_reserved(self._device)


def memory_of(device: torch.device) -> Memory | None:
    """None for a CPU, whose memory all processes of the host share."""
    return CudaMemory(device) if device.type == "cuda" else None


@dataclass(frozen=True, slots=True)
class Load:
    """What a pass takes memory for. Each part may cost any number of bytes, and so may the pass itself."""

    tokens: int
    """Through the layers, padding included."""
    scored: int
    """Through the head."""
    squares: int
    """Σ tokens² over the pairs: attention without a fused kernel."""

    @classmethod
    def of(cls, pairs: Sequence[EncodedPair], packing: Packing, *, widened: bool) -> "Load":
        tokens = size_of_pass(packing.layout, pairs)
        sizes = [size_of_pass(packing.layout, [pair]) for pair in pairs]
        squares = max(sizes) ** 2 * len(pairs) if packing.layout.pads else sum(size**2 for size in sizes)
        scored = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
        return cls(packing.fixed_width(tokens) if widened else tokens, scored, squares)

    def ratio(self, other: "Load") -> float:
        """How many times as large as `other` this is, in the part in which it has grown most."""
        return max(self.tokens / other.tokens, self.scored / other.scored, self.squares / other.squares)


@dataclass(frozen=True, slots=True)
class Probe:
    """A pass to be rehearsed."""

    pairs: Sequence[EncodedPair]
    with_gradient: bool


Track = Callable[[int], list[Probe]]
"""The passes that go with a token budget; a larger budget gives passes that are larger in every part."""


class Rehearsal:
    """Passes of growing size, each measured with gradients and optimizer state in place.

    Args:
        policy: laid out as it will train, with the optimizer's state allocated.
        memory: of this process's device. All processes must make the same calls.
    """

    def __init__(self, policy: Policy, memory: Memory) -> None:
        self._policy, self._memory = policy, memory
        self._limit = memory.limit()
        self._measured: list[tuple[Load, bool, int]] = []
        smallest = Probe([FILLER], with_gradient=True)
        self._make(smallest)  # which leaves gradients in place
        self._base = memory.peak(lambda: None)
        self._run(smallest)

    def climb(self, track: Track, target: int) -> int:
        """Rehearse the passes of larger and larger budgets, up to `target`; the largest that fits on all processes."""
        reached = 0
        while reached < target:
            largest = self._largest_sure(track, reached, min(target, max(FIRST, GROWTH * reached)))
            size = min(self._policy.processes.gather([largest]))
            if size < min(target, PROGRESS * reached + 1):
                break
            set_token_budget(self._policy, size)
            for probe in track(size):
                if not self._is_covered(probe):
                    self._run(probe)
            reached = size
        return reached

    def end(self, budget: int) -> None:
        """Remove the gradients, and set the budget for the run."""
        self._policy.reduce_gradients_on_backward(True)  # else replicas keep what they have accumulated
        self._backward([FILLER])
        self._policy.scorer.zero_grad()
        set_token_budget(self._policy, budget)

    def _largest_sure(self, track: Track, reached: int, most: int) -> int:
        """The largest budget of at most so many tokens whose passes surely fit, by what this process has measured."""

        def is_sure(size: int) -> bool:
            set_token_budget(self._policy, size)
            return all(self._bound(probe) <= self._limit for probe in track(size))

        if is_sure(most):
            return most
        low, high = reached, most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if is_sure(middle) else (low, middle)
        return low

    def _bound(self, probe: Probe) -> float:
        """Bytes that a pass takes at most.

        What it takes beyond the base grows at most as its fastest growing part, since no part costs less than nothing. A
        pass without gradient takes no more than the same with.
        """
        load = self._load(probe)
        return min(
            self._base + max(1.0, load.ratio(known)) * max(peak - self._base, GRANULARITY)
            for known, with_gradient, peak in self._measured
            if with_gradient or not probe.with_gradient
        )

    def _is_covered(self, probe: Probe) -> bool:
        load = self._load(probe)
        return any(load.ratio(known) <= 1 and (way or not probe.with_gradient) for known, way, _ in self._measured)

    def _load(self, probe: Probe) -> Load:
        scorer = self._policy.scorer
        return Load.of(probe.pairs, scorer.packing, widened=scorer.uses_flex)

    def _run(self, probe: Probe) -> None:
        peak = self._memory.peak(partial(self._make, probe))
        self._measured.append((self._load(probe), probe.with_gradient, peak))

    def _make(self, probe: Probe) -> None:
        if probe.with_gradient:
            # Replicas hold whole float32 gradients between the first and the last micro-batch of a step.
            self._policy.reduce_gradients_on_backward(False)
            self._backward(probe.pairs)
        else:
            with self._policy.eval_mode():
                score(self._policy.scorer, probe.pairs)

    def _backward(self, pairs: Sequence[EncodedPair]) -> None:
        _, tokens = score(self._policy.scorer, pairs)
        loss = tokens.chosen.sum() + tokens.rejected.sum()
        if tokens.router_loss is not None:
            loss = loss + tokens.router_loss
        (loss * 0.0).backward()  # type: ignore[no-untyped-call]


class LargestPasses:
    """The pairs of a view that make the largest passes.

    Args:
        view: pairs to train on, or held-out ones, which are scored without gradient.
        layout: of the passes.
        most: tokens of the largest budget.
    """

    def __init__(self, view: PairView, layout: Layout, most: int, *, with_gradient: bool) -> None:
        self._layout, self._with_gradient = layout, with_gradient
        sizes = view.sizes(layout)
        scored = 2 * view.sizes(Layout.SHARED) - view.sizes(Layout.PACKED)
        orders = [np.argsort(-sizes, kind="stable"), np.argsort(-scored / sizes, kind="stable")]
        enough = [order[: int(np.searchsorted(np.cumsum(sizes[order]), most)) + 1] for order in orders]
        self._orders = [view.load(order) for order in enough]
        """By size, and by the share of the tokens that is scored: enough of either for the largest budget."""
        self.extremes = view.load(np.unique([int(np.argmax(sizes)), int(np.argmax(scored))]))
        """The pair with most tokens, and the one with most scored tokens."""

    def within(self, budget: int) -> list[Probe]:
        """The largest passes within a budget, and of a single pair beyond it."""
        fills = [fill(order, self._layout, budget) for order in self._orders]
        return [Probe(pairs, self._with_gradient) for pairs in (*fills, *([pair] for pair in self.extremes))]

    def beginnings(self, pair: EncodedPair) -> Track:
        """A pair shortened to a number of tokens, up to all of it."""
        size = size_of_pass(self._layout, [pair])
        return lambda tokens: [Probe([shortened(pair, tokens / size)], self._with_gradient)]


def fill(pairs: Sequence[EncodedPair], layout: Layout, budget: int) -> list[EncodedPair]:
    """The first pairs that go together within a budget; where rows do not pad, the next one is shortened to what is left."""
    taken: list[EncodedPair] = []
    used = largest = 0
    for pair in pairs:
        size = size_of_pass(layout, [pair])
        together = max(largest, size) * (len(taken) + 1) if layout.pads else used + size
        if together > budget:
            if not taken or (not layout.pads and budget - used > 2):
                taken.append(shortened(pair, (budget - used) / size))
            break
        taken.append(pair)
        used, largest = together, max(largest, size)
    return taken


def shortened(pair: EncodedPair, share: float) -> EncodedPair:
    """The beginning of each part of a pair, one token at least."""
    prompt, chosen, rejected = (ids[: max(1, int(len(ids) * share))] for ids in pair.all_ids)
    return EncodedPair(pair.row, pair.pair_id, prompt, chosen, rejected)


def largest_share(sizes: NDArray[np.int64], num_pairs: int, count: int, layout: Layout) -> int:
    """Tokens of the largest pairs that one process can get of a batch of so many pairs: no pass has more."""
    mine = np.sort(sizes)[::-1][: -(-num_pairs // count)]
    return int(mine[0] * len(mine) if layout.pads else mine.sum())


def set_token_budget(policy: Policy, tokens: int) -> None:
    """Let the policy's passes have at most so many tokens."""
    policy.scorer.packing = replace(policy.scorer.packing, token_budget=tokens)
