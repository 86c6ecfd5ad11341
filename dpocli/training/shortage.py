"""Memory that runs out in the middle of a training step: what can still be done about it, and undone."""

from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor

from dpocli.errors import is_out_of_memory
from dpocli.training.policy import Policy


@dataclass(slots=True)
class Shortage:
    """What one process met in one step.

    Alone, a process lets the error end the step. Replicas wait for each other only when they exchange the gradients, with the
    last pass: one that runs out of memory before leaves out its passes but that, for which a filler will do, and then all can
    agree to make the step again.
    """

    found: str | None = None
    """The error in words."""
    exchanging: bool = False
    """Whether the exchange may have begun, in the middle of which nobody can leave."""

    def can_wait(self, error: Exception, policy: Policy) -> bool:
        """Whether this process can go on to the end of the step in spite of `error`."""
        among_replicas = policy.processes.count > 1 and not is_sharded(policy)
        return among_replicas and not self.exchanging and is_out_of_memory(error) and can_be_undone(policy)


def can_be_undone(policy: Policy) -> bool:
    """Whether this torch has a way back from an error in the middle of a pass, as 2.13 has."""
    return hasattr(policy.scorer, "reset_iter_state")


def is_sharded(policy: Policy) -> bool:
    """Whether the processes also exchange weights, at every layer of every pass."""
    parameters = (parameter for _, parameter in policy.master_weights)
    return any(isinstance(p, DTensor) and p.to_local().numel() != p.numel() for p in parameters)


def throw_away_gradients(policy: Policy) -> None:
    """As if a step had not begun, wherever in the middle of a pass it ended. Needs `can_be_undone`."""
    policy.scorer.zero_grad()  # first of the copies that compute, which the module shows where a pass ended midway
    policy.scorer.reset_iter_state()  # type: ignore[operator]
    for _, parameter in policy.master_weights:
        parameter.grad = None
    if policy.processes.device.type == "cuda":
        torch.cuda.empty_cache()
