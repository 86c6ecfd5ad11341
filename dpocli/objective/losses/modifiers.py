"""What changes several losses in the same way: before the loss, another log-prob; after it, a weight."""

import math
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import bounded_exp, log_ratios


def length_desensitized(logps: PairLogps, *, ld_alpha: float) -> PairLogps:
    """LD-DPO: tokens beyond the length of the shorter side count α as much, for policy and reference alike.

        log π̂(y) = Σ_{t <= l} log π(y_t) + α Σ_{t > l} log π(y_t),   l = min(|chosen|, |rejected|)

    Liu et al. 2024, arXiv:2409.06411. LLaMA-Factory leaves the reference as it is, which makes a margin out of
    nothing where the policy is the reference.

    Args:
        logps: with the sums of the tails.
        ld_alpha: α in [0, 1]; 1 changes nothing.
    """
    assert logps.policy_chosen_tail is not None, "the engine gives the tails where the loss asks for them"
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
    """f-DPO: another divergence in place of the reverse KL; log u becomes f'(u), u = π/π_ref of the sampled answer.

        forward KL: 1 - 1/u      Jensen-Shannon: log(2u / (1 + u))      alpha: (1 - u^-α) / α

    Wang et al. 2023, arXiv:2309.16240. Its divergences are between distributions over answers; like the loss, this
    sees them on the ratios of the sampled answers only, not on the vocabulary at each token. α is the paper's (1 - α
    in TRL 1.x): towards 0 the reverse KL, 1 the forward KL. u is of whole answers, so 1/u soon overflows where an
    answer falls: exp goes on as its tangent from e^20. The paper's f' of the forward KL is -1/u: the 1 cancels in margins
    of sums, and where log-ratios are divided by their tokens it keeps the reference's own margin at 0.

    Returns:
        The log-probs whose log-ratio is f'(u), so that rewards are β f'(u), what the loss ranks by.
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
    """WPO: how likely the current policy is to have written the pair. Shape (pairs,), in (0, 1], no gradient.

        min(1, w(chosen) w(rejected)),   w(y) = exp(1/|y| Σ_t [log π(y_t) - log Σ_v π(v)²])

    Zhou et al. 2024, arXiv:2406.11827, with its sampled alignment. The paper's code clamps the product of the two
    weights (not each) to 1 and takes no gradient through it: so do we. TRL 1.x does not clamp.
    """
    assert logps.policy_chosen_collision is not None, "the scorer computes it where the loss asks for it"
    assert logps.policy_rejected_collision is not None
    chosen = (logps.policy_chosen - logps.policy_chosen_collision) / logps.chosen_tokens
    rejected = (logps.policy_rejected - logps.policy_rejected_collision) / logps.rejected_tokens
    return torch.exp((chosen + rejected).detach().clamp(max=0.0))
