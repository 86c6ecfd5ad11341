"""Losses without a reference: SimPO and its variants, and losses that also imitate the chosen answer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, bounded_exp, mean_logps, ranked_by, smoothed_logistic


def simpo(logps: PairLogps, *, beta: float, gamma: float = 1.0, label_smoothing: float = 0.0) -> LossOutput:
    """Simple Preference Optimization: no reference, mean log-probs, and a target margin.

        L = -log σ(β/|chosen| log π(chosen) - β/|rejected| log π(rejected) - γ)

    Label smoothing ε acts as in `dpo`.

    Use it without a reference, where the length of answers must not count.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: scale of the margin, > 0.
        gamma: γ >= 0, the target margin; it is not multiplied by β.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × mean log-prob per token.

    Other implementations:
        γ is subtracted as in the paper; code that takes γ/β multiplies it by β.

    References:
        Meng et al. 2024, arXiv:2405.14734, eq. 6.
    """
    chosen, rejected = (beta * mean for mean in mean_logps(logps))
    return ranked_by(smoothed_logistic(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def simpo_hinge(logps: PairLogps, *, beta: float, gamma: float = 1.0) -> LossOutput:
    """SimPO with a hinge in place of the logistic loss.

        L = max(0, 1 - [β/|chosen| log π(chosen) - β/|rejected| log π(rejected) - γ])

    Use it as `simpo`, where pairs with a sufficient margin must not be trained on.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: scale of the margin, > 0.
        gamma: γ >= 0, the target margin; it is not multiplied by β.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × mean log-prob per token.

    References:
        Meng et al. 2024, arXiv:2405.14734, a loss type of the authors' code.
    """
    chosen, rejected = (beta * mean for mean in mean_logps(logps))
    return ranked_by(torch.relu(1 - (chosen - rejected - gamma)), chosen, rejected)


def alphapo(
    logps: PairLogps, *, beta: float, gamma: float = 0.25, label_smoothing: float = 0.0, alphapo_alpha: float = 0.25
) -> LossOutput:
    """AlphaPO: SimPO with the shape of the reward as a parameter.

        L = -log σ(r(chosen) - r(rejected) - γ),   r(y) = β (1 - exp(-α log π(y)/|y|)) / α

    α = 0 is SimPO. Beyond e^20, exp continues as its tangent. Label smoothing ε acts as in `dpo`.

    Use it where `simpo` lowers the likelihood of both answers too much.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: scale of the reward, > 0.
        gamma: γ >= 0, the target margin.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.
        alphapo_alpha: α, the shape of the reward.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are r.

    References:
        Gupta et al. 2025, arXiv:2501.03884.
    """

    def reward(mean: Tensor) -> Tensor:
        if alphapo_alpha == 0:
            return beta * mean
        return beta * (1 - bounded_exp(-alphapo_alpha * mean)) / alphapo_alpha

    chosen, rejected = map(reward, mean_logps(logps))
    return ranked_by(smoothed_logistic(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def cpo(logps: PairLogps, *, beta: float, sft_weight: float = 1.0, label_smoothing: float = 0.0) -> LossOutput:
    """Contrastive Preference Optimization: DPO with a uniform reference, plus the likelihood of the chosen answer.

        L = -log σ(β [log π(chosen) - log π(rejected)]) - λ log π(chosen) / |chosen|

    Label smoothing ε acts as in `dpo`.

    Use it for translation and similar tasks, where the chosen answer is also to be imitated.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: scale of the margin, > 0.
        sft_weight: λ >= 0, the weight of the likelihood term.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-prob.

    Other implementations:
        The likelihood term is a mean per token of the chosen answer, as in the authors' code, TRL and Liger.

    References:
        Xu et al. 2024, arXiv:2401.08417.
    """
    chosen, rejected = beta * logps.policy_chosen, beta * logps.policy_rejected
    likelihood = logps.policy_chosen / logps.chosen_tokens
    return ranked_by(smoothed_logistic(chosen - rejected, label_smoothing) - sft_weight * likelihood, chosen, rejected)


def orpo(logps: PairLogps, *, beta: float) -> LossOutput:
    """Odds Ratio Preference Optimization: likelihood of the chosen answer plus the log odds ratio of the two answers.

        L = -log π(chosen)/|chosen| - β log σ(log odds(chosen) - log odds(rejected)),
        odds(y) = P/(1 - P),   log P = log π(y)/|y|

    The odds of a certain answer are infinite: P is clamped below 1 by the rounding of its dtype.

    Use it from a base model in one stage, without SFT and without a reference.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: weight of the odds ratio, > 0, λ in the paper.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × mean log-prob per token, which orders answers as their odds
        do.

    Other implementations:
        The likelihood term covers the answer, as in LLaMA-Factory and Liger; TRL's also covers the prompt.

    References:
        Hong et al. 2024, arXiv:2403.07691, eq. 6.
    """
    chosen, rejected = mean_logps(logps)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return ranked_by(-chosen - beta * F.logsigmoid(log_odds_ratio), beta * chosen, beta * rejected)


def _log_odds(mean: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P <= 0."""
    below_one = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))


def slic(logps: PairLogps, *, beta: float, sft_weight: float = 0.1) -> LossOutput:
    """Sequence Likelihood Calibration (SLiC-HF): a hinge on the log-probs plus the likelihood of the chosen answer.

        L = max(0, β - log π(chosen) + log π(rejected)) - λ log π(chosen)

    The chosen answer is the target of the paper's regularization.

    Use it without a reference, for a margin in nats.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: margin in nats, > 0, δ in the paper.
        sft_weight: λ >= 0, the weight of the likelihood term.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are summed log-probs, without β.

    Other implementations:
        The likelihood term is a sum over the chosen answer; HALOs divides it by the padded width of the batch.

    References:
        Zhao et al. 2023, arXiv:2305.10425, eq. 4.
    """
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    return ranked_by(torch.relu(beta - chosen + rejected) - sft_weight * chosen, chosen, rejected)
