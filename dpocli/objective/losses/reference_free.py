"""Losses without a reference: SimPO and its kin, and those that also imitate the chosen answer."""

import torch
import torch.nn.functional as F
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, bounded_exp, mean_logps, ranked_by, smoothed_logistic


def simpo(logps: PairLogps, *, beta: float, gamma: float = 1.0, label_smoothing: float = 0.0) -> LossOutput:
    """Simple Preference Optimization: no reference, mean log-probs, and a target margin.

        L = -log σ(β/|chosen| log π(chosen) - β/|rejected| log π(rejected) - γ)

    Meng et al. 2024, arXiv:2405.14734, eq. 6. γ is subtracted as in the paper; code that takes γ/β multiplies it by β.

    Returns:
        Rewards are β x mean log-prob per token.
    """
    chosen, rejected = (beta * mean for mean in mean_logps(logps))
    return ranked_by(smoothed_logistic(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def simpo_hinge(logps: PairLogps, *, beta: float, gamma: float = 1.0) -> LossOutput:
    """SimPO with a hinge, a loss type of its code.

        L = max(0, 1 - [β/|chosen| log π(chosen) - β/|rejected| log π(rejected) - γ])

    Meng et al. 2024, arXiv:2405.14734.

    Returns:
        Rewards are β x mean log-prob per token.
    """
    chosen, rejected = (beta * mean for mean in mean_logps(logps))
    return ranked_by(torch.relu(1 - (chosen - rejected - gamma)), chosen, rejected)


def alphapo(
    logps: PairLogps, *, beta: float, gamma: float = 0.25, label_smoothing: float = 0.0, alphapo_alpha: float = 0.25
) -> LossOutput:
    """AlphaPO: SimPO with the shape of the reward as a parameter.

        L = -log σ(r(chosen) - r(rejected) - γ),   r(y) = β (1 - exp(-α log π(y)/|y|)) / α

    Gupta et al. 2025, arXiv:2501.03884. α = 0 is SimPO. exp goes on as its tangent from e^20.

    Returns:
        Rewards are r.
    """

    def reward(mean: Tensor) -> Tensor:
        if alphapo_alpha == 0:
            return beta * mean
        return beta * (1 - bounded_exp(-alphapo_alpha * mean)) / alphapo_alpha

    chosen, rejected = map(reward, mean_logps(logps))
    return ranked_by(smoothed_logistic(chosen - rejected - gamma, label_smoothing), chosen, rejected)


def cpo(logps: PairLogps, *, beta: float, sft_weight: float = 1.0, label_smoothing: float = 0.0) -> LossOutput:
    """Contrastive Preference Optimization: DPO against a uniform reference, plus imitation of the chosen answer.

        L = -log σ(β [log π(chosen) - log π(rejected)]) - λ log π(chosen) / |chosen|

    Xu et al. 2024, arXiv:2401.08417. The likelihood term is a mean per token, as in the authors' code, TRL and Liger.

    Args:
        logps: sums per side, and token counts.
        beta: scale of the margin.
        sft_weight: λ >= 0.
        label_smoothing: ε in [0, 0.5).

    Returns:
        Rewards are β x summed log-prob.
    """
    chosen, rejected = beta * logps.policy_chosen, beta * logps.policy_rejected
    likelihood = logps.policy_chosen / logps.chosen_tokens
    return ranked_by(smoothed_logistic(chosen - rejected, label_smoothing) - sft_weight * likelihood, chosen, rejected)


def orpo(logps: PairLogps, *, beta: float) -> LossOutput:
    """Odds Ratio Preference Optimization: imitation of the chosen answer, plus the odds ratio of the sides.

        L = -log P(chosen) - λ log σ(log odds(chosen) - log odds(rejected)),   odds = P/(1 - P),   log P = log π(y)/|y|

    Hong et al. 2024, arXiv:2403.07691, eq. 6, where β is called λ. The likelihood is the answer's, as in LLaMA-Factory
    and Liger; TRL takes the prompt's tokens in. The odds of an answer that is certain are infinite: P is held below
    1 by the rounding of its dtype.

    Returns:
        Rewards are β x mean log-prob per token, which orders answers as their odds do.
    """
    chosen, rejected = mean_logps(logps)
    log_odds_ratio = _log_odds(chosen) - _log_odds(rejected)
    return ranked_by(-chosen - beta * F.logsigmoid(log_odds_ratio), beta * chosen, beta * rejected)


def _log_odds(mean: Tensor) -> Tensor:
    """log(P / (1 - P)) from log P <= 0."""
    below_one = mean.clamp(max=-torch.finfo(mean.dtype).eps)
    return below_one - torch.log(-torch.expm1(below_one))


def slic(logps: PairLogps, *, beta: float, sft_weight: float = 0.1) -> LossOutput:
    """Sequence Likelihood Calibration (SLiC-HF): a hinge on the log-probs, plus imitation of the chosen answer.

        L = max(0, δ - log π(chosen) + log π(rejected)) - λ log π(chosen)

    Zhao et al. 2023, arXiv:2305.10425, eq. 4, where β is called δ; the chosen answer stands for its regularization target.
    HALOs divides the likelihood term by the padded width of the batch; here it is the sum.

    Args:
        logps: sums per side.
        beta: δ, the margin in nats.
        sft_weight: λ >= 0.

    Returns:
        Rewards are summed log-probs, without β.
    """
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    return ranked_by(torch.relu(beta - chosen + rejected) - sft_weight * chosen, chosen, rejected)
