"""The DPO family: `LOSSES` maps a name to a pure function (logps, *, beta, …) -> LossOutput.

What each loss needs, its hyperparameters and its paper stand in `config.catalogue`.
"""

from collections.abc import Callable, Mapping

from dpocli.config.models import LossChoice
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses.dpo import dpo, dpo_norm, dpo_reference_free, wpo
from dpocli.objective.losses.margin import hinge, ipo, simpo
from dpocli.objective.losses.output import LossOutput

Loss = Callable[..., LossOutput]
"""(logps: PairLogps, *, beta: float, <its own keyword-only hyperparameters>) -> LossOutput."""

LOSSES: Mapping[str, Loss] = {
    "dpo": dpo,
    "dpo_norm": dpo_norm,
    "dpo_reference_free": dpo_reference_free,
    "hinge": hinge,
    "ipo": ipo,
    "simpo": simpo,
    "wpo": wpo,
}


def compute(choice: LossChoice, logps: PairLogps) -> LossOutput:
    """The chosen loss with its numbers filled in."""
    return LOSSES[choice.name](logps, beta=choice.beta, **choice.hyperparameters)


__all__ = ["LOSSES", "Loss", "LossOutput", "PairLogps", "compute"]
