"""Numbers and choices of losses: names, defaults, bounds, and what they need from the scorer."""

import operator
import re
from dataclasses import dataclass
from enum import StrEnum

Value = float | str


class Need(StrEnum):
    """What a loss reads beyond the policy's sums and the token counts."""

    REFERENCE = "the reference's log-probs"
    COLLISION = "log sum_v p(v)^2 of the policy at every token"
    TAILS = "per-token values: sums beyond the tokens that both sides have"
    WHOLE_BATCH = "all pairs of the batch at once"


@dataclass(frozen=True, slots=True)
class Hyperparameter:
    """A number or choice of a loss. Its name is the function's keyword, the key in YAML and, with dashes, the flag."""

    name: str
    default: Value
    help: str
    minimum: float | None = None
    above: float | None = None
    """Exclusive."""
    maximum: float | None = None
    below: float | None = None
    """Exclusive."""
    choices: tuple[str, ...] = ()
    need: Need | None = None
    """What any value but `off` needs."""
    off: Value | None = None

    def parse(self, given: Value) -> Value:
        """Read a value.

        Raises:
            ValueError: it is no such value, or out of bounds; the message says what is allowed.
        """
        if self.choices:
            if given not in self.choices:
                raise ValueError(f"is not one of {', '.join(self.choices)}")
            return given
        # float() alone would also take 1_0, and digits of other scripts.
        if isinstance(given, str) and not re.fullmatch(r"[-+.a-z0-9]+", given.strip(), re.ASCII | re.IGNORECASE):
            raise ValueError("must be a number")
        try:
            value = float(given)
        except ValueError:
            raise ValueError("must be a number") from None
        if not abs(value) < float("inf"):
            raise ValueError("must be a finite number")
        bounds = (
            (self.minimum, "at least", operator.ge),
            (self.above, "above", operator.gt),
            (self.maximum, "at most", operator.le),
            (self.below, "below", operator.lt),
        )
        for bound, words, holds in bounds:
            if bound is not None and not holds(value, bound):
                raise ValueError(f"must be {words} {bound:g}")
        return value


BETA = Hyperparameter("beta", 0.1, "KL-penalty strength", above=0.0)

LABEL_SMOOTHING = Hyperparameter(
    "label_smoothing", 0.0, "assumed share of pairs whose label is flipped", minimum=0.0, below=0.5
)

GAMMA = Hyperparameter("gamma", 1.0, "target reward margin (not multiplied by beta)", minimum=0.0)

REDUCTION = Hyperparameter(
    "reduction", "mean", "log-probs per token (mean) or per answer (sum)", choices=("mean", "sum")
)

SFT_WEIGHT = Hyperparameter("sft_weight", 1.0, "weight of the likelihood term", minimum=0.0)

DELTA = Hyperparameter(
    "delta",
    "running",
    "shift of the rewards: their mean over all pairs so far (running), or none",
    choices=("running", "none"),
    need=Need.WHOLE_BATCH,
    off="none",
)

LD_ALPHA = Hyperparameter(
    "ld_alpha",
    1.0,
    "LD-DPO: weight of the tokens beyond the length of the shorter answer (1: off)",
    minimum=0.0,
    maximum=1.0,
    need=Need.TAILS,
    off=1.0,
)

F_DIVERGENCE = Hyperparameter(
    "f_divergence",
    "reverse_kl",
    "f-DPO: divergence from the reference, at the ratios of the sampled answers",
    choices=("reverse_kl", "forward_kl", "js", "alpha"),
    off="reverse_kl",
)

F_ALPHA = Hyperparameter(
    "f_alpha", 0.5, "order of the alpha divergence: towards 0 the reverse KL, 1 the forward KL", above=0.0, below=1.0
)

WEIGHTING = Hyperparameter(
    "weighting",
    "none",
    "wpo: weight each pair by its likelihood under the policy",
    choices=("none", "wpo"),
    need=Need.COLLISION,
    off="none",
)

MODIFIERS = (LD_ALPHA, F_DIVERGENCE, F_ALPHA, WEIGHTING)
"""They change several losses in the same way, and are off unless given."""
