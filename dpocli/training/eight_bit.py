"""AdamW with moments of 8 bits: bitsandbytes' optimizer, for parameters of `fully_shard`. Import it only where it is used."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from bitsandbytes.optim.adamw import AdamW8bit
from torch import nn

from dpocli.training.policy import local_part


class EightBitAdamW(AdamW8bit):
    """AdamW of Dettmers et al. 2022 (arXiv:2110.02861); parameters of less than 4096 elements keep float32 moments.

    The kernels refuse DTensors and get what they hold on this process. The state holds nothing but tensors, so that a
    checkpoint can store it; the tables of the codes are the same for all parameters and are left out.
    """

    def init_state(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Allocate the moments of a parameter, as they are before the first step."""
        with self._on_local_tensors(p) as local:
            super().init_state(group, local, gindex, pindex)  # type: ignore[no-untyped-call]

    def update_step(self, group: dict[str, Any], p: nn.Parameter, gindex: int, pindex: int) -> None:
        """Update a parameter by its gradient."""
        with self._on_local_tensors(p) as local:
            super().update_step(group, local, gindex, pindex)  # type: ignore[no-untyped-call]

    @contextmanager
    def _on_local_tensors(self, p: nn.Parameter) -> Iterator[nn.Parameter]:
        local = nn.Parameter(local_part(p.detach()))
        local.grad = None if p.grad is None else local_part(p.grad)
        state: dict[str, Any] = {key: local_part(value) for key, value in self.state.pop(p, {}).items()}
        if state:
            state["step"] = int(state["step"])
        if "absmax1" in state:
            tables = (self.name2qmap["dynamic"], self.name2qmap["udynamic"])
            state |= dict(zip(("qmap1", "qmap2"), (table.to(local.device) for table in tables), strict=True))
        self.state[local] = state
        yield local
        kept = {key: value for key, value in self.state.pop(local).items() if not key.startswith("qmap")}
        self.state[p] = kept | {"step": torch.tensor(float(kept["step"]))}
