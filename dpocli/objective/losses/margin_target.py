"""Losses that drive the margin to a target: the square of IPO, and the hinge of RSO and SLiC."""

import torch

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, log_ratios, mean_log_ratios, ranked_by


def ipo(logps: PairLogps, *, beta: float, reduction: str = "mean") -> LossOutput:
    """Identity Preference Optimization: the squared distance of the margin to 1/(2β), which does not saturate.

        L = (h - 1/(2β))²,   h = log π/π_ref (chosen) - log π/π_ref (rejected), per token ("mean") or summed ("sum")

    Use it where DPO overfits pairs on which all raters agree.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0, τ in the paper.
        reduction: "mean" divides each log-ratio by its token count, "sum" does not.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × log-ratio, reduced in the same way.

    Other implementations:
        The formula has sums; the authors confirmed that their experiments average per token, as TRL and HALOs do, and
        as the default does. `--reduction sum` is the loss of the original DPO repository, torchtune and OpenRLHF.

    References:
        Azar et al. 2023, arXiv:2310.12036, eq. 17.
    """
    chosen, rejected = mean_log_ratios(logps) if reduction == "mean" else log_ratios(logps)
    return ranked_by((chosen - rejected - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


def hinge(logps: PairLogps, *, beta: float) -> LossOutput:
    """Hinge on the log-ratio margin: the gradient is zero once the margin exceeds 1/β.

        L = max(0, 1 - β h),   h = log π/π_ref (chosen) - log π/π_ref (rejected)

    Use it where pairs with a sufficient margin must not be trained on.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0, γ in the paper.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    References:
        Liu et al. 2023 (RSO), arXiv:2309.06657, hinge-norm, after SLiC.
    """
    chosen, rejected = log_ratios(logps)
    return ranked_by(torch.relu(1 - beta * (chosen - rejected)), beta * chosen, beta * rejected)
