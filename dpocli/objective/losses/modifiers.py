"""Modifiers, which change several losses in the same way: other log-probs before the loss, or a weight after it."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import bounded_exp, log_ratios


def length_desensitized(logps: PairLogps, *, ld_alpha: float) -> PairLogps:
    """LD-DPO: weigh the tokens beyond the length of the shorter answer by α, for policy and reference alike.

        log π̂(y) = Σ_{t <= l} log π(y_t) + α Σ_{t > l} log π(y_t),   l = min(|chosen|, |rejected|)

    Args:
        logps: summed log-probs with their tails. Shapes (pairs,), nats.
        ld_alpha: α in [0, 1]; 1 changes nothing.

    Other implementations:
        LLaMA-Factory leaves the reference as it is, so that the margin is not 0 where the policy is the reference.

    References:
        Liu et al. 2024, arXiv:2409.06411.
    """
    assert logps.policy_chosen_tail is not None, "the scorer computes the tails where the loss needs them"
    assert logps.policy_rejected_tail is not None
    assert logps.reference_chosen is not None
    assert logps.reference_rejected is not None
    assert logps.reference_chosen_tail is not None
    assert logps.reference_rejected_tail is not None
    less = 1 - ld_alpha
    return replace(
        logps,
        policy_chosen=logps.policy_chosen - less * logps.policy_chosen_tail,
        policy_rejected=logps.policy_rejected - less * logps.policy_rejected_tail,
        reference_chosen=logps.reference_chosen - less * logps.reference_chosen_tail,
        reference_rejected=logps.reference_rejected - less * logps.reference_rejected_tail,
    )


def with_divergence(logps: PairLogps, *, f_divergence: str, f_alpha: float = 0.5) -> PairLogps:
    """f-DPO: replace the reverse KL by another divergence; log u becomes f'(u), u = π/π_ref of the sampled answer.

        forward KL: 1 - 1/u      Jensen-Shannon: log(2u / (1 + u))      alpha: (1 - u^-α) / α

    The divergences are between distributions over answers, evaluated at the ratios of the sampled answers, not over the
    vocabulary at each token. The paper's f' of the forward KL is -1/u: the 1 cancels in margins of sums, and keeps the
    margin at the reference 0 where log-ratios are divided by token counts. u covers whole answers, so 1/u overflows
    where an answer falls far: beyond e^20, exp continues as its tangent.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        f_divergence: "reverse_kl", "forward_kl", "js" or "alpha".
        f_alpha: the paper's α in (0, 1), 1 - α in TRL 1.x; towards 0 the reverse KL, towards 1 the forward KL.

    Returns:
        Log-probs whose log-ratio is f'(u), so that rewards are β f'(u), which the loss ranks by.

    References:
        Wang et al. 2023, arXiv:2309.16240.
    """

    def score(log_ratio: Tensor) -> Tensor:
        match f_divergence:
            case "forward_kl":
                return 1 - bounded_exp(-log_ratio)
            case "js":
                return math.log(2) + F.logsigmoid(log_ratio)
            case "alpha":
                return (1 - bounded_exp(-f_alpha * log_ratio)) / f_alpha
        return log_ratio

    chosen, rejected = log_ratios(logps)
    zero = torch.zeros_like(chosen)
    return replace(
        logps,
        policy_chosen=score(chosen),
        policy_rejected=score(rejected),
        reference_chosen=zero,
        reference_rejected=zero,
    )


def wpo_weights(logps: PairLogps) -> Tensor:
    """WPO: the weight of each pair, its likelihood under the policy. Shape (pairs,), in (0, 1], no gradient.

        min(1, w(chosen) w(rejected)),   w(y) = exp(1/|y| Σ_t [log π(y_t) - log Σ_v π(v)²])

    The product of the two weights is clamped to 1, not each.

    Args:
        logps: summed log-probs, token counts, and sums of log Σ_v π(v)². Shapes (pairs,), nats.

    References:
        Zhou et al. 2024, arXiv:2406.11827, with sampled alignment.
    """
    assert logps.policy_chosen_collision is not None, "the scorer computes it where the loss needs it"
    assert logps.policy_rejected_collision is not None
    chosen = (logps.policy_chosen - logps.policy_chosen_collision) / logps.chosen_tokens
    rejected = (logps.policy_rejected - logps.policy_rejected_collision) / logps.rejected_tokens
    return torch.exp((chosen + rejected).detach().clamp(max=0.0))
