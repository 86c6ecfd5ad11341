"""Metrics of the pairs of a global batch, all at once: micro-batches and processes cannot change a mean."""

from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LossOutput


def batch_loss(losses: Tensor, weights: Tensor) -> Tensor:
    """Σ wᵢ · lossᵢ / Σ wᵢ, or 0 where all weights are 0. Arguments of shape (pairs,)."""
    return (weights * losses).sum() / weights.sum().clamp(min=1e-300)


def pair_metrics(output: LossOutput, logps: PairLogps, weights: Tensor) -> dict[str, float]:
    """Batch metrics under the field's names: `loss` is a weighted mean; `rewards/…` and `logps/…` are means over pairs.

    `logratios/…` are of summed log-ratios whatever the loss ranks by, so that runs with different losses compare.
    `loss/NAME` is the loss of each term of a weighted sum.

    Args:
        output: losses and rewards. Shapes (pairs,).
        logps: log-probs of the same pairs. Shapes (pairs,), nats.
        weights: shape (pairs,), float64. Only the losses are weighted; pairs of weight 0 count in the other metrics.
    """
    columns = _compared("rewards", output.chosen_rewards, output.rejected_rewards)
    columns |= {"logps/chosen": logps.policy_chosen, "logps/rejected": logps.policy_rejected}
    if logps.reference_chosen is not None and logps.reference_rejected is not None:
        columns |= _compared(
            "logratios", logps.policy_chosen - logps.reference_chosen, logps.policy_rejected - logps.reference_rejected
        )
    weighted = {"loss": output.losses} | {f"loss/{name}": losses for name, losses in output.terms.items()}
    return {name: float(batch_loss(losses.detach().double(), weights)) for name, losses in weighted.items()} | {
        name: float(column.detach().double().mean()) for name, column in columns.items()
    }


def _compared(kind: str, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
    return {
        f"{kind}/chosen": chosen,
        f"{kind}/rejected": rejected,
        f"{kind}/margins": chosen - rejected,
        f"{kind}/accuracies": chosen > rejected,
        f"{kind}/ties": chosen == rejected,
    }
