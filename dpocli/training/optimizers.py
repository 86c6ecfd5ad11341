"""The optimizers: AdamW, AdamW with moments of 8 bits, and RMSprop as the original DPO code uses it."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from dpocli.config.training_options import OptimizerOptions
from dpocli.errors import UsageError
from dpocli.training.policy import Policy, local_part

STATE_BYTES: Mapping[str, float] = {"adamw": 8, "adamw-8bit": 2 + 2 * 4 / 256, "rmsprop": 4}
"""Bytes of optimizer state per trained parameter; 8-bit moments share a float32 scale in blocks of 256."""


def make_optimizer(policy: Policy, options: OptimizerOptions) -> torch.optim.Optimizer:
    """The optimizer of every parameter that is trained; the learning rate is set at every step.

    Raises:
        UsageError: 8-bit moments are not available here.
    """
    parameters = [parameter for _, parameter in policy.master_weights]
    adam: dict[str, Any] = {
        "lr": options.learning_rate or 0.0,
        "betas": (options.adam_beta1, options.adam_beta2),
        "eps": options.adam_epsilon,
        "weight_decay": options.weight_decay,
    }
    match options.name:
        case "adamw":
            # One kernel instead of a dozen passes over memory. It rounds once, so its last digit may differ from torch's loop
            # over parameters (measured: 1.5e-8 after 5 steps at a rate of 1e-3).
            optimizer = torch.optim.AdamW(parameters, **adam, fused=True)
            optimizer.register_step_pre_hook(_counters_beside_parameters)
            return optimizer
        case "adamw-8bit":
            _check_8bit(policy)
            eight_bit: Any = import_module("dpocli.training.eight_bit")  # imports bitsandbytes
            made: torch.optim.Optimizer = eight_bit.EightBitAdamW(parameters, **adam)
            return made
        case "rmsprop":
            # Its defaults (alpha 0.99, epsilon 1e-8, no momentum), as in trainers.py of
            # eric-mitchell/direct-preference-optimization: `getattr(torch.optim, config.optimizer)(parameters, lr=config.lr)`.
            return torch.optim.RMSprop(parameters, lr=adam["lr"])


def allocate_state(optimizer: torch.optim.Optimizer) -> None:
    """Allocate the moments of an optimizer, as they are before its first step. Weights and gradients keep their values."""
    (group,) = optimizer.param_groups
    if hasattr(optimizer, "init_state"):  # bitsandbytes
        for index, parameter in enumerate(group["params"]):
            optimizer.init_state(group, parameter, 0, index)
        return
    # torch allocates them in the first step; one with a rate and gradients of zero moves nothing, and is not counted.
    settings = {name: group[name] for name in ("lr", "weight_decay")}
    gradients = [parameter.grad for parameter in group["params"]]
    group |= dict.fromkeys(settings, 0.0)
    for parameter in group["params"]:
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for parameter, gradient in zip(group["params"], gradients, strict=True):
        optimizer.state[parameter]["step"].zero_()
        parameter.grad = gradient
    group |= settings


def state_bytes(policy: Policy, options: OptimizerOptions) -> float:
    """Bytes of optimizer state on this process."""
    return sum(local_part(p).numel() for _, p in policy.master_weights) * STATE_BYTES[options.name]


def _counters_beside_parameters(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Move the step counters to the device: the fused kernel needs them there, and a checkpoint gives them on the CPU."""
    for parameter, state in optimizer.state.items():
        if "step" in state:
            state["step"] = state["step"].to(parameter.device)


def _check_8bit(policy: Policy) -> None:
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "--optimizer adamw-8bit: it needs bitsandbytes. Install it: pip install 'dpocli[quantization]'."
        )
    import_module("bitsandbytes")  # which registers the kernels
    device, kernel = policy.master_weights[0][1].device.type, "bitsandbytes::optimizer_update_8bit_blockwise"
    if not torch._C._dispatch_has_kernel_for_dispatch_key(kernel, device.upper()):
        raise UsageError(
            f"--optimizer adamw-8bit: this bitsandbytes has no kernel for {device}. Install a newer one, or use --optimizer adamw."
        )
    if policy.is_sharded:
        raise UsageError(
            "--optimizer adamw-8bit: its moments share scales in blocks that do not end where shards do. Use --optimizer adamw "
            "with sharded models, whose moments are spread over the processes too."
        )
