"""Attention within one row of many segments: each token sees the earlier tokens of its own trunk and branch only.

Registered with transformers as an attention implementation, so any model that uses its attention interface can run it.
Two backends with equal values: segment by segment with `scaled_dot_product_attention`, on any device, and FlexAttention
with a block mask, on CUDA. Neither builds a mask of the whole row, whose size is quadratic in the row.
"""

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward

from dpocli.scoring.block_mask import BlockMasks
from dpocli.scoring.layout import Segment, TokenRows

NAME = "dpocli_segments"

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Query, key, value of shape (1, heads, tokens, head size) → (1, queries, heads, value size); the queries are the last
of the keys' tokens."""


@dataclass(slots=True)
class CurrentRow:
    """The row that the attention layers compute; kept for the backward pass, in which layers may be recomputed."""

    segments: tuple[Segment, ...] = ()
    block_masks: BlockMasks | None = None
    """Where FlexAttention is used."""

    def set(self, rows: TokenRows, *, flex: bool) -> None:
        """Set the row for the next forward pass, and whether FlexAttention computes it."""
        self.segments = rows.segments
        self.block_masks = BlockMasks(rows.segments, rows.input_ids.device) if flex else None


def install(model: PreTrainedModel) -> CurrentRow:
    """Give every module of the model a reference to one `CurrentRow`, and return it."""
    current = CurrentRow()
    for module in model.modules():
        # Bypasses nn.Module.__setattr__: this is no parameter, buffer or submodule.
        object.__setattr__(module, "_dpocli_row", current)
    return current


def segment_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001  (part of the interface)
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Compute attention of the current row; an implementation of transformers' attention interface.

    Args:
        module: the attention layer.
        query: shape (1, heads, tokens, head size).
        key: shape (1, key heads, tokens, head size).
        value: shape (1, key heads, tokens, value size).
        attention_mask: ignored; the segments define the mask.
        dropout: of the attention weights.
        scaling: of the scores.
        options: further keywords of the layer, such as a window, a soft cap, or sinks.

    Returns:
        Shape (1, tokens, heads, value size), and None for the weights.
    """
    row: CurrentRow = module._dpocli_row  # type: ignore[assignment]
    if row.block_masks is not None:
        mask = row.block_masks.of(options.get("sliding_window"))
        output, _ = flex_attention_forward(module, query, key, value, mask, scaling=scaling, dropout=dropout, **options)
        return output, None
    attend = _attend(module, dropout, scaling, options)
    # `split` concatenates the gradients of all pieces once; each slice would allocate a gradient of the whole row.
    sizes = [size for segment in row.segments for size in _piece_sizes(segment)]
    pieces = zip(*(torch.split(tensor, sizes, 2) for tensor in (query, key, value)), strict=True)
    outputs: list[Tensor] = []
    for segment in row.segments:
        # The trunk and the first branch are one causal sequence.
        first_query, first_key, first_value = next(pieces)
        outputs.append(attend(first_query, first_key, first_value))
        for _ in segment.branches[1:]:
            branch_query, branch_key, branch_value = next(pieces)
            keys = torch.cat([first_key[:, :, : segment.trunk], branch_key], dim=2)
            values = torch.cat([first_value[:, :, : segment.trunk], branch_value], dim=2)
            outputs.append(attend(branch_query, keys, values))
    return torch.cat(outputs, dim=1), None


def _piece_sizes(segment: Segment) -> tuple[int, ...]:
    first, *others = segment.branches
    return (segment.trunk + first, *others)


def _attend(module: nn.Module, dropout: float, scaling: float | None, options: dict[str, Any]) -> Attend:
    """Causal attention with the options of the layer."""
    window = options.get("sliding_window")

    def sdpa(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        is_square = query.shape[2] == key.shape[2]
        fits_window = window is None or key.shape[2] <= window
        mask = None if is_square and fits_window else _causal_mask(query, key, window)
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

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """The model's own eager attention, for options that SDPA would silently ignore."""
        mask = query.new_zeros(query.shape[2], key.shape[2])
        mask = mask.masked_fill(~_causal_mask(query, key, window), torch.finfo(query.dtype).min)
        attention_of_model = sys.modules[type(module).__module__].eager_attention_forward
        output: Tensor = attention_of_model(
            module, query, key, value, mask[None, None], dropout=dropout, scaling=scaling, **options
        )[0]
        return output

    needs_eager = any(options.get(name) is not None for name in ("softcap", "s_aux"))
    return eager if needs_eager else sdpa


def _causal_mask(query: Tensor, key: Tensor, window: int | None) -> Tensor:
    """Lower-right causal mask, limited to the window: shape (queries, keys), bool, True where a query sees a key."""
    queries, keys = query.shape[2], key.shape[2]
    positions = torch.arange(keys - queries, keys, device=query.device)[:, None]
    distance = positions - torch.arange(keys, device=query.device)
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


# Not registered as a mask: transformers then passes None, without looking for packed sequences in the position ids, which
# would wait for the device in every pass.
AttentionInterface.register(NAME, segment_attention)
