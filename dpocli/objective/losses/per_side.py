"""Losses with a term for each answer, which penalise a drop of the chosen log-likelihood; DPO sees only the margin."""

import torch
import torch.nn.functional as F

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, LossState, log_ratios, ranked_by


def nca_pair(logps: PairLogps, *, beta: float) -> LossOutput:
    """Noise Contrastive Alignment on pairs.

        L = -log σ(r_c) - ½ log σ(-r_c) - ½ log σ(-r_r),   r = β log π/π_ref of the chosen and the rejected answer

    Use it where DPO lowers the likelihood of chosen answers.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are r, β × summed log-ratio.

    References:
        Chen et al. 2024, arXiv:2402.05369, the pairwise case.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return ranked_by(losses, chosen, rejected)


def bco_pair(logps: PairLogps, *, beta: float, delta: str = "running", state: LossState | None = None) -> LossOutput:
    """Binary Classifier Optimization on pairs: chosen rewards above a shift δ, rejected rewards below it.

        L = -log σ(r_c - δ) - log σ(-(r_r - δ)),   r = β log π/π_ref of the chosen and the rejected answer

    δ is the mean of all rewards seen so far, both sides and the current batch included. It takes no gradient.

    Use it where labels are thumbs up and down rather than comparisons.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        delta: "running", or "none" for δ = 0.
        state: from `bco_state`; None computes δ from these pairs. Pair weights do not enter it.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are r, β × summed log-ratio without the shift.

    Other implementations:
        TRL 0.x and the paper have the same δ; TRL 1.x and Liger have none, as `--delta none`.

    References:
        Jung et al. 2024, arXiv:2404.04656.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    shift = (state or bco_state(logps, beta=beta, state=None))["mean"] if delta == "running" else 0.0
    return ranked_by(-F.logsigmoid(chosen - shift) - F.logsigmoid(-(rejected - shift)), chosen, rejected)


def bco_state(logps: PairLogps, *, beta: float, delta: str = "running", state: LossState | None) -> LossState:
    """The running mean of the rewards of all pairs, weighted or not, after these pairs."""
    del delta
    chosen, rejected = (beta * ratio.detach().double() for ratio in log_ratios(logps))
    seen, mean = (state["pairs"], state["mean"]) if state else (0.0, 0.0)
    total = seen + len(logps)
    batch_mean = float((chosen + rejected).mean() / 2)
    return {"pairs": total, "mean": mean + (batch_mean - mean) * len(logps) / total}


def sppo_hard(logps: PairLogps, *, beta: float) -> LossOutput:
    """Self-Play Preference Optimization with hard win rates of 1 and 0: each log-ratio has its own target.

        L = (log π/π_ref (chosen) - 1/(2β))² + (log π/π_ref (rejected) + 1/(2β))²

    Use it for iterated self-play, where the likelihood of chosen answers must rise.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0, 1/η in the paper.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    Other implementations:
        The authors' code has a factor ½; TRL and Liger have none, as here.

    References:
        Wu et al. 2024, arXiv:2405.00675.
    """
    chosen, rejected = log_ratios(logps)
    return ranked_by((chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, beta * chosen, beta * rejected)


def apo_zero(logps: PairLogps, *, beta: float) -> LossOutput:
    """Anchored Preference Optimization, zero: raises chosen answers and lowers rejected ones.

        L = 1 - σ(r_c) + σ(r_r),   r = β log π/π_ref of the chosen and the rejected answer

    Use it where the chosen answers are better than the policy's.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are r, β × summed log-ratio.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    return ranked_by(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected)


def apo_down(logps: PairLogps, *, beta: float) -> LossOutput:
    """Anchored Preference Optimization, down: lowers both answers, the rejected one further.

        L = σ(r_c) + 1 - σ(r_c - r_r),   r = β log π/π_ref of the chosen and the rejected answer

    Use it where the policy is better than the chosen answers.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are r, β × summed log-ratio.

    References:
        D'Oosterlinck et al. 2024, arXiv:2408.06266.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    return ranked_by(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), chosen, rejected)


def cal_dpo(logps: PairLogps, *, beta: float) -> LossOutput:
    """Calibrated DPO: DPO plus a penalty that keeps the log-ratios near ±1/(2β).

        L = -log σ(h) + ½ [(log π/π_ref (chosen) - 1/(2β))² + (log π/π_ref (rejected) + 1/(2β))²],
        h = log π/π_ref (chosen) - log π/π_ref (rejected)

    Use it where rewards must keep a scale, and chosen answers their likelihood.

    Args:
        logps: summed log-probs. Shapes (pairs,), nats.
        beta: β > 0, sets the targets ±1/(2β).

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are the summed log-ratios, since the margin has no β.

    Other implementations:
        The authors' code, with the same factor ½, adds one mean over the batch to every pair; per pair, as here, the
        loss and gradient of the batch are the same, and pair weights are defined.

    References:
        Xiao et al. 2024, arXiv:2412.14516.
    """
    chosen, rejected = log_ratios(logps)
    calibration = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return ranked_by(-F.logsigmoid(chosen - rejected) + 0.5 * calibration, chosen, rejected)
