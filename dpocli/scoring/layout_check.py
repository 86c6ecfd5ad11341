"""Choose the fastest layout that gives this model's own log-probs; verified at every start.

Rows of several pairs are right only if positions and attention behave as expected, which windows, sinks, soft caps,
recurrent layers, and architectures to come may not. So:

1. Candidates: the shared layout, then the packed one; on CUDA with FlexAttention first.
2. Pairs: the longest of each data set, the shortest, and a median one (`sample`).
3. Comparison with the oracle, the model's own forward pass over one sequence (`LayoutTrial`): log-probs within the dtype's
   rounding in each region of a side, no influence of other tokens of the row, and in training the gradients of the padded
   layout.

The first candidate without a mismatch is used, or else the padded layout, which is compared with the oracle first; where
padding changes what a model computes, its rows are scored one by one.
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
from dpocli.scoring.layout_trial import OUT_OF_MEMORY, Candidate, Gradient, LayoutTrial
from dpocli.scoring.oracle import EDGE
from dpocli.scoring.scorer import PairScorer

MAX_TOKENS = 512
"""Longer pairs are cut for the check, unless the model has a window that they exceed."""


class Pairs(Protocol):
    """Pairs with known lengths that can be loaded, such as a `PairView`."""

    @property
    def lengths(self) -> NDArray[np.int64]: ...
    def load(self, positions: Sequence[int] | NDArray[np.int64], /) -> list[EncodedPair]: ...


@dataclass(frozen=True, slots=True)
class PairsInMemory:
    """Loaded pairs, with the interface of `Pairs`."""

    pairs: Sequence[EncodedPair]

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt + the longer side, shape (pairs,)."""
        return np.array([pair.num_tokens_longer for pair in self.pairs], dtype=np.int64)

    def load(self, positions: Sequence[int] | NDArray[np.int64]) -> list[EncodedPair]:
        return [self.pairs[index] for index in positions]


def choose_layout(
    scorer: PairScorer,
    pairs: Sequence[EncodedPair],
    asked: str,
    processes: Processes,
    log: Callable[[str], None],
    gradient: Gradient | None = None,
    *,
    dropout: bool = False,
) -> None:
    """Set the scorer to the fastest layout that matches the oracle.

    Args:
        scorer: without active dropout.
        pairs: to compare layouts on, the same on every process (`sample`).
        asked: `auto`, or the layout that the user forces.
        processes: all of them choose the same layout.
        log: receives one line if a faster layout was rejected, with the reasons.
        gradient: in training, to compare gradients as well.
        dropout: whether dropout will be active, which FlexAttention does not support.

    Raises:
        NumericsError: the forced layout is wrong for this model, or none is right.
        UsageError: a backward pass failed, after which no other layout can be tried.
        ResourceError: out of memory in a backward pass, or in the forced layout.
    """
    scorer.lay_out(Layout.PADDED)
    scorer.rows_alone = False
    trial = LayoutTrial(scorer, pairs, processes, gradient)
    candidates, rejected = _candidates(scorer, asked, dropout)
    if padded := trial.padded_mismatch():
        scorer.rows_alone = True
        trial = LayoutTrial(scorer, pairs, processes, gradient)
        if found := trial.padded_mismatch():
            raise NumericsError(
                f"--model: its log-probs differ from the forward pass of {scorer.model.config.model_type} in transformers, "
                f"in the {found}; with padding, in the {padded}. It cannot be used: try another --dtype, or report this."
            )
        rejected.append(f"padded: log-probs differ in the {padded}")
    if asked == Layout.PADDED:
        candidates = []
    for candidate in candidates:
        mismatch = trial.mismatch(candidate)
        if mismatch is None:
            break
        rejected.append(f"{candidate}: {mismatch}")
        scorer.lay_out(Layout.PADDED)
    else:
        forced = asked not in ("auto", Layout.PADDED)
        if forced and any(reason.endswith(OUT_OF_MEMORY) for reason in rejected):
            raise ResourceError(
                f"--scoring {asked} cannot be tried on this model: out of memory. Use --scoring auto, which takes a layout "
                "that fits, or a smaller --token-budget."
            )
        if forced:
            raise NumericsError(
                f"--scoring {asked} is wrong for this model ({'; '.join(rejected)}). Use --scoring auto."
            )
    if rejected:
        chosen = " with ".join(scorer.layout_info.values())
        log(f"Scoring is {chosen}; faster layouts cannot be used here ({'; '.join(rejected)}).")


def sample(scorer: PairScorer, views: Sequence[Pairs], seed: int) -> list[EncodedPair]:
    """Select the pairs to compare layouts on: the longest of each view, and the shortest, a median and a drawn one of the first.

    Args:
        scorer: its model's window decides whether long pairs are cut.
        views: all pairs to be scored.
        seed: of the draw.
    """
    longest = [int(np.argmax(view.lengths)) for view in views]
    by_length = np.argsort(views[0].lengths, kind="stable")
    drawn = np.random.default_rng([seed, 0xE4AC7]).integers(len(by_length))
    pairs = views[0].load(np.unique([longest[0], by_length[0], by_length[len(by_length) // 2], drawn]))
    pairs += [pair for view, position in zip(views[1:], longest[1:], strict=True) for pair in view.load([position])]
    shortest = pairs[0]
    pairs.append(
        # Short-range mixers (convolutions, token shift) reach over a prompt of one token into the pair before.
        replace(
            shortest,
            prompt_ids=shortest.prompt_ids[-1:],
            chosen_ids=shortest.chosen_ids[: 2 * EDGE],
            rejected_ids=shortest.rejected_ids[: 2 * EDGE],
            chosen_mask=None,
            rejected_mask=None,
            reference=None,
        )
    )
    window = window_of(scorer)
    exceeds_window = window and any(pair.num_tokens_longer > window for pair in pairs)
    return pairs if exceeds_window else [_cut(pair) for pair in pairs]


def window_of(scorer: PairScorer) -> int | None:
    """The smallest attention window of the model's layers in tokens, if its configuration declares one."""
    config = scorer.model.config.get_text_config()
    declared = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((int(window) for window in declared if window), default=None)


def _candidates(scorer: PairScorer, asked: str, dropout: bool) -> tuple[list[Candidate], list[str]]:
    """Layouts to try, the fastest first; and the reasons against those known to be wrong."""
    known_wrong = {}
    if getattr(scorer.model, "_is_stateful", False):
        reason = f"{scorer.model.config.model_type} has recurrent layers, whose state would mix the pairs of a row"
        known_wrong = {Layout.SHARED: reason, Layout.PACKED: reason}
    elif scorer.router_loss:
        known_wrong = {Layout.SHARED: "the router loss counts each prompt once per side"}
    wanted = [layout for layout in (Layout.SHARED, Layout.PACKED) if asked in ("auto", layout)]
    kernels = [True, False] if scorer.device.type == "cuda" and not dropout else [False]
    candidates = [Candidate(layout, flex) for layout in wanted if layout not in known_wrong for flex in kernels]
    return candidates, list(dict.fromkeys(known_wrong[layout] for layout in wanted if layout in known_wrong))


def _cut(pair: EncodedPair) -> EncodedPair:
    """The end of the prompt and the starts of the sides, at most `MAX_TOKENS` together on each side."""
    half = MAX_TOKENS // 2
    return replace(
        pair,
        prompt_ids=pair.prompt_ids[-half:],
        chosen_ids=pair.chosen_ids[:half],
        rejected_ids=pair.rejected_ids[:half],
        chosen_mask=None,
        rejected_mask=None,
        reference=None,
    )
