"""The likelihood of the chosen answer: alone, for weighted sums, and beside DPO."""

from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.logistic import dpo
from dpocli.objective.losses.output import LossOutput, mean_logps, ranked_by


def sft(logps: PairLogps, *, beta: float = 1.0, reduction: str = "mean") -> LossOutput:
    """Negative log-likelihood of the chosen answer.

        L = -log π(chosen) / |chosen|   ("mean"),   or -log π(chosen)   ("sum")

    Every pair counts alike: the batch's loss is a mean over pairs, as in LLaMA-Factory and NeMo. TRL takes one mean
    over all tokens of a micro-batch, which gives long answers more say and depends on how a batch is cut.

    Args:
        logps: sums per side, and token counts.
        beta: not used; every loss takes it, so that all can be called alike.
        reduction: per token, or per answer.

    Returns:
        Rewards are mean log-probs per token, without β: it ranks nothing, but what it raises is this.
    """
    del beta
    return ranked_by(_negative_log_likelihood(logps, reduction), *mean_logps(logps))


def rpo(
    logps: PairLogps, *, beta: float, sft_weight: float = 1.0, label_smoothing: float = 0.0, reduction: str = "mean"
) -> LossOutput:
    """DPO plus the likelihood of the chosen answer (Iterative Reasoning Preference Optimization).

        L = dpo - α log π(chosen) / |chosen|

    Pang et al. 2024, arXiv:2404.19733, eq. 1.

    Args:
        logps: sums per side, and token counts.
        beta: strength of the pull to the reference.
        sft_weight: α >= 0.
        label_smoothing: ε in [0, 0.5), of DPO.
        reduction: of the likelihood term, as for `sft`.

    Returns:
        Rewards are β x summed log-ratio.
    """
    preference = dpo(logps, beta=beta, label_smoothing=label_smoothing)
    losses = preference.losses + sft_weight * _negative_log_likelihood(logps, reduction)
    return LossOutput(losses, preference.chosen_rewards, preference.rejected_rewards)


def _negative_log_likelihood(logps: PairLogps, reduction: str) -> Tensor:
    return -logps.policy_chosen if reduction == "sum" else -logps.policy_chosen / logps.chosen_tokens
