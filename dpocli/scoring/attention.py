"""Attention inside one row of many pairs: every segment looks at itself alone, and all its branches at one trunk.

Registered with transformers as an attention implementation, so that any model that goes through its attention interface
uses it. Two ways, the same values: segment by segment, which runs everywhere, and one FlexAttention kernel with a block
mask on CUDA. Neither makes a mask over the whole row, whose size would grow with the square of the row.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from dpocli.scoring.block_mask import BlockMasks
from dpocli.scoring.layout import Segment, TokenRows

NAME = "dpocli_segments"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key, value of shape (1, heads, tokens, head size) → (1, queries, heads, value size); the queries are the last
of the keys' tokens."""


@dataclass(slots=True)
class CurrentRow:
    """What the attention layers of a model know of the row that goes through it; it stays for the backward pass."""

    segments: tuple[Segment, ...] = ()
    block_masks: BlockMasks | None = None
    """Where FlexAttention is used."""

    def set(self, rows: TokenRows, *, flex: bool) -> None:
        self.segments = rows.segments
        self.block_masks = BlockMasks(rows.segments, rows.input_ids.device) if flex else None


def install(model: PreTrainedModel) -> CurrentRow:
    """Gives every module of the model a way to the current row, and returns it."""
    current = CurrentRow()
    for module in model.modules():
        # Past nn.Module's own bookkeeping: this is no parameter, buffer or module.
        object.__setattr__(module, "_dpocli_row", current)
    return current


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  (the interface has it)
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface.

    Args:
        module: the attention layer.
        query: shape (1, heads, tokens, head size).
        key: shape (1, key heads, tokens, head size).
        value: shape (1, key heads, tokens, value size).
        attention_mask: not looked at; the segments say who sees whom.
        dropout: of the attention weights.
        scaling: of the scores.
        options: what else the layer has, as a window, a soft cap, or sinks.

    Returns:
        Shape (1, tokens, heads, value size), and None for the weights.
    """
    row: CurrentRow = module._dpocli_row  # type: ignore[assignment]
    if row.block_masks is not None:
        return row.block_masks.attention(module, query, key, value, dropout, scaling, options), None
    attend = _attend(module, dropout, scaling, options)
    # Cut by `split`, whose backward pass joins the pieces once; slices would each make a gradient of the whole row.
    sizes = [size for segment in row.segments for size in _stretches(segment)]
    stretches = zip(*(torch.split(tensor, sizes, 2) for tensor in (query, key, value)), strict=True)
    pieces: list[Tensor] = []
    for segment in row.segments:
        # The trunk is computed with the first branch, as one causal square.
        first_query, first_key, first_value = next(stretches)
        pieces.append(attend(first_query, first_key, first_value))
        for _ in segment.branches[1:]:
            own_query, own_key, own_value = next(stretches)
            keys = torch.cat([first_key[:, :, : segment.trunk], own_key], dim=2)
            values = torch.cat([first_value[:, :, : segment.trunk], own_value], dim=2)
            pieces.append(attend(own_query, keys, values))
    return torch.cat(pieces, dim=1), None


def _stretches(segment: Segment) -> tuple[int, ...]:
    first, *others = segment.branches
    return (segment.trunk + first, *others)


def _attend(module: nn.Module, dropout: float, scaling: float | None, options: dict[str, Any]) -> Attend:
    """Causal attention as the layer does it."""
    window = options.get("sliding_window")

    def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        square = query.shape[2] == key.shape[2]
        inside = window is None or key.shape[2] <= window
        mask = None if square and inside else _seen(query, key, window)
        output = F.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2)

    def through_own(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The model's own plain attention, for what the fused kernel would silently leave out."""
        mask = query.new_zeros(query.shape[2], key.shape[2])
        mask = mask.masked_fill(~_seen(query, key, window), torch.finfo(query.dtype).min)
        eager = sys.modules[type(module).__module__].eager_attention_forward
        output: Tensor = eager(
            module, query, key, value, mask[None, None], dropout=dropout, scaling=scaling, **options
        )[0]
        return output

    needs_own = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    return through_own if needs_own else fused


def _seen(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Which keys each query sees: up to its own, and no further back than the window. Shape (queries, keys), bool."""
    queries, keys = query.shape[2], key.shape[2]
    own = torch.arange(keys - queries, keys, device=query.device)[:, None]
    distance = own - torch.arange(keys, device=query.device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _no_mask(*_: Any, **__: Any) -> None:
    """An attention name that is not registered as a mask too would get one of transformers' own."""


AttentionInterface.register(NAME, segment_attention)

AttentionMaskInterface.register(NAME, _no_mask)
