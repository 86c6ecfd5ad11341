"""Losses of a whole batch: what a pair's loss is depends on the other pairs.

They must see all pairs of the global batch at once. `objective.batch_gradient` and the trainer see to that, so that
micro-batches and processes change nothing. The short last batch of an epoch is a batch like any other.
"""

import torch
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, LossState, log_ratios, ranked_by, smoothed_logistic


def aot(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """Alignment via Optimal Transport, paired: the policy's margins shall dominate the reference's as a distribution.

        L_k = -(1 - ε) log σ(β d_k) - ε log σ(-β d_k),   d_k = k-th smallest policy margin - k-th smallest reference margin

    Melnyk et al. 2024, arXiv:2406.05882, first-order stochastic dominance by sorting. L_k is given to the pair that
    has the k-th smallest policy margin. Weights of pairs have no meaning in it.

    Returns:
        Rewards are β x summed log-ratio of the pair itself.
    """
    chosen, rejected = log_ratios(logps)
    assert logps.reference_chosen is not None
    assert logps.reference_rejected is not None
    policy, order = torch.sort(logps.policy_chosen - logps.policy_rejected, stable=True)
    reference, _ = torch.sort(logps.reference_chosen - logps.reference_rejected, stable=True)
    losses = smoothed_logistic(beta * (policy - reference), label_smoothing)
    return ranked_by(_unsorted(losses, order), beta * chosen, beta * rejected)


def aot_unpaired(logps: PairLogps, *, beta: float, label_smoothing: float = 0.0) -> LossOutput:
    """Alignment via Optimal Transport, unpaired: chosen log-ratios shall dominate rejected ones as distributions.

        L_k = -(1 - ε) log σ(β d_k) - ε log σ(-β d_k),   d_k = k-th smallest chosen - k-th smallest rejected log-ratio

    Melnyk et al. 2024, arXiv:2406.05882. TRL 0.x calls it aot_pair. L_k is given to the pair that has the k-th smallest
    chosen log-ratio. Weights of pairs have no meaning in it.

    Returns:
        Rewards are β x summed log-ratio of the pair itself.
    """
    chosen, rejected = log_ratios(logps)
    sorted_chosen, order = torch.sort(chosen, stable=True)
    sorted_rejected, _ = torch.sort(rejected, stable=True)
    losses = smoothed_logistic(beta * (sorted_chosen - sorted_rejected), label_smoothing)
    return ranked_by(_unsorted(losses, order), beta * chosen, beta * rejected)


def _unsorted(values: Tensor, order: Tensor) -> Tensor:
    """`values` back in the order of the pairs, where `order` says which pair each belongs to."""
    return torch.empty_like(values).scatter(0, order, values)


SMALLEST_BETA = 1e-3
"""Where the batch's margins are far below usual, the formula's beta would be negative: the authors' code stops here
(and so does a smaller benchmark beta at itself)."""


def beta_dpo(
    logps: PairLogps,
    *,
    beta: float,
    beta_dpo_alpha: float = 0.6,
    beta_dpo_momentum: float = 0.9,
    state: LossState | None = None,
) -> LossOutput:
    """β-DPO: batches with larger margins than usual are held closer to the reference.

        L = -log σ(β_batch h),   β_batch = β (1 + α [mean h of the batch - M₀]),   h = summed log-ratio margin

    Wu et al. 2024, arXiv:2407.08639. M₀ is a running mean of the batches' margins; h is not scaled by β in it, as in the
    authors' code; β_batch takes no gradient. Their filter, which leaves out a fifth of each batch by chance, says
    which pairs to learn from and is not part of this loss.

    Args:
        logps: sums per side, of the whole batch.
        beta: the benchmark β.
        beta_dpo_alpha: α >= 0.
        beta_dpo_momentum: of the running mean; see `beta_dpo_state`.
        state: of `beta_dpo_state`; without one, these pairs are what is usual, and β_batch is β. Weights of pairs do
            not enter it.

    Returns:
        Rewards are β x summed log-ratio, with the benchmark β, so that batches can be compared.
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
    """The running mean margin, once this batch is counted in: M₀ ← m M₀ + (1 - m) mean h.

    It begins at 0, the margin of a policy that is the reference. A batch counts as one, the short last one of an epoch
    too.
    """
    del beta, beta_dpo_alpha
    chosen, rejected = log_ratios(logps)
    before = state["mean"] if state else 0.0
    mean = float((chosen - rejected).detach().double().mean())
    return {"mean": beta_dpo_momentum * before + (1 - beta_dpo_momentum) * mean}
