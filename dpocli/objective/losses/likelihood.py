"""The likelihood of the chosen answer, alone and added to DPO."""

from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.logistic import dpo
from dpocli.objective.losses.output import LossOutput, mean_logps, ranked_by


def sft(logps: PairLogps, *, beta: float = 1.0, reduction: str = "mean") -> LossOutput:
    """Negative log-likelihood of the chosen answer, the language-modelling loss; a term for weighted sums.

        L = -log π(chosen) / |chosen|   ("mean"),   or -log π(chosen)   ("sum")

    Use it beside another loss, to keep the chosen answers likely.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: not used; every loss takes it.
        reduction: "mean" per token, or "sum" per answer.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are mean log-probs per token, without β.

    Other implementations:
        Every pair counts alike: the batch loss is a mean over pairs of means per token (`--reduction sum`: of sums), as
        in LLaMA-Factory and NeMo. TRL takes one mean over all tokens of a micro-batch, which depends on how a batch is
        cut.

    References:
        The language-modelling loss.
    """
    del beta
    return ranked_by(_negative_log_likelihood(logps, reduction), *mean_logps(logps))


def rpo(
    logps: PairLogps, *, beta: float, sft_weight: float = 1.0, label_smoothing: float = 0.0, reduction: str = "mean"
) -> LossOutput:
    """Iterative Reasoning Preference Optimization: DPO plus the likelihood of the chosen answer.

        L = dpo - α log π(chosen) / |chosen|   ("mean"),   or dpo - α log π(chosen)   ("sum")

    Use it for reasoning, where the chosen answer must stay likely.

    Args:
        logps: summed log-probs and token counts. Shapes (pairs,), nats.
        beta: KL-penalty strength β > 0.
        sft_weight: α >= 0, the weight of the likelihood term.
        label_smoothing: ε in [0, 0.5), of DPO.
        reduction: of the likelihood term, as in `sft`.

    Returns:
        Losses and rewards, shapes (pairs,). Rewards are β × summed log-ratio.

    Other implementations:
        The likelihood term is that of `sft`; `--reduction sum` is NeMo's without averaging.

    References:
        Pang et al. 2024, arXiv:2404.19733, eq. 1.
    """
    preference = dpo(logps, beta=beta, label_smoothing=label_smoothing)
    losses = preference.losses + sft_weight * _negative_log_likelihood(logps, reduction)
    return LossOutput(losses, preference.chosen_rewards, preference.rejected_rewards)


def _negative_log_likelihood(logps: PairLogps, reduction: str) -> Tensor:
    return -logps.policy_chosen if reduction == "sum" else -logps.policy_chosen / logps.chosen_tokens
