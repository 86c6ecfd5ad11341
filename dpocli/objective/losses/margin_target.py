"""Losses that drive the margin to a target and are content there: IPO's square, and the hinge of RSO and SLiC."""

import torch

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, log_ratios, mean_log_ratios, ranked_by


def ipo(logps: PairLogps, *, beta: float, reduction: str = "mean") -> LossOutput:
    """Identity Preference Optimization: the squared distance of the margin to 1/(2β), which cannot saturate.

        L = (h - 1/(2β))²,   h = margin of the log-ratios, per token ("mean") or summed ("sum")

    Azar et al. 2023, arXiv:2310.12036, eq. 17, where β is called τ. The formula sums; the authors confirmed that their
    experiments average per token, as TRL and HALOs do, and so does the default. "sum" is what the original DPO
    repository, torchtune and OpenRLHF compute.

    Returns:
        Rewards are β x log-ratio, reduced in the same way.
    """
    chosen, rejected = mean_log_ratios(logps) if reduction == "mean" else log_ratios(logps)
    return ranked_by((chosen - rejected - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


def hinge(logps: PairLogps, *, beta: float) -> LossOutput:
    """Hinge on the log-ratio margin: a pair that is right by 1/β nats asks for nothing more.

        L = max(0, 1 - β h)

    Liu et al. 2023 (RSO), arXiv:2309.06657, hinge-norm, after SLiC; β is called γ there.

    Returns:
        Rewards are β x summed log-ratio.
    """
    chosen, rejected = log_ratios(logps)
    return ranked_by(torch.relu(1 - beta * (chosen - rejected)), beta * chosen, beta * rejected)
