"""A scorer spread over processes with torch's `fully_shard`, and its weights read piece by piece where they are needed.

The scoring module is the root and the decoder layers are its only units: the head's weight is then read inside the root's
forward, where it is a plain tensor. (The head in a group of its own gives silently wrong gradients.)
"""

from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard

from dpocli.scoring.scorer import PairScorer


def shard(
    scorer: PairScorer,
    mesh: DeviceMesh,
    *,
    dtype: torch.dtype,
    offload: bool = False,
    ignored: set[nn.Parameter] | None = None,
) -> None:
    """Spreads the parameters of a scorer over a mesh (replicas, shards), in place.

    The mixed-precision policy makes the forward pass equal to a plain load in that dtype, which autocast does not:
    only the root's output is cast to float32, since a cast between the layers would change their arithmetic.

    Args:
        scorer: its parameters may be on the meta device; `fill` reads them afterwards.
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
    for layer in decoder_layers(scorer):
        fully_shard(layer, mp_policy=inner, reshard_after_forward=has_shards or offload, **settings)
    fully_shard(scorer, mp_policy=outer, reshard_after_forward=False, **settings)


def decoder_layers(scorer: PairScorer) -> list[nn.Module]:
    """The repeated blocks of the model, by transformers' own list of what must not be split."""
    names = set(getattr(scorer.model, "_no_split_modules", None) or ())
    return [module for module in scorer.model.modules() if type(module).__name__ in names]
