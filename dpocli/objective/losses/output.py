"""The output of a loss, and functions that the families share."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from dpocli.objective.logps import PairLogps

LossState = Mapping[str, float]
"""The running statistic of a stateful loss. Python's floats are float64."""


@dataclass(frozen=True, slots=True)
class LossOutput:
    """The result of a loss for each pair, never reduced. Shapes (pairs,)."""

    losses: Tensor
    chosen_rewards: Tensor
    """What the loss ranks by, no gradient."""
    rejected_rewards: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    """Of a weighted sum: the losses of each term by name, before its weight, no gradient."""


def log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """log π(y|x) - log π_ref(y|x) of the chosen and the rejected answer. Shapes (pairs,), nats."""
    assert logps.reference_chosen is not None, "the start-up checks refuse this loss without a reference"
    assert logps.reference_rejected is not None
    return logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected


def mean_log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """Log-ratios divided by the token counts. Shapes (pairs,), nats per token."""
    chosen, rejected = log_ratios(logps)
    return chosen / logps.chosen_tokens, rejected / logps.rejected_tokens


def mean_logps(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """log π(y|x) divided by the token counts. Shapes (pairs,), nats per token."""
    return logps.policy_chosen / logps.chosen_tokens, logps.policy_rejected / logps.rejected_tokens


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - ε) log σ(margin) - ε log σ(-margin). Shape (pairs,); finite at any finite margin.

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


EXPONENT_BOUND = 20.0


def bounded_exp(exponent: Tensor) -> Tensor:
    """exp, continued as its tangent beyond e^20.

    There the value has no meaning for training, and an infinity would end the run: the log-probs of tokens are float32,
    and so is their gradient. The slope remains, so that an answer that fell this far is still raised.
    """
    beyond = torch.relu(exponent - EXPONENT_BOUND)
    return torch.exp(exponent.clamp(max=EXPONENT_BOUND)) * (1 + beyond)


def ranked_by(losses: Tensor, chosen: Tensor, rejected: Tensor) -> LossOutput:
    """The output of a loss that ranks by these two quantities, which lose their gradient."""
    return LossOutput(losses, chosen.detach(), rejected.detach())
