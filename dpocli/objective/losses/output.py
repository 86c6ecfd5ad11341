"""What a loss returns, and the helpers that the families share."""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from dpocli.objective.logps import PairLogps


@dataclass(frozen=True, slots=True)
class LossOutput:
    """Per pair, never reduced. Shapes (pairs,)."""

    losses: Tensor
    chosen_rewards: Tensor
    """What the loss ranks by, no gradient."""
    rejected_rewards: Tensor


def log_ratios(logps: PairLogps) -> tuple[Tensor, Tensor]:
    """log π(y|x) - log π_ref(y|x) of the chosen and the rejected side. Shapes (pairs,), nats."""
    assert logps.reference_chosen is not None, "the start-up checks refuse this loss without a reference"
    assert logps.reference_rejected is not None
    return logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected


def smoothed_logistic(margin: Tensor, label_smoothing: float) -> Tensor:
    """-(1 - ε) log σ(margin) - ε log σ(-margin). Shape (pairs,); finite at any finite margin.

    Mitchell 2023, "A note on DPO with noisy preferences & relationship to IPO".
    """
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


def ranked_by(losses: Tensor, chosen: Tensor, rejected: Tensor) -> LossOutput:
    """The output of a loss that ranks by these two quantities."""
    return LossOutput(losses, chosen.detach(), rejected.detach())
