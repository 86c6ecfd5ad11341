"""The logistic family: DPO, cDPO, its length-normalised and reference-free forms, and WPO's weighting of it."""

import torch
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, log_ratios, ranked_by, smoothed_logistic


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

    Lambert et al. 2024 (Tulu 3), arXiv:2411.15124, length-normalized DPO. TRL's `sigmoid_norm` is the same loss; its rewards stay sums,
    ours are what the loss ranks by, as in open-instruct.

    Returns:
        Rewards are β x mean log-ratio per token.
    """
    chosen, rejected = log_ratios(logps)
    chosen, rejected = chosen / logps.chosen_tokens, rejected / logps.rejected_tokens
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

    Zhou et al. 2024, arXiv:2406.11827, with its sampled alignment. The paper's code clamps the
    product of the two weights (not each) to 1 and takes no gradient through it: so do we. TRL does not clamp.

    Returns:
        Rewards are β x summed log-ratio.
    """
    plain = dpo(logps, beta=beta, label_smoothing=label_smoothing)
    return LossOutput(pair_weights(logps) * plain.losses, plain.chosen_rewards, plain.rejected_rewards)


def pair_weights(logps: PairLogps) -> Tensor:
    """WPO's weight of each pair. Shape (pairs,), in (0, 1], no gradient."""
    assert logps.policy_chosen_collision is not None, "the scorer computes it where the catalogue asks for it"
    assert logps.policy_rejected_collision is not None
    chosen = (logps.policy_chosen - logps.policy_chosen_collision) / logps.chosen_tokens
    rejected = (logps.policy_rejected - logps.policy_rejected_collision) / logps.rejected_tokens
    return torch.exp((chosen + rejected).detach().clamp(max=0.0))
