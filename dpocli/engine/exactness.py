"""Is a fast way of scoring right for this model? Asked at every start, never assumed.

Rows that hold several pairs rest on what a model does with positions and attention: windows, sinks, soft caps, recurrent
layers and what comes next year. So a few pairs are scored plainly, one padded row a side, and then the fast way, in
training with their gradients; where the two differ by more than the dtype's noise, the next simpler way is tried.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.artifacts.status import is_out_of_memory
from dpocli.data.batches import Layout, pack
from dpocli.data.preference import EncodedPair
from dpocli.engine.mesh import Processes
from dpocli.engine.passes import score
from dpocli.errors import NumericsError, UsageError
from dpocli.objective.block_mask import try_kernel
from dpocli.objective.scoring import PairScorer

NUM_DRAWN = 3
TOKENS_ENOUGH = 512
"""Longer pairs are cut for the check, unless the model has a window to look beyond."""


@dataclass(frozen=True, slots=True)
class Noise:
    """What two correct ways of computing may differ by."""

    mean: float
    """Of |Δ| per token, nats."""
    p99: float
    """The 99th percentile of |Δ|, nats."""
    gradient: float
    """‖Δ‖ / ‖gradient‖."""


NOISE = {
    torch.float32: Noise(1e-4, 1e-3, 2e-3),
    torch.bfloat16: Noise(0.06, 0.3, 0.2),
    torch.float16: Noise(0.01, 0.05, 0.05),
}


class Pairs(Protocol):
    """Pairs with known lengths, to be loaded: a `PairView`, for one."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...
    def load(self, positions: Sequence[int] | NDArray[np.int64], /) -> list[EncodedPair]: ...


@dataclass(frozen=True, slots=True)
class PairsInMemory:
    """The pairs of a tile."""

    pairs: Sequence[EncodedPair]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt + the longer side, shape (pairs,)."""
        return np.array([pair.num_tokens_longer for pair in self.pairs], dtype=np.int64)

    def load(self, positions: Sequence[int] | NDArray[np.int64]) -> list[EncodedPair]:
        return [self.pairs[index] for index in positions]


Gradient = Callable[[Tensor], Tensor]
"""Back-propagates a scalar and gives the gradient of some of the parameters, flat; leaves none behind."""


@dataclass(frozen=True, slots=True)
class _Way:
    layout: Layout
    flex: bool = False

    def __str__(self) -> str:
        return f"{self.layout}, FlexAttention" if self.flex else str(self.layout)


@dataclass(frozen=True, slots=True)
class _Scores:
    logps: Tensor
    """Shape (tokens,), float32, on the CPU."""
    gradient: Tensor | None


def settle(
    scorer: PairScorer,
    pairs: Sequence[EncodedPair],
    asked: str,
    processes: Processes,
    say: Callable[[str], None],
    gradient: Gradient | None = None,
) -> None:
    """Sets the fastest layout of the scorer that gives the values of the plain one.

    Args:
        scorer: laid out accordingly afterwards; no dropout may be on.
        pairs: to try it on, the same on every process (`sample`).
        asked: `auto`, or the layout that the user forces.
        processes: all of them must come to the same result.
        say: told where it is not the fastest one, and why.
        gradient: in training, to compare gradients as well.

    Raises:
        NumericsError: the forced layout is wrong for this model.
        UsageError: a backward pass failed, after which nothing can be tried any more.
    """
    scorer.lay_out(Layout.PADDED)
    if asked == Layout.PADDED:
        return
    ways, refused = _ways(scorer, asked)
    plain = _scores(scorer, pairs, gradient) if ways else None
    for way in ways:
        assert plain is not None
        fault = _fault(scorer, way, pairs, plain, gradient)
        # Every process has computed the same, but rounding and compilers are each machine's own.
        if not processes.any(fault is not None):
            break
        refused.append(f"{way}: {fault or 'refused on another process'}")
        scorer.lay_out(Layout.PADDED)
    else:
        if asked != "auto":
            raise NumericsError(
                f"--scoring {asked} is wrong for this model ({'; '.join(refused)}). Use --scoring auto."
            )
    if refused:
        say(
            f"Scoring is {' with '.join(scorer.way.values())}; what is faster is not exact here ({'; '.join(refused)})."
        )


def sample(scorer: PairScorer, views: Sequence[Pairs], seed: int) -> list[EncodedPair]:
    """The pairs to try a layout on: the longest of each view, and some of the first that the seed draws.

    Args:
        scorer: its model's window decides whether long pairs may be cut.
        views: all pairs that will be scored.
        seed: of the draw.
    """
    longest = [int(np.argmax(view.lengths)) for view in views]
    drawn = np.random.default_rng([seed, 0xE4AC7]).permutation(len(views[0].lengths))[:NUM_DRAWN]
    pairs = views[0].load(np.unique([longest[0], *drawn]))
    pairs += [pair for view, position in zip(views[1:], longest[1:], strict=True) for pair in view.load([position])]
    window = window_of(scorer)
    looks_far = window and any(pair.num_tokens_longer > window for pair in pairs)
    return pairs if looks_far else [_cut(pair) for pair in pairs]


def _ways(scorer: PairScorer, asked: str) -> tuple[list[_Way], list[str]]:
    """What to try, from the fastest to the simplest but the plain one; and what need not be tried, with the reason."""
    refused = {}
    if getattr(scorer.model, "_is_stateful", False):
        memory = f"{scorer.model.config.model_type} has layers with a memory, which rows of several pairs mix"
        refused = {Layout.SHARED: memory, Layout.PACKED: memory}
    elif scorer.router_loss:
        refused = {Layout.SHARED: "the router's loss counts a prompt as often as it stands"}
    wanted = [layout for layout in (Layout.SHARED, Layout.PACKED) if asked in ("auto", layout)]
    ways = [
        _Way(layout, flex)
        for layout in wanted
        if layout not in refused
        for flex in ([True, False] if scorer.model.device.type == "cuda" else [False])
    ]
    return ways, list(dict.fromkeys(f"{refused[layout]}" for layout in wanted if layout in refused))


def _fault(
    scorer: PairScorer,
    way: _Way,
    pairs: Sequence[EncodedPair],
    plain: _Scores,
    gradient: Gradient | None,
) -> str | None:
    """What is wrong with a way of scoring, in words; None where nothing is, and the scorer is laid out so."""
    noise = NOISE[scorer.compute_dtype]
    try:
        if way.flex:
            try_kernel(scorer.model, scorer.compute_dtype, backward=gradient is not None)
        scorer.lay_out(way.layout, flex=way.flex)
        fast = _scores(scorer, pairs, gradient)
    except _BackwardError as error:
        raise UsageError(
            f"The backward pass of scoring {way} failed ({_first_line(error)}). Give --scoring "
            f"{Layout.PADDED if way.layout is Layout.PACKED else Layout.PACKED}."
        ) from error
    except Exception as error:  # whatever a model, a compiler or a driver raises: there is a simpler way
        if is_out_of_memory(error):
            raise
        return _first_line(error)
    delta = (fast.logps - plain.logps).abs()
    mean, p99 = float(delta.mean()), float(delta.quantile(0.99))
    # Written so that NaN is a fault.
    if not (mean <= noise.mean and p99 <= noise.p99):
        return f"log-probs differ by {mean:.2g} nats per token on average (99th percentile {p99:.2g})"
    if fast.gradient is not None and plain.gradient is not None:
        off = float((fast.gradient - plain.gradient).norm() / plain.gradient.norm().clamp(min=1e-30))
        if not off <= noise.gradient:
            return f"gradients differ by {off:.2g} of their norm"
    return None


class _BackwardError(Exception):
    """A backward pass was cut off: what wraps the model is in no state to go on from."""


def _first_line(error: BaseException) -> str:
    error = error.__cause__ or error
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def _scores(scorer: PairScorer, pairs: Sequence[EncodedPair], gradient: Gradient | None) -> _Scores:
    """All token log-probs of the pairs, and the gradient of their mean."""
    sizes = [scorer.packing.layout.size(*map(len, pair.all_ids)) for pair in pairs]
    num_tokens = sum(len(pair.chosen_ids) + len(pair.rejected_ids) for pair in pairs)
    logps: dict[int, Tensor] = {}
    total = None
    for members in pack(sizes, scorer.packing):
        with torch.set_grad_enabled(gradient is not None):
            batch, tokens = score(scorer, [pairs[index] for index in members])
        if gradient is not None:
            mean = (tokens.chosen.sum() + tokens.rejected.sum()) / num_tokens
            try:
                part = gradient(mean)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise _BackwardError from error
            total = part if total is None else total + part
        chosen = torch.split(tokens.chosen.detach().float().cpu(), list(batch.chosen_lengths))
        rejected = torch.split(tokens.rejected.detach().float().cpu(), list(batch.rejected_lengths))
        for index, *sides in zip(members, chosen, rejected, strict=True):
            logps[index] = torch.cat(sides)
    return _Scores(torch.cat([logps[index] for index in range(len(pairs))]), total)


def _cut(pair: EncodedPair) -> EncodedPair:
    """The end of the prompt and the beginnings of the sides."""
    half = TOKENS_ENOUGH // 2
    return replace(
        pair,
        prompt_ids=pair.prompt_ids[-half:],
        chosen_ids=pair.chosen_ids[:half],
        rejected_ids=pair.rejected_ids[:half],
        chosen_mask=None,
        rejected_mask=None,
        reference=None,
    )


def window_of(scorer: PairScorer) -> int | None:
    """The shortest stretch that some layer looks back over, where the model declares one."""
    config = scorer.model.config.get_text_config()
    declared = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((int(window) for window in declared if window), default=None)
