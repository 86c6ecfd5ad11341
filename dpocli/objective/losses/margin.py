"""Losses that drive the margin to a target: IPO's square, the hinge of RSO and SLiC, and SimPO's shifted logistic."""

import torch

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, log_ratios, ranked_by, smoothed_logistic


def ipo(logps: PairLogps, *, beta: float, reduction: str = "mean") -> LossOutput:
    """Identity Preference Optimization: the squared distance of the margin to 1/(2β), which cannot saturate.

        L = (h - 1/(2β))²,   h = margin of the log-ratios, per token ("mean") or summed ("sum")

    Azar et al. 2023, arXiv:2310.12036, eq. 17, where β is called τ. The formula sums; the authors confirmed that their
    experiments average per token, as TRL and HALOs do, and so does the default. "sum" is what the original DPO
    repository, torchtune and OpenRLHF compute.

    Returns:
        Rewards are β x log-ratio, reduced in the same way.
    """
    chosen, rejected = log_ratios(logps)
    if reduction == "mean":
        chosen, rejected = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
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


def simpo(logps: PairLogps, *, beta: float, gamma: float = 1.0, label_smoothing: float = 0.0) -> LossOutput:
    """Simple Preference Optimization: no reference, mean log-probs, and a target margin.

        L = -log σ(β/|chosen| log π(chosen) - β/|rejected| log π(rejected) - γ)

    Meng et al. 2024, arXiv:2405.14734, eq. 6. γ is subtracted as in the paper; code that takes γ/β multiplies it by β.

    Returns:
        Rewards are β x mean log-prob per token.
    """
    chosen = beta * logps.policy_chosen / logps.chosen_tokens
    rejected = beta * logps.policy_rejected / logps.rejected_tokens
    return ranked_by(smoothed_logistic(chosen - rejected - gamma, label_smoothing), chosen, rejected)
