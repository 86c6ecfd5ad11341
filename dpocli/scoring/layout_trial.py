"""A few pairs scored plainly, one padded row a side, and then another way: do the two agree?

Per token, in training with gradients, and without one pair noticing what stands in the others.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from dpocli.data.packing import Layout, pack
from dpocli.data.preference import EncodedPair, TokenIds
from dpocli.distributed.processes import Processes
from dpocli.errors import DpoError, ResourceError, UsageError, is_out_of_memory
from dpocli.scoring.block_mask import try_kernel
from dpocli.scoring.passes import ScoredPass, free_memory, passes_of, passes_that_fit, score
from dpocli.scoring.scorer import PairScorer

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Noise:
    """What two correct ways of computing may differ by."""

    mean: float
    """Of |Δ| per token, nats; the signed mean may be a quarter of it."""
    p99: float
    """The 99th percentile of |Δ|, nats."""
    gradient: float
    """‖Δ‖ / ‖gradient‖."""


NOISE = {
    torch.float32: Noise(1e-4, 1e-3, 2e-3),
    torch.bfloat16: Noise(0.06, 0.3, 0.2),
    torch.float16: Noise(0.01, 0.05, 0.05),
}

LEAK = 0.2
"""Share of the noise by which a log-prob may move when the tokens of other pairs change. Shapes stay the same then, so
that only what depends on all tokens of a row (a router's groups) may round in another way."""

Gradient = Callable[[Tensor], Tensor]
"""Back-propagates a scalar and gives the gradient of some of the parameters, flat; leaves none behind."""

Sides = tuple[Tensor, Tensor]
"""Log-probs of the chosen and the rejected tokens of a pair, float32, on the CPU."""


class Trial:
    """The plain values and gradients of some pairs, to compare other ways of scoring with.

    Args:
        scorer: laid out plainly; no dropout may be on.
        pairs: the same on every process.
        processes: they go through every step of a trial together, whatever one of them finds.
        gradient: in training.
    """

    def __init__(
        self, scorer: PairScorer, pairs: Sequence[EncodedPair], processes: Processes, gradient: Gradient | None
    ) -> None:
        self._scorer, self._pairs, self._processes, self._gradient = scorer, pairs, processes, gradient
        self._noise = NOISE[scorer.compute_dtype]
        self._plain = self._values(pairs)
        self._plain_gradient = None if gradient is None else self._gradient_of_mean(gradient)

    def fault(self, layout: Layout, *, flex: bool) -> str | None:
        """What is wrong with a way of scoring, in words; None where nothing is, and the scorer is laid out so.

        Raises:
            UsageError: its backward pass failed.
            ResourceError: the memory is not enough for its backward pass.
        """
        given = self._scorer.packing.token_budget
        while (found := self._first_fault(layout, flex)) == OUT_OF_MEMORY:
            free_memory(self._scorer)
            if not self._make_smaller():
                break
        self._scorer.packing = replace(self._scorer.packing, token_budget=given)
        return found

    def _first_fault(self, layout: Layout, flex: bool) -> str | None:
        for step in self._steps(layout, flex):
            found = _outcome(step)
            # Each process has computed the same, but rounding and compilers are each machine's own; and none may go on
            # to what all have to do together while another has left.
            if self._processes.any(found is not None):
                lacks_memory = self._processes.any(found == OUT_OF_MEMORY)
                return OUT_OF_MEMORY if lacks_memory else found or "refused on another process"
        return None

    def _make_smaller(self) -> bool:
        """Whether rows of half the tokens would still hold several pairs, and so show a leak; the next trial takes them."""
        packing = self._scorer.packing
        sizes = [packing.layout.size(*map(len, pair.all_ids)) for pair in self._pairs]
        widest = max(sum(sizes[index] for index in members) for members in pack(sizes, packing))
        smaller = replace(packing, token_budget=min(widest, packing.token_budget) // 2)
        if all(len(members) == 1 for members in pack(sizes, smaller)):
            return False
        self._scorer.packing = smaller
        return True

    def _steps(self, layout: Layout, flex: bool) -> Iterator[Callable[[], str | None]]:
        if flex:
            yield self._try_kernel
        yield lambda: self._compare_values(layout, flex)
        yield self._look_for_leaks
        if self._gradient is not None:
            yield lambda: self._compare_gradients(layout)

    def _try_kernel(self) -> None:
        scorer = self._scorer
        try_kernel(scorer.model, scorer.device, scorer.compute_dtype, backward=self._gradient is not None)

    def _compare_values(self, layout: Layout, flex: bool) -> str | None:
        self._scorer.lay_out(layout, flex=flex)
        self._fast = self._values(self._pairs)
        delta = _joined(self._fast) - _joined(self._plain)
        mean, p99 = float(delta.abs().mean()), float(delta.abs().quantile(0.99))
        # Written so that NaN is a fault.
        if mean <= self._noise.mean and p99 <= self._noise.p99 and abs(float(delta.mean())) <= self._noise.mean / 4:
            return None
        return f"log-probs differ by {mean:.2g} nats per token on average (99th percentile {p99:.2g})"

    def _look_for_leaks(self) -> str | None:
        """Changes the first pair of each row and the chosen side of its last: nothing else may move."""
        changed = list(self._pairs)
        unchanged: list[tuple[int, int]] = []
        for members in passes_of(self._scorer, self._pairs):
            *others, last = members
            changed[last] = replace(changed[last], chosen_ids=self._other(changed[last].chosen_ids))
            unchanged.append((last, 1))
            if others:
                changed[others[0]] = self._all_other(changed[others[0]])
                unchanged += [(index, side) for index in others[1:] for side in (0, 1)]
        after = self._values(changed)
        delta = torch.cat([(after[index][side] - self._fast[index][side]).abs() for index, side in unchanged])
        mean, p99 = float(delta.mean()), float(delta.quantile(0.99))
        if mean <= LEAK * self._noise.mean and p99 <= LEAK * self._noise.p99:
            return None
        return f"log-probs depend on what else stands in the row, by {mean:.2g} nats per token on average"

    def _compare_gradients(self, layout: Layout) -> str | None:
        assert self._gradient is not None
        assert self._plain_gradient is not None
        try:
            fast = self._gradient_of_mean(self._gradient)
        except Exception as error:
            # What wraps the model is in no state to go on from: it would leave gradients out without a word.
            if is_out_of_memory(error):
                raise ResourceError(
                    f"Out of memory while scoring {layout} was tried with gradients ({_first_line(error)}). Give a smaller "
                    "--token-budget, or --gradient-checkpointing."
                ) from error
            simpler = Layout.PADDED if layout is Layout.PACKED else Layout.PACKED
            raise UsageError(
                f"The backward pass of scoring {layout} failed ({_first_line(error)}). Give --scoring {simpler}."
            ) from error
        off = float((fast - self._plain_gradient).norm() / self._plain_gradient.norm().clamp(min=1e-30))
        return None if off <= self._noise.gradient else f"gradients differ by {off:.2g} of their norm"

    def _values(self, pairs: Sequence[EncodedPair]) -> list[Sides]:
        values: dict[int, Sides] = {}
        for members, batch, tokens in self._scored(pairs):
            chosen = torch.split(tokens.chosen.float().cpu(), list(batch.chosen_lengths))
            rejected = torch.split(tokens.rejected.float().cpu(), list(batch.rejected_lengths))
            values |= dict(zip(members, zip(chosen, rejected, strict=True), strict=True))
        return [values[index] for index in range(len(pairs))]

    def _scored(self, pairs: Sequence[EncodedPair]) -> Iterator[ScoredPass]:
        # In training all processes make the same passes; and what is tried are rows of several pairs, not of their halves.
        if self._scorer.packing.layout is Layout.PADDED and self._gradient is None:
            yield from passes_that_fit(self._scorer, pairs)
            return
        for members in passes_of(self._scorer, pairs):
            with torch.no_grad():
                yield members, *score(self._scorer, [pairs[index] for index in members])

    def _gradient_of_mean(self, gradient: Gradient) -> Tensor:
        """Of the mean log-prob of all tokens."""
        num_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self._pairs)
        parts = []
        for members in passes_of(self._scorer, self._pairs):
            _, tokens = score(self._scorer, [self._pairs[index] for index in members])
            parts.append(gradient((tokens.chosen.sum() + tokens.rejected.sum()) / num_tokens))
        return torch.stack(parts).sum(0)

    def _all_other(self, pair: EncodedPair) -> EncodedPair:
        prompt, chosen, rejected = map(self._other, pair.all_ids)
        return replace(pair, prompt_ids=prompt, chosen_ids=chosen, rejected_ids=rejected)

    def _other(self, ids: TokenIds) -> TokenIds:
        """As many tokens, each another."""
        return ((ids + 1) % self._scorer.num_embeddings).astype(np.int32)


def _outcome(step: Callable[[], str | None]) -> str | None:
    try:
        return step()
    except DpoError:
        raise
    except Exception as error:  # whatever a model, a compiler or a driver raises: there is a simpler way
        return OUT_OF_MEMORY if is_out_of_memory(error) else _first_line(error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _joined(values: Sequence[Sides]) -> Tensor:
    return torch.cat([side for sides in values for side in sides])
