"""AdamW with moments of 8 bits: bitsandbytes' kernel, on parameters that torch shards and checkpoints that hold tensors."""

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpocli.errors import UsageError

BLOCK = 256
"""Elements that share a scale (Dettmers et al. 2022, arXiv:2110.02861, block-wise quantization)."""

_KERNEL = "bitsandbytes::optimizer_update_8bit_blockwise"


class EightBitAdamW(torch.optim.Optimizer):
    """AdamW of Dettmers et al. 2022 (arXiv:2110.02861); parameters of less than 4096 elements keep float32 moments.

    The kernel refuses torch's distributed tensors, so it is given what they hold on this process, which has to be all of
    them: where blocks end depends on where a shard does.

    Args:
        parameters: float32, on one device.
        settings: those of AdamW.

    Raises:
        UsageError: there is no such kernel here, or parameters are sharded.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], **settings: Any) -> None:
        super().__init__(parameters, settings)
        _check(parameters)
        kernels: Any = import_module("bitsandbytes.optim")
        self._local = [nn.Parameter(_whole(parameter.detach())) for parameter in parameters]
        self._inner = kernels.AdamW8bit(self._local, **settings)
        moments = [_Moments(self._inner, index) for index in range(len(parameters))]
        self.state.update(zip(parameters, moments, strict=True))

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Moves the parameters by their gradients."""
        (group,) = self.param_groups
        self._inner.param_groups[0]["lr"] = group["lr"]
        for parameter, local in zip(group["params"], self._local, strict=True):
            local.data = _whole(parameter.detach())
            local.grad = None if parameter.grad is None else _whole(parameter.grad)
        self._inner.step()
        for local in self._local:
            local.grad = None
        return closure() if closure else None


class _Moments(MutableMapping[str, Tensor]):
    """What is remembered of a parameter, as checkpoints keep it: scalars, and tensors of the parameter's shape.

    A moment of 8 bits is shown as two of them, its codes and, element by element, its scales: more than it takes in memory,
    but exact.
    """

    def __init__(self, optimizer: Any, index: int) -> None:
        self._optimizer, self._index = optimizer, index
        self._parameter = optimizer.param_groups[0]["params"][index]

    @property
    def _state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state[self._parameter]
        return state

    def __iter__(self) -> Iterator[str]:
        if self._state:
            yield "step"
            for number in (1, 2):
                yield from (f"codes{number}", f"scales{number}") if "absmax1" in self._state else (f"moment{number}",)

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def __getitem__(self, key: str) -> Tensor:
        if key not in set(self):
            raise KeyError(key)
        kind, number = key[:-1], key[-1]
        if key == "step":
            return torch.tensor(float(self._state["step"]))
        if kind == "scales":
            scales: Tensor = self._state[f"absmax{number}"]
            return scales.repeat_interleave(BLOCK)[: self._parameter.numel()].view_as(self._parameter)
        moment: Tensor = self._state[f"state{number}"]
        return moment

    def __setitem__(self, key: str, value: Tensor) -> None:
        if not self._state:
            self._optimizer.init_state(self._optimizer.param_groups[0], self._parameter, 0, self._index)
        kind, number = key[:-1], key[-1]
        if key == "step":
            self._state["step"] = int(value)
        elif kind == "scales":
            self._state[f"absmax{number}"].copy_(_whole(value).flatten()[::BLOCK])
        else:
            self._state[f"state{number}"].copy_(_whole(value))

    def __delitem__(self, key: str) -> None:
        raise NotImplementedError("moments are remembered together")


def _whole(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check(parameters: Sequence[nn.Parameter]) -> None:
    if find_spec("bitsandbytes") is None:
        raise UsageError(
            "--optimizer adamw-8bit: it needs bitsandbytes. Install it: pip install 'dpocli[quantization]'."
        )
    import_module("bitsandbytes")  # which declares the kernel
    device = parameters[0].device.type
    if not torch._C._dispatch_has_kernel_for_dispatch_key(_KERNEL, device.upper()):
        raise UsageError(
            f"--optimizer adamw-8bit: this bitsandbytes has no kernel for {device}. Install a newer one, or use --optimizer adamw."
        )
    if any(_whole(parameter.detach()).numel() != parameter.numel() for parameter in parameters):
        raise UsageError(
            "--optimizer adamw-8bit: its moments share scales in blocks that do not end where shards do. Use --optimizer adamw "
            "with sharded models, whose moments are spread over the processes too."
        )
