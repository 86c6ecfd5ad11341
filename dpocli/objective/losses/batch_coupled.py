"""Losses of a whole batch: the loss of a pair depends on the other pairs.

They must see all pairs of the global batch at once. `objective.batch_gradient` and the trainer do that, so that
micro-batches and processes change nothing. The short last batch of an epoch is a batch like any other.
"""

import torch
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, LossState, log_ratios, ranked_by, smoothed_logistic


def aot(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """Alignment via Optimal Transport, paired: the policy's margins dominate the reference's, as distributions.

        L_k = -(1 - ε) log σ(β d_k) - ε log σ(-β d_k),
        d_k = k-th smallest policy margin - k-th smallest reference margin

    L_k is the loss of the pair with the k-th smallest policy margin. Pair weights are not defined.

    Use it where preferences hold on average rather than pair by pair.

    Args:
        logps: summed log-probs of the whole batch. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio of the pair.

    Other implementations:
        TRL returns the losses in sorted order, not by pair.

    References:
        Melnyk et al. 2024, arXiv:2406.05882, paired, first-order stochastic dominance by sorting.
    """
    chosen, rejected = log_ratios(logps)
    assert logps.reference_chosen is not None
    assert logps.reference_rejected is not None
    policy, order = torch.sort(logps.policy_chosen - logps.policy_rejected, stable=True)
    reference, _ = torch.sort(logps.reference_chosen - logps.reference_rejected, stable=True)
    losses = smoothed_logistic(beta * (policy - reference), label_smoothing)
    return ranked_by(_unsorted(losses, order), beta * chosen, beta * rejected)


def aot_unpaired(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """Alignment via Optimal Transport, unpaired: chosen log-ratios dominate rejected ones, as distributions.

        L_k = -(1 - ε) log σ(β d_k) - ε log σ(-β d_k),
        d_k = k-th smallest chosen log-ratio - k-th smallest rejected log-ratio

    L_k is the loss of the pair with the k-th smallest chosen log-ratio. Pair weights are not defined.

    Use it where chosen and rejected answers belong to different prompts.

    Args:
        logps: summed log-probs of the whole batch. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        label_smoothing: ε in [0, 0.5), the assumed share of flipped labels.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio of the pair.

    Other implementations:
        TRL 0.x calls it `aot_pair`.

    References:
        Melnyk et al. 2024, arXiv:2406.05882, unpaired.
    """
    chosen, rejected = log_ratios(logps)
    sorted_chosen, order = torch.sort(chosen, stable=True)
    sorted_rejected, _ = torch.sort(rejected, stable=True)
    losses = smoothed_logistic(beta * (sorted_chosen - sorted_rejected), label_smoothing)
    return ranked_by(_unsorted(losses, order), beta * chosen, beta * rejected)


def _unsorted(values: Tensor, order: Tensor) -> Tensor:
    """Undo a sort: `order` maps each sorted value to its pair. Shapes (pairs,)."""
    return torch.empty_like(values).scatter(0, order, values)


SMALLEST_BETA = 1e-3
"""Lower bound of β_batch, which is negative where the margins are far below usual; the authors' code has the same bound.

A base β below it is its own bound."""


def beta_dpo(
    logps: PairLogps,
    *,
    beta: float,
    beta_dpo_alpha: float = 0.6,
    beta_dpo_momentum: float = 0.9,
    state: LossState | None = None,
) -> LossOutput:
    """β-DPO: DPO with a beta per batch; a larger mean margin than usual raises it.

        L = -log σ(β_batch h),   β_batch = β (1 + α [mean h of the batch - M₀]),
        h = log π/π_ref (chosen) - log π/π_ref (rejected)

    M₀ is a running mean of the batches' margins. β_batch takes no gradient.

    Use it where the quality of the pairs varies, and one beta does not fit all batches.

    Args:
        logps: summed log-probs of the whole batch. Shapes (pairs,), nats.
        beta: the base β > 0.
        beta_dpo_alpha: α >= 0, how strongly beta follows the batch.
        beta_dpo_momentum: decay of M₀; used by `beta_dpo_state`.
        state: from `beta_dpo_state`; None takes M₀ from these pairs, so that β_batch is β. Pair weights do not enter
            it.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio, with the base β, so that batches compare.

    Other implementations:
        The margins in β_batch are not scaled by β, as in the authors' code. Their filter, which drops a random fifth of
        each batch, is not part of the loss.

    References:
        Wu et al. 2024, arXiv:2407.08639.
    """
    del beta_dpo_momentum
    chosen, rejected = log_ratios(logps)
    mean = float((chosen - rejected).detach().double().mean())
    usual = state["mean"] if state else mean
    batch_beta = max(min(SMALLEST_BETA, beta), beta * (1 + beta_dpo_alpha * (mean - usual)))
    losses = smoothed_logistic(batch_beta * (chosen - rejected), 0.0)
    return ranked_by(losses, beta * chosen, beta * rejected)


def beta_dpo_state(
    logps: PairLogps, *, beta: float, beta_dpo_alpha: float, beta_dpo_momentum: float, state: LossState | None
) -> LossState:
    """The running mean margin after this batch: M₀ ← m M₀ + (1 - m) mean h.

    It starts at 0, the margin of a policy equal to the reference. Every batch counts the same, a short last one too.
    """
    del beta, beta_dpo_alpha
    chosen, rejected = log_ratios(logps)
    before = state["mean"] if state else 0.0
    mean = float((chosen - rejected).detach().double().mean())
    return {"mean": beta_dpo_momentum * before + (1 - beta_dpo_momentum) * mean}
