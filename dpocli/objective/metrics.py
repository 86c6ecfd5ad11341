"""Metrics of pairs: sums first and one division last, so that ranks and micro-batches cannot change a mean."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LossOutput

_MEANS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margins",
    "rewards/accuracies",
    "rewards/ties",
    "logps/chosen",
    "logps/rejected",
)


@dataclass(frozen=True, slots=True)
class MetricSums:
    """Sums over some pairs. Adding two gives the sums over both; `values` is what ranks reduce."""

    values: Tensor
    """Shape (3 + metrics,), float64: Σ weight · loss, Σ weight, number of pairs, then the sum of each metric."""

    @classmethod
    def zero(cls, device: torch.device) -> "MetricSums":
        return cls(torch.zeros(3 + len(_MEANS), dtype=torch.float64, device=device))

    @classmethod
    def of(cls, output: LossOutput, logps: PairLogps, weights: Tensor) -> "MetricSums":
        """Sums over the pairs of one loss output.

        Args:
            output: per pair.
            logps: of the same pairs.
            weights: shape (pairs,), float64; pairs of weight 0 count in the metrics, which are unweighted.
        """
        chosen, rejected = output.chosen_rewards, output.rejected_rewards
        columns = (
            chosen,
            rejected,
            chosen - rejected,
            (chosen > rejected).double(),
            (chosen == rejected).double(),
            logps.policy_chosen,
            logps.policy_rejected,
        )
        losses = output.losses.detach()
        head = torch.stack([(weights * losses).sum(), weights.sum(), torch.ones_like(losses).sum()])
        return cls(torch.cat([head, torch.stack([column.detach().sum() for column in columns])]))

    def __add__(self, other: "MetricSums") -> "MetricSums":
        return MetricSums(self.values + other.values)

    def means(self) -> dict[str, float]:
        """The field's metric names: `loss` (weighted mean), `rewards/…`, `logps/…` (means over pairs, nats)."""
        weighted_loss, weight, pairs, *sums = self.values.tolist()
        if not pairs:
            return {}
        means = {name: total / pairs for name, total in zip(_MEANS, sums, strict=True)}
        return {"loss": weighted_loss / weight if weight else 0.0} | means
