"""Is a fast way of scoring right for this model? Asked at every start, never assumed.

Rows that hold several pairs rest on what a model does with positions and attention: windows, sinks, soft caps, recurrent
layers and what comes next year. So a few pairs are scored plainly, one padded row a side, and then the fast way, in
training with their gradients; where the two differ by more than the dtype's noise, the next simpler way is tried.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.artifacts.status import is_out_of_memory
from dpocli.data.batches import Layout, pack
from dpocli.data.preference import EncodedPair
from dpocli.engine.mesh import Processes
from dpocli.engine.passes import score
from dpocli.errors import NumericsError
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
        scorer: laid out accordingly afterwards.
        pairs: to try it on, the same on every process (`sample`).
        asked: `auto`, or the layout that the user forces.
        processes: all of them must come to the same result.
        say: told where it is not the fastest one, and why.
        gradient: in training, to compare gradients as well.

    Raises:
        NumericsError: the forced layout is wrong for this model.
    """
    if asked == Layout.PADDED:
        return
    plain = _scores(scorer, pairs, gradient)
    found: list[str] = []
    for way in _ways(scorer, asked):
        fault = _fault(scorer, way, pairs, plain, NOISE[scorer.compute_dtype], gradient)
        # Every process has computed the same, but rounding and compilers are each machine's own.
        if not processes.any(fault is not None):
            break
        found.append(f"{way}: {fault or 'refused on another process'}")
        scorer.lay_out(Layout.PADDED)
    else:
        if asked != "auto":
            raise NumericsError(f"--scoring {asked} is wrong for this model: {'; '.join(found)}. Use --scoring auto.")
        found = found or [f"{scorer.model.config.model_type} has layers with a memory, which rows of several pairs mix"]
    if found:
        say(f"Scoring is {' with '.join(scorer.way.values())}; other ways are not exact here ({'; '.join(found)}).")


def sample(
    scorer: PairScorer, lengths: NDArray[np.int64], seed: int, load: Callable[[NDArray[np.int64]], list[EncodedPair]]
) -> list[EncodedPair]:
    """The pairs to try a layout on: the longest, and some that the seed draws.

    Args:
        scorer: its model's window decides whether long pairs may be cut.
        lengths: tokens of prompt + the longer side, shape (pairs,).
        seed: of the draw.
        load: gives the pairs at some positions.
    """
    longest = int(np.argmax(lengths))
    drawn = np.random.default_rng([seed, 0xE4AC7]).permutation(len(lengths))[:NUM_DRAWN]
    pairs = load(np.unique([longest, *drawn]))
    window = window_of(scorer)
    return pairs if window and lengths[longest] > window else [_cut(pair) for pair in pairs]


def _ways(scorer: PairScorer, asked: str) -> Iterator[_Way]:
    """From the fastest to the simplest but the plain one."""
    if getattr(scorer.model, "_is_stateful", False):
        return
    for layout in (Layout.SHARED, Layout.PACKED):
        # The router's loss counts every row's tokens, so a prompt must stand as often as in the plain layout.
        if asked in ("auto", layout) and not (layout is Layout.SHARED and scorer.router_loss):
            if scorer.model.device.type == "cuda":
                yield _Way(layout, flex=True)
            yield _Way(layout)


def _fault(
    scorer: PairScorer,
    way: _Way,
    pairs: Sequence[EncodedPair],
    plain: _Scores,
    noise: Noise,
    gradient: Gradient | None,
) -> str | None:
    """What is wrong with a way of scoring, in words; None where nothing is, and the scorer is laid out so."""
    try:
        scorer.lay_out(way.layout, flex=way.flex)
        fast = _scores(scorer, pairs, gradient)
    except Exception as error:  # whatever a model, a compiler or a driver raises: there is a simpler way
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
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
            part = gradient((tokens.chosen.sum() + tokens.rejected.sum()) / num_tokens)
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
