"""Losses that judge each side by itself, not only the margin: the chosen answer's likelihood cannot fall unseen."""

import torch
import torch.nn.functional as F

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.output import LossOutput, LossState, log_ratios, ranked_by


def nca_pair(logps: PairLogps, *, beta: float) -> LossOutput:
    """Noise Contrastive Alignment on pairs.

        L = -log σ(r_c) - ½ log σ(-r_c) - ½ log σ(-r_r),   r = β log π/π_ref

    Chen et al. 2024, arXiv:2402.05369, the pairwise case.

    Returns:
        Rewards are r.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    losses = -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)
    return ranked_by(losses, chosen, rejected)


def bco_pair(logps: PairLogps, *, beta: float, delta: str = "running", state: LossState | None = None) -> LossOutput:
    """Binary Classifier Optimization on pairs: chosen answers are above a shift δ of the rewards, rejected ones below.

        L = -log σ(r_c - δ) - log σ(-(r_r - δ)),   r = β log π/π_ref

    Jung et al. 2024, arXiv:2404.04656. δ is the mean of the rewards seen so far, both sides and the batch at hand
    included, and takes no gradient; TRL 0.x does the same, TRL 1.x and Liger have no δ (`delta="none"`).

    Args:
        logps: sums per side.
        beta: strength of the pull to the reference.
        delta: "running" or "none".
        state: of `bco_state`; without one, that of these pairs alone. Weights of pairs do not enter it.

    Returns:
        Rewards are r, without the shift.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    shift = (state or bco_state(logps, beta=beta, state=None))["mean"] if delta == "running" else 0.0
    return ranked_by(-F.logsigmoid(chosen - shift) - F.logsigmoid(-(rejected - shift)), chosen, rejected)


def bco_state(logps: PairLogps, *, beta: float, delta: str = "running", state: LossState | None) -> LossState:
    """The running mean of the rewards once these pairs are counted in, every pair alike, used or not."""
    del delta
    chosen, rejected = (beta * ratio.detach().double() for ratio in log_ratios(logps))
    seen, mean = (state["pairs"], state["mean"]) if state else (0.0, 0.0)
    total = seen + len(logps)
    batch_mean = float((chosen + rejected).mean() / 2)
    return {"pairs": total, "mean": mean + (batch_mean - mean) * len(logps) / total}


def sppo_hard(logps: PairLogps, *, beta: float) -> LossOutput:
    """Self-Play Preference Optimization with hard win rates of 1 and 0: each log-ratio is driven to its own target.

        L = (log π/π_ref (chosen) - 1/(2β))² + (log π/π_ref (rejected) + 1/(2β))²

    Wu et al. 2024, arXiv:2405.00675, where 1/β is called η; without the factor ½ of the authors' code, as in TRL.

    Returns:
        Rewards are β x summed log-ratio.
    """
    chosen, rejected = log_ratios(logps)
    return ranked_by((chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2, beta * chosen, beta * rejected)


def apo_zero(logps: PairLogps, *, beta: float) -> LossOutput:
    """Anchored Preference Optimization for chosen answers that are better than the policy's: up, and rejected down.

        L = 1 - σ(r_c) + σ(r_r),   r = β log π/π_ref

    D'Oosterlinck et al. 2024, arXiv:2408.06266.

    Returns:
        Rewards are r.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    return ranked_by(torch.sigmoid(-chosen) + torch.sigmoid(rejected), chosen, rejected)


def apo_down(logps: PairLogps, *, beta: float) -> LossOutput:
    """Anchored Preference Optimization for a policy that is better than the chosen answers: both down, rejected further.

        L = σ(r_c) + 1 - σ(r_c - r_r),   r = β log π/π_ref

    D'Oosterlinck et al. 2024, arXiv:2408.06266.

    Returns:
        Rewards are r.
    """
    chosen, rejected = (beta * ratio for ratio in log_ratios(logps))
    return ranked_by(torch.sigmoid(chosen) + torch.sigmoid(rejected - chosen), chosen, rejected)


def cal_dpo(logps: PairLogps, *, beta: float) -> LossOutput:
    """Calibrated DPO: the margin decides, and each side's log-ratio is held near ±1/(2β).

        L = -log σ(h) + ½ [(log π/π_ref (chosen) - 1/(2β))² + (log π/π_ref (rejected) + 1/(2β))²]

    Xiao et al. 2024, arXiv:2412.14516, with the ½ of the authors' code. There the calibration is one mean over the
    batch added to every pair; per pair, as here, the batch's loss and gradient are the same, and weights of pairs
    mean something.

    Returns:
        Rewards are summed log-ratios, without β, which the margin does not hold.
    """
    chosen, rejected = log_ratios(logps)
    calibration = (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    return ranked_by(-F.logsigmoid(chosen - rejected) + 0.5 * calibration, chosen, rejected)
