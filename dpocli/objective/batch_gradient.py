"""The gradient of the loss of a whole batch with respect to its log-probs.

A loss that couples the pairs of a batch cannot be back-propagated one micro-batch at a time. Its gradient with respect
to the log-probs is a few numbers per pair: given these, each micro-batch back-propagates the sum of gradient ×
log-prob, which gives exactly its part of the gradient of the whole batch.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from dpocli.config.loss_expression import LossChoice
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import States, compute
from dpocli.objective.metrics import batch_loss

_LEARNED = ("policy_chosen", "policy_rejected", "policy_chosen_tail", "policy_rejected_tail")
"""The columns that a policy's gradient flows through."""


def batch_gradient(choice: LossChoice, logps: PairLogps, weights: Tensor, states: States) -> dict[str, Tensor]:
    """d(batch loss)/d(log-prob), by column of `logps`. Shapes (pairs,).

    Args:
        choice: the loss.
        logps: log-probs of every pair of the batch, without graph. Shapes (pairs,), nats.
        weights: pair weights. Shape (pairs,), float64.
        states: states of stateful losses, this batch included.
    """
    present = logps.columns()
    leaves = {name: present[name].detach().requires_grad_() for name in _LEARNED if name in present}
    with torch.enable_grad():
        loss = batch_loss(compute(choice, replace(logps, **leaves), states).losses, weights)
        gradients = torch.autograd.grad(loss, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if gradient is None else gradient
        for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True)
    }


def with_gradient(logps: PairLogps, gradient: Mapping[str, Tensor]) -> Tensor:
    """A scalar whose gradient with respect to `logps` is `gradient`; its value has no meaning."""
    columns = logps.columns()
    total = sum((column * columns[name]).sum() for name, column in gradient.items())
    assert isinstance(total, Tensor)
    return total
