"""DPO and losses that change its margin or its labels, each a log-sigmoid of the margin."""

import math

import torch
import torch.nn.functional as F

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.modifiers import wpo_weights
from dpocli.objective.losses.output import (
    LossOutput,
    bounded_exp,
    log_ratios,
    mean_log_ratios,
    ranked_by,
    smoothed_logistic,
)


def dpo(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """Direct Preference Optimization; with label smoothing, conservative DPO (cDPO).

        L = -(1 - ε) log σ(β h) - ε log σ(-β h),   h = log π/π_ref (chosen) - log π/π_ref (rejected)

    Use it as the starting point.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    Other implementations:
        Recent TRL and Liger ignore label smoothing under their plain sigmoid loss.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7. Smoothing: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    chosen, rejected = log_ratios(logps)
    return ranked_by(smoothed_logistic(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected)


def dpo_norm(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO on the mean log-ratio per token, so that long answers do not weigh more (length-normalized DPO).

        L = dpo with h = log π/π_ref (chosen) / |chosen| - log π/π_ref (rejected) / |rejected|

    Use it where answers differ much in length, and DPO makes them longer.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × mean log-ratio per token, which the loss ranks by.

    Other implementations:
        open-instruct reports the same rewards; TRL's `sigmoid_norm` reports sums.

    References:
        Lambert et al. 2024 (Tulu 3), arXiv:2411.15124.
    """
    chosen, rejected = mean_log_ratios(logps)
    return ranked_by(smoothed_logistic(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected)


def dpo_reference_free(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO with a uniform reference, whose log-probs cancel: it needs no cache.

        L = dpo with h = log π(chosen) - log π(rejected)

    Use it where there is no reference, and answers have about the same length.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: scale of the margin, > 0.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-prob, which the loss ranks by.

    Other implementations:
        Some subtract the reference in the rewards that they report.

    References:
        Rafailov et al. 2023, arXiv:2305.18290, eq. 7 with a uniform reference, an option of the authors' code.
    """
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    return ranked_by(smoothed_logistic(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected)


def wpo(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO with each pair weighted by its likelihood under the policy (`dpo --weighting wpo`).

        L = min(1, w(chosen) w(rejected)) × dpo,   w(y) = exp(1/|y| Σ_t [log π(y_t) - log Σ_v π(v)²])

    The weight takes no gradient. `modifiers.wpo_weights` computes it, and the modifier `weighting=wpo` applies it to
    other losses.

    Use it where the answers come from other models than the policy.

    Args:
        logps: summed log-probs, token counts, and sums of log Σ_v π(v)². Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    Other implementations:
        The authors' code clamps the product of the two weights to 1, as here; TRL 1.x does not clamp, TRL 0.24 is off
        by one token, open-instruct uses sums in place of means.

    References:
        Zhou et al. 2024, arXiv:2406.11827, with sampled alignment.
    """
    plain = dpo(logps, beta=beta, label_smoothing=label_smoothing)
    return LossOutput(wpo_weights(logps) * plain.losses, plain.chosen_rewards, plain.rejected_rewards)


def robust(logps: PairLogps, *, beta: float, label_smoothing: float = 0.1) -> LossOutput:
    """Robust DPO (rDPO): an unbiased estimate of the loss on clean labels, where a share ε of the labels is flipped.

        L = [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2ε),   h = log π/π_ref (chosen) - log π/π_ref (rejected)

    It has no lower bound: the loss of a pair falls without end as its margin grows.

    Use it where the share of wrong labels is about known.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        label_smoothing: ε in [0, 0.5); at 0.5 the formula divides by 0.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    References:
        Chowdhury et al. 2024, arXiv:2403.00409.
    """
    chosen, rejected = log_ratios(logps)
    margin = beta * (chosen - rejected)
    noisy = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return ranked_by(noisy / (1 - 2 * label_smoothing), beta * chosen, beta * rejected)


def exo_pair(logps: PairLogps, *, beta: float, label_smoothing: float = 1e-3) -> LossOutput:
    """Efficient Exact Optimization on pairs: the KL divergence from the model's preference to the smoothed label.

        L = σ(β h) [log σ(β h) - log(1 - ε)] + σ(-β h) [log σ(-β h) - log ε],
        h = log π/π_ref (chosen) - log π/π_ref (rejected)

    DPO minimizes the same divergence in the other direction.

    Use it where DPO covers too many modes, for sharper policies.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        label_smoothing: ε in (0, 0.5); at 0 the divergence is infinite.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    References:
        Ji et al. 2024, arXiv:2402.00856, eq. 16.
    """
    chosen, rejected = log_ratios(logps)
    margin = beta * (chosen - rejected)
    prefers_chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    prefers_rejected = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return ranked_by(prefers_chosen + prefers_rejected, beta * chosen, beta * rejected)


def discopop(logps: PairLogps, *, beta: float, discopop_tau: float = 0.05) -> LossOutput:
    """DiscoPOP: a blend of logistic and exponential loss found by a language model (log-ratio modulated loss, LRML).

        L = (1 - m) (-log σ(x)) + m exp(-x),   x = β h,   m = σ(x / τ)

    It is not convex, and not monotone around 0.

    Use it to try the loss found by the paper's search.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        discopop_tau: τ > 0, the temperature of the blend.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    References:
        Lu et al. 2024, arXiv:2406.08414, LRML.
    """
    chosen, rejected = log_ratios(logps)
    margin = beta * (chosen - rejected)
    logistic = -F.logsigmoid(margin) * torch.sigmoid(-margin / discopop_tau)
    # m exp(-x) in one exponent: apart, 0 times infinity.
    exponential = bounded_exp(F.logsigmoid(margin / discopop_tau) - margin)
    return ranked_by(logistic + exponential, beta * chosen, beta * rejected)


def dpop(logps: PairLogps, *, beta: float, dpop_lambda: float = 50.0) -> LossOutput:
    """DPO-Positive: a penalty inside the sigmoid where the chosen answer is less likely than under the reference.

        L = -log σ(β [h - λ max(0, log π_ref/π (chosen))]),   h = log π/π_ref (chosen) - log π/π_ref (rejected)

    Use it where the answers of a pair differ in few tokens, and DPO lowers the likelihood of both.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        dpop_lambda: λ >= 0, the weight of the penalty.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio, without the penalty.

    References:
        Pal et al. 2024 (Smaug), arXiv:2402.13228, eq. 3.
    """
    chosen, rejected = log_ratios(logps)
    penalty = dpop_lambda * torch.relu(-chosen)
    return ranked_by(-F.logsigmoid(beta * (chosen - rejected - penalty)), beta * chosen, beta * rejected)


def r_dpo(logps: PairLogps, *, beta: float, r_dpo_alpha: float = 0.01) -> LossOutput:
    """Length-regularized DPO: the part of the preference that length explains is subtracted.

        L = -log σ(β h + α (|chosen| - |rejected|)),   h = log π/π_ref (chosen) - log π/π_ref (rejected)

    Use it where chosen answers are longer, and the policy must not learn length.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        r_dpo_alpha: α >= 0, the length penalty per token.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio, without the length term, which models the
        raters.

    References:
        Park et al. 2024, arXiv:2403.19159.
    """
    chosen, rejected = log_ratios(logps)
    # A whole number times a Python float would be float32.
    length = r_dpo_alpha * (logps.chosen_tokens - logps.rejected_tokens).to(chosen.dtype)
    return ranked_by(-F.logsigmoid(beta * (chosen - rejected) + length), beta * chosen, beta * rejected)
