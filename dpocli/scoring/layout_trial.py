"""Compare layouts with the oracle on a few pairs: log-probs by region, independence of the pairs in a row, and gradients."""

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
from dpocli.scoring.oracle import SideLogps, oracle_logps, worst_region
from dpocli.scoring.passes import (
    ScoredPass,
    check_ids,
    micro_batches,
    pair_sizes,
    release_cached_memory,
    score,
    score_passes,
)
from dpocli.scoring.scorer import PairScorer

OUT_OF_MEMORY = "out of memory"


@dataclass(frozen=True, slots=True)
class Candidate:
    """A layout to try, and whether FlexAttention computes it."""

    layout: Layout
    flex: bool = False

    def __str__(self) -> str:
        return f"{self.layout}, FlexAttention" if self.flex else str(self.layout)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Differences that rounding explains. Nats per token, and relative for gradients."""

    mean: float
    """Mean of |Δ|; the signed mean may be a quarter of it."""
    largest: float
    """|Δ| of any token when only tokens change that it must not see."""
    gradient: float
    """‖Δ‖ / ‖gradient‖."""


TOLERANCES = {
    torch.float32: Tolerance(1e-4, 1e-4, 2e-3),
    torch.bfloat16: Tolerance(0.06, 0.02, 0.2),
    torch.float16: Tolerance(0.01, 0.005, 0.05),
}

Gradient = Callable[[Tensor], Tensor]
"""Back-propagates a scalar and returns the gradient of some of the parameters, flat; leaves all gradients cleared."""


class LayoutTrial:
    """Scores some pairs by the oracle and in the padded layout, to compare candidates with.

    Args:
        scorer: in the padded layout, without dropout.
        pairs: the same on every process.
        processes: all of them take every step of a trial together, whatever one of them finds.
        gradient: in training.
    """

    def __init__(
        self, scorer: PairScorer, pairs: Sequence[EncodedPair], processes: Processes, gradient: Gradient | None
    ) -> None:
        self._scorer, self._pairs, self._processes, self._gradient = scorer, pairs, processes, gradient
        self._tolerance = TOLERANCES[scorer.compute_dtype]
        check_ids(scorer, pairs)
        self._oracle = oracle_logps(scorer, pairs)
        self._expected = self._logps(pairs)
        alone = [self._logps([pair])[0] for pair in pairs]
        self._noise = _differences(self._expected, alone)
        self._expected_gradient = None if gradient is None else self._mean_gradient(gradient)

    def padded_mismatch(self) -> str | None:
        """The region in which the padded layout differs from the oracle, on any process; None if none does."""
        if not bool(_flat(self._oracle).isfinite().all()):
            return None  # broken weights, which the checks of the values report with the rows
        # Rows of one sequence each are judged without the noise between compositions, which padding may have caused.
        silent = [(torch.zeros_like(chosen), torch.zeros_like(rejected)) for chosen, rejected in self._expected]
        own = self._noise if _is_sparse(self._scorer) else silent
        found = worst_region(
            _differences(self._expected, self._oracle), own, [True] * len(self._pairs), self._tolerance.mean
        )
        return (found or "found on another process") if self._processes.any(found is not None) else None

    def mismatch(self, candidate: Candidate) -> str | None:
        """Set the scorer to a candidate and compare; rows are made smaller while memory runs out.

        Returns:
            What differs or fails, on any process; None if nothing does.

        Raises:
            UsageError: the backward pass failed.
            ResourceError: the backward pass ran out of memory.
        """
        given = self._scorer.packing.token_budget
        while (found := self._first_mismatch(candidate)) == OUT_OF_MEMORY:
            release_cached_memory(self._scorer.device)
            if not self._halve_rows():
                break
        self._scorer.packing = replace(self._scorer.packing, token_budget=given)
        return found

    def _first_mismatch(self, candidate: Candidate) -> str | None:
        for step in self._steps(candidate):
            found = _error_as_text(step)
            # All processes compute the same, but rounding and compilers may differ between machines; no process may enter
            # the next collective operation after another has left.
            if self._processes.any(found is not None):
                lacks_memory = self._processes.any(found == OUT_OF_MEMORY)
                return OUT_OF_MEMORY if lacks_memory else found or "refused on another process"
        return None

    def _steps(self, candidate: Candidate) -> Iterator[Callable[[], str | None]]:
        if candidate.flex:
            yield self._try_kernel
        yield lambda: self._compare_logps(candidate)
        yield self._check_independence
        if self._gradient is not None:
            yield lambda: self._compare_gradients(candidate.layout)

    def _halve_rows(self) -> bool:
        """Halve the token budget; False if no row would hold several pairs then, which the trial needs to find leaks."""
        packing = self._scorer.packing
        sizes = pair_sizes(packing.layout, self._pairs)
        widest = max(sum(sizes[index] for index in members) for members in pack(sizes, packing))
        smaller = replace(packing, token_budget=min(widest, packing.token_budget) // 2)
        if all(len(members) == 1 for members in pack(sizes, smaller)):
            return False
        self._scorer.packing = smaller
        return True

    def _try_kernel(self) -> None:
        scorer = self._scorer
        try_kernel(scorer.model, scorer.device, scorer.compute_dtype, backward=self._gradient is not None)

    def _compare_logps(self, candidate: Candidate) -> str | None:
        self._scorer.lay_out(candidate.layout, flex=candidate.flex)
        self._found = self._logps(self._pairs)
        first = {members[0] for members in micro_batches(self._scorer, self._pairs)}
        is_first = [index in first for index in range(len(self._pairs))]
        for expected in (self._oracle, self._expected):
            differences = _differences(self._found, expected)
            if found := worst_region(differences, self._noise, is_first, self._tolerance.mean):
                return f"log-probs differ in the {found}"
            signed = float(_flat(differences).mean())
            if not abs(signed) <= self._tolerance.mean / 4:
                return f"log-probs differ by {signed:+.2g} nats per token on average, in one direction"
        return None

    def _check_independence(self) -> str | None:
        """Replace all chosen sides, then every second pair of each row: no other log-prob may change."""
        chosen = [replace(pair, chosen_ids=self._other_tokens(pair.chosen_ids)) for pair in self._pairs]
        rejected_sides = [(index, 1) for index in range(len(self._pairs))]
        every_second = list(self._pairs)
        kept_pairs: list[tuple[int, int]] = []
        for members in micro_batches(self._scorer, self._pairs):
            for place, index in enumerate(members):
                if place % 2:
                    kept_pairs += [(index, 0), (index, 1)]
                    continue
                ids = map(self._other_tokens, every_second[index].all_ids)
                prompt_ids, chosen_ids, rejected_ids = ids
                every_second[index] = replace(
                    every_second[index], prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids
                )
        # Shapes are the same, so nothing rounds differently but the expert groups of a router.
        noise = float(_flat(self._noise).abs().max()) if _is_sparse(self._scorer) else 0.0
        for changed, unchanged in ((chosen, rejected_sides), (every_second, kept_pairs)):
            after = self._logps(changed)
            largest = max((float(self._change(after, *place)) for place in unchanged), default=0.0)
            if not largest <= max(self._tolerance.largest, noise):
                return f"log-probs depend on other tokens in the row, by {largest:.2g} nats for one token"
        return None

    def _change(self, after: Sequence[SideLogps], index: int, side: int) -> Tensor:
        return (after[index][side] - self._found[index][side]).abs().max()

    def _compare_gradients(self, layout: Layout) -> str | None:
        assert self._gradient is not None
        assert self._expected_gradient is not None
        try:
            found = self._mean_gradient(self._gradient)
        except Exception as error:
            # No fallback: a distributed wrapper is left inside its backward pass, and would silently drop gradients later.
            if is_out_of_memory(error):
                raise ResourceError(
                    f"Out of memory while scoring {layout} was tried with gradients ({_first_line(error)}). Give a smaller "
                    "--token-budget, or --gradient-checkpointing."
                ) from error
            simpler = Layout.PADDED if layout is Layout.PACKED else Layout.PACKED
            raise UsageError(
                f"The backward pass of scoring {layout} failed ({_first_line(error)}). Give --scoring {simpler}."
            ) from error
        expected = self._expected_gradient
        difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
        if difference <= self._tolerance.gradient:
            return None
        return f"gradients differ by {difference:.2g} of their norm"

    def _logps(self, pairs: Sequence[EncodedPair]) -> list[SideLogps]:
        logps: dict[int, SideLogps] = {}
        for members, batch, tokens in self._scored(pairs):
            chosen = torch.split(tokens.chosen.float().cpu(), list(batch.chosen_lengths))
            rejected = torch.split(tokens.rejected.float().cpu(), list(batch.rejected_lengths))
            logps |= dict(zip(members, zip(chosen, rejected, strict=True), strict=True))
        return [logps[index] for index in range(len(pairs))]

    def _scored(self, pairs: Sequence[EncodedPair]) -> Iterator[ScoredPass]:
        # Split only the padded layout outside training: in training all processes must make the same passes, and the trial
        # of another layout needs rows of several pairs.
        if self._scorer.packing.layout is Layout.PADDED and self._gradient is None:
            yield from score_passes(self._scorer, pairs)
            return
        for members in micro_batches(self._scorer, pairs):
            with torch.no_grad():
                yield members, *score(self._scorer, [pairs[index] for index in members])

    def _mean_gradient(self, gradient: Gradient) -> Tensor:
        """Gradient of the mean log-prob of all tokens."""
        num_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in self._pairs)
        parts = []
        for members in micro_batches(self._scorer, self._pairs):
            _, tokens = score(self._scorer, [self._pairs[index] for index in members])
            parts.append(gradient((tokens.chosen.sum() + tokens.rejected.sum()) / num_tokens))
        return torch.stack(parts).sum(0)

    def _other_tokens(self, ids: TokenIds) -> TokenIds:
        """As many tokens, each a different one."""
        return ((ids + 1) % self._scorer.num_embeddings).astype(np.int32)


def _error_as_text(step: Callable[[], str | None]) -> str | None:
    """The result of a step; any error of a model, a compiler or a driver is a mismatch too."""
    try:
        return step()
    except DpoError:
        raise
    except Exception as error:
        return OUT_OF_MEMORY if is_out_of_memory(error) else _first_line(error)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _differences(found: Sequence[SideLogps], expected: Sequence[SideLogps]) -> list[SideLogps]:
    """Per token, as far as both reach."""

    def difference(one: Tensor, other: Tensor) -> Tensor:
        common = min(len(one), len(other))
        return one[:common] - other[:common]

    return [
        (difference(here[0], there[0]), difference(here[1], there[1]))
        for here, there in zip(found, expected, strict=True)
    ]


def _flat(sides: Sequence[SideLogps]) -> Tensor:
    return torch.cat([side for pair in sides for side in pair])


def _is_sparse(scorer: PairScorer) -> bool:
    """Whether tokens are routed to experts, which rounding may change."""
    return any("expert" in name for name, _ in scorer.named_parameters())
