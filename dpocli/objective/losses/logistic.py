"""The logistic family: DPO and what bends its margin or its labels."""

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

    Rafailov et al. 2023, arXiv:2305.18290, eq. 7; the smoothing: Mitchell 2023. Recent TRL and Liger ignore the
    smoothing under their plain sigmoid loss; here it applies whenever it is given.

    Args:
        logps: sums per side, shapes (pairs,), nats.
        beta: strength of the pull to the reference.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Rewards are β x summed log-ratio.
    """
    chosen, rejected = log_ratios(logps)
    return ranked_by(smoothed_logistic(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected)


def dpo_norm(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO on the mean log-ratio per token, so that long answers do not count for more.

        L = dpo with h = log π/π_ref (chosen) / |chosen| - log π/π_ref (rejected) / |rejected|

    Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, length-normalized DPO. TRL's `sigmoid_norm` is the same loss; its
    rewards stay sums, ours are what the loss ranks by, as in open-instruct.

    Returns:
        Rewards are β x mean log-ratio per token.
    """
    chosen, rejected = mean_log_ratios(logps)
    return ranked_by(smoothed_logistic(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected)


def dpo_reference_free(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO against a uniform reference, whose log-ratios cancel: it needs no cache.

        L = dpo with h = log π(chosen) - log π(rejected)

    The option of the original implementation (Rafailov et al. 2023). Some implementations still subtract the reference
    in the rewards that they report; ours are what the loss ranks by.

    Returns:
        Rewards are β x summed log-prob.
    """
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    return ranked_by(smoothed_logistic(beta * (chosen - rejected), label_smoothing), beta * chosen, beta * rejected)


def wpo(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """DPO with each pair weighted by how likely the current policy is to have written it.

        L = min(1, w(chosen) w(rejected)) x dpo,   w(y) = exp(1/|y| Σ_t [log π(y_t) - log Σ_v π(v)²])

    Zhou et al. 2024, arXiv:2406.11827, with its sampled alignment; see `modifiers.wpo_weights`, which the modifier
    `weighting=wpo` brings to other losses.

    Returns:
        Rewards are β x summed log-ratio.
    """
    plain = dpo(logps, beta=beta, label_smoothing=label_smoothing)
    return LossOutput(wpo_weights(logps) * plain.losses, plain.chosen_rewards, plain.rejected_rewards)


def robust(logps: PairLogps, *, beta: float, label_smoothing: float = 0.1) -> LossOutput:
    """Robust DPO (rDPO): where a share ε of the labels is flipped, the loss of the clean labels in expectation.

        L = [-(1 - ε) log σ(β h) + ε log σ(-β h)] / (1 - 2ε)

    Chowdhury et al. 2024, arXiv:2403.00409. Not bounded below: a pair may earn without end by growing its margin.

    Args:
        logps: sums per side.
        beta: strength of the pull to the reference.
        label_smoothing: ε in [0, 0.5); at 0.5 labels say nothing and the formula divides by 0.

    Returns:
        Rewards are β x summed log-ratio.
    """
    chosen, rejected = log_ratios(logps)
    margin = beta * (chosen - rejected)
    noisy = -(1 - label_smoothing) * F.logsigmoid(margin) + label_smoothing * F.logsigmoid(-margin)
    return ranked_by(noisy / (1 - 2 * label_smoothing), beta * chosen, beta * rejected)


def exo_pair(logps: PairLogps, *, beta: float, label_smoothing: float = 1e-3) -> LossOutput:
    """Efficient Exact Optimization on pairs: the KL divergence from the model's preference to the smoothed label.

        L = σ(βh) [log σ(βh) - log(1 - ε)] + σ(-βh) [log σ(-βh) - log ε]

    Ji et al. 2024, arXiv:2402.00856, eq. 16. DPO takes the same divergence in the other direction.

    Args:
        logps: sums per side.
        beta: strength of the pull to the reference.
        label_smoothing: ε in (0, 0.5); at 0 the divergence is infinite.

    Returns:
        Rewards are β x summed log-ratio.
    """
    chosen, rejected = log_ratios(logps)
    margin = beta * (chosen - rejected)
    prefers_chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - math.log1p(-label_smoothing))
    prefers_rejected = torch.sigmoid(-margin) * (F.logsigmoid(-margin) - math.log(label_smoothing))
    return ranked_by(prefers_chosen + prefers_rejected, beta * chosen, beta * rejected)


def discopop(logps: PairLogps, *, beta: float, discopop_tau: float = 0.05) -> LossOutput:
    """DiscoPOP: the log-ratio modulated loss (LRML), a blend of logistic and exponential loss.

        L = (1 - m) (-log σ(x)) + m exp(-x),   x = β h,   m = σ(x / τ)

    Lu et al. 2024, arXiv:2406.08414. Not convex, and not monotone around 0.

    Args:
        logps: sums per side.
        beta: strength of the pull to the reference.
        discopop_tau: τ > 0, the temperature of the blend.

    Returns:
        Rewards are β x summed log-ratio.
    """
    chosen, rejected = log_ratios(logps)
    margin = beta * (chosen - rejected)
    logistic = -F.logsigmoid(margin) * torch.sigmoid(-margin / discopop_tau)
    # m exp(-x) in one exponent: apart, 0 times infinity.
    exponential = bounded_exp(F.logsigmoid(margin / discopop_tau) - margin)
    return ranked_by(logistic + exponential, beta * chosen, beta * rejected)


def dpop(logps: PairLogps, *, beta: float, dpop_lambda: float = 50.0) -> LossOutput:
    """DPO-Positive: a penalty where the chosen answer is less likely than under the reference.

        L = -log σ(β [h - λ max(0, log π_ref/π (chosen))])

    Pal et al. 2024 (Smaug), arXiv:2402.13228, eq. 3.

    Args:
        logps: sums per side.
        beta: strength of the pull to the reference.
        dpop_lambda: λ >= 0.

    Returns:
        Rewards are β x summed log-ratio, without the penalty.
    """
    chosen, rejected = log_ratios(logps)
    penalty = dpop_lambda * torch.relu(-chosen)
    return ranked_by(-F.logsigmoid(beta * (chosen - rejected - penalty)), beta * chosen, beta * rejected)


def r_dpo(logps: PairLogps, *, beta: float, r_dpo_alpha: float = 0.01) -> LossOutput:
    """Length-regularised DPO: the raters are taken to have rewarded length, and that share is explained away.

        L = -log σ(β h + α (|chosen| - |rejected|))

    Park et al. 2024, arXiv:2403.19159.

    Args:
        logps: sums per side, and token counts.
        beta: strength of the pull to the reference.
        r_dpo_alpha: α >= 0, reward per token.

    Returns:
        Rewards are β x summed log-ratio, without the length term, which belongs to the raters.
    """
    chosen, rejected = log_ratios(logps)
    # A whole number times a Python float would be float32.
    length = r_dpo_alpha * (logps.chosen_tokens - logps.rejected_tokens).to(chosen.dtype)
    return ranked_by(-F.logsigmoid(beta * (chosen - rejected) + length), beta * chosen, beta * rejected)
