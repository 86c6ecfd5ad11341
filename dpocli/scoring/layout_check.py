"""Is a fast way of scoring right for this model? Asked at every start, never assumed.

Rows that hold several pairs rest on what a model does with positions and attention: windows, sinks, soft caps, recurrent
layers and what comes next year. So a few pairs are tried (`engine.trial`): where plain and fast scoring differ by more
than the dtype's noise, the next simpler way is taken.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes
from dpocli.errors import NumericsError, ResourceError
from dpocli.scoring.layout_trial import OUT_OF_MEMORY, Gradient, Trial
from dpocli.scoring.scorer import PairScorer

NUM_DRAWN = 3

TOKENS_ENOUGH = 512
"""Longer pairs are cut for the check, unless the model has a window to look beyond."""


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


@dataclass(frozen=True, slots=True)
class _Way:
    layout: Layout
    flex: bool = False

    def __str__(self) -> str:
        return f"{self.layout}, FlexAttention" if self.flex else str(self.layout)


def choose_layout(
    scorer: PairScorer,
    pairs: Sequence[EncodedPair],
    asked: str,
    processes: Processes,
    say: Callable[[str], None],
    gradient: Gradient | None = None,
    *,
    dropout: bool = False,
) -> None:
    """Sets the fastest layout of the scorer that gives the values of the plain one.

    Args:
        scorer: laid out accordingly afterwards; no dropout may be on.
        pairs: to try it on, the same on every process (`sample`).
        asked: `auto`, or the layout that the user forces.
        processes: all of them must come to the same result.
        say: told where it is not the fastest one, and why.
        gradient: in training, to compare gradients as well.
        dropout: whether there will be some, which FlexAttention does not have.

    Raises:
        NumericsError: the forced layout is wrong for this model.
        UsageError: a backward pass failed, after which nothing can be tried any more.
        ResourceError: the memory is not enough for a backward pass, or for the forced layout.
    """
    scorer.lay_out(Layout.PADDED)
    if asked == Layout.PADDED:
        return
    ways, refused = _ways(scorer, asked, dropout)
    trial = Trial(scorer, pairs, processes, gradient) if ways else None
    for way in ways:
        assert trial
        fault = trial.fault(way.layout, flex=way.flex)
        if fault is None:
            break
        refused.append(f"{way}: {fault}")
        scorer.lay_out(Layout.PADDED)
    else:
        if asked != "auto" and any(reason.endswith(OUT_OF_MEMORY) for reason in refused):
            raise ResourceError(
                f"--scoring {asked} cannot be tried on this model: the memory is not enough. Use --scoring auto, which takes "
                "what fits, or a smaller --token-budget."
            )
        if asked != "auto":
            raise NumericsError(
                f"--scoring {asked} is wrong for this model ({'; '.join(refused)}). Use --scoring auto."
            )
    if refused:
        taken = " with ".join(scorer.way.values())
        say(f"Scoring is {taken}; what is faster cannot be used here ({'; '.join(refused)}).")


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


def _ways(scorer: PairScorer, asked: str, dropout: bool) -> tuple[list[_Way], list[str]]:
    """What to try, from the fastest to the simplest but the plain one; and what need not be tried, with the reason."""
    refused = {}
    if getattr(scorer.model, "_is_stateful", False):
        memory = f"{scorer.model.config.model_type} has layers with a memory, which rows of several pairs mix"
        refused = {Layout.SHARED: memory, Layout.PACKED: memory}
    elif scorer.router_loss:
        refused = {Layout.SHARED: "the router's loss counts a prompt as often as it stands"}
    wanted = [layout for layout in (Layout.SHARED, Layout.PACKED) if asked in ("auto", layout)]
    kernels = [True, False] if scorer.device.type == "cuda" and not dropout else [False]
    ways = [_Way(layout, flex) for layout in wanted if layout not in refused for flex in kernels]
    return ways, list(dict.fromkeys(refused[layout] for layout in wanted if layout in refused))


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
