"""The optimizers: AdamW, AdamW with moments of 8 bits, and RMSprop as the original DPO code uses it."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dpocli.config.commands import TrainOptions
from dpocli.training.eight_bit import EightBitAdamW
from dpocli.training.policy import Policy

STATE_BYTES: Mapping[str, float] = {"adamw": 8, "adamw-8bit": 2 + 2 * 4 / 256, "rmsprop": 4}
"""Bytes that an optimizer remembers of a trained parameter: of 8-bit moments, a scale for 256 of them each."""


def make_optimizer(policy: Policy, options: TrainOptions) -> torch.optim.Optimizer:
    """The optimizer of every parameter that is trained; the learning rate is set at every step.

    Raises:
        UsageError: 8-bit moments cannot be had here.
    """
    parameters = [parameter for _, parameter in policy.master_weights]
    adam: dict[str, Any] = {
        "lr": options.optimizer.learning_rate or 0.0,
        "betas": (options.optimizer.adam_beta1, options.optimizer.adam_beta2),
        "eps": options.optimizer.adam_epsilon,
        "weight_decay": options.optimizer.weight_decay,
    }
    match options.optimizer.name:
        case "adamw":
            # One kernel instead of a dozen passes over memory. It rounds as one, so the last digit may be another than that
            # of torch's loop over parameters (measured: 1.5e-8 after 5 steps at a rate of 1e-3).
            optimizer = torch.optim.AdamW(parameters, **adam, fused=True)
            optimizer.register_step_pre_hook(_counters_beside_parameters)
            return optimizer
        case "adamw-8bit":
            return EightBitAdamW(parameters, **adam)
        case "rmsprop":
            # Its defaults (alpha 0.99, epsilon 1e-8, no momentum), as in trainers.py of
            # eric-mitchell/direct-preference-optimization: `getattr(torch.optim, config.optimizer)(parameters, lr=config.lr)`.
            return torch.optim.RMSprop(parameters, lr=adam["lr"])


def state_bytes(policy: Policy, options: TrainOptions) -> float:
    """What the optimizer will remember on this process, in bytes."""
    parameters = [parameter for _, parameter in policy.master_weights]
    mine = sum((p.to_local() if isinstance(p, DTensor) else p).numel() for p in parameters)
    return mine * STATE_BYTES[options.optimizer.name]


def _counters_beside_parameters(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """The fused kernel wants its count of steps on the device, and a checkpoint gives it back on the CPU."""
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device)
