"""Sharding of a module over processes with torch's `fully_shard`.

The scoring module is the root and the decoder layers are its only units: the root's forward then reads the head's weight
as a plain tensor. (A head that is a unit itself gives silently wrong gradients.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard


def shard(
    root: nn.Module,
    layers: Sequence[nn.Module],
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    offload: bool = False,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    """Shard the parameters of a scoring module over a mesh (replicas, shards), in place.

    The mixed-precision policy makes the forward pass equal to a plain load in that dtype, which autocast does not. Only
    the root's output is cast to float32, since a cast between the layers would change their arithmetic.

    Args:
        root: the scoring module; its parameters may be on the meta device.
        layers: the decoder layers of its model, each a unit of its own.
        mesh: replicas and shards, or shards alone.
        dtype: of the forward pass.
        offload: keep the shards in the memory of the host between passes.
        ignored: parameters that stay whole on every process.
    """
    has_shards = mesh.size(-1) > 1
    inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    outer = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
    settings: dict[str, Any] = {
        "mesh": mesh,
        "offload_policy": CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy(),
        "ignored_params": ignored or set(),
    }
    for layer in layers:
        fully_shard(layer, mp_policy=inner, reshard_after_forward=has_shards or offload, **settings)
    fully_shard(root, mp_policy=outer, reshard_after_forward=False, **settings)


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a model, by transformers' list of modules that must not be split."""
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers: list[nn.Module] = []
    inside: set[nn.Module] = set()
    seen: set[nn.Parameter] = set()
    for module in model.modules():  # outer modules first
        parameters = set(module.parameters())
        # The list may name modules inside each other, and layers may share weights: those stay with the root.
        if type(module).__name__ in names and module not in inside and not parameters & seen:
            layers.append(module)
            inside.update(module.modules())
            seen |= parameters
    return layers
