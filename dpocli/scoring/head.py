"""Hidden states → log-probs. Logits exist only here, one tile at a time, and never for a token that nobody scores.

A plain head makes logits of shape (batch, length, vocabulary) and a float32 copy of them for the softmax. Here a tile
of positions meets a tile of the vocabulary, an online log-sum-exp in float32 takes what it needs from it, and the tile
is dropped; the backward pass makes it again. Memory is that of one tile, whatever the batch (on the CPU, where products
are dear and memory is not, that of a few hundred tokens' logits).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CPU_TILE = (1024, 2048)
"""Positions × vocabulary entries. Measured: 1.6 to 2 times faster than 256 positions × the whole vocabulary."""

CUDA_TILE = (4096, 16384)

CPU_KEPT_BYTES = 512 * 2**20
"""Logits of one forward pass that are kept for its backward pass if they take no more than this."""


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model does between its output embeddings and its logits: cap · tanh(scale · x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Shape and dtype stay."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def backward(self, grad: Tensor, mapped: Tensor) -> Tensor:
        """Gradient before the map, from the gradient behind it and the map's own output."""
        if self.cap is not None:
            grad = grad * (1 - (mapped / self.cap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale


@dataclass(frozen=True, slots=True)
class Head:
    """The output embeddings of a model, as tensors, and the map behind them."""

    weight: Tensor
    """Shape (vocabulary, hidden)."""
    bias: Tensor | None
    """Shape (vocabulary,)."""
    logit_map: LogitMap

    def tiles(self) -> Iterator[slice]:
        """Slices of the vocabulary."""
        _, width = _tile(self.weight)
        for start in range(0, len(self.weight), width):
            yield slice(start, min(start + width, len(self.weight)))

    def logits(self, hidden: Tensor, columns: slice) -> Tensor:
        """One tile of logits, multiplied in the model's dtype, returned in float32."""
        bias = None if self.bias is None else self.bias[columns]
        return self.logit_map(torch.nn.functional.linear(hidden, self.weight[columns], bias).float())


def token_logps(
    hidden: Tensor, head: Head, targets: Tensor, *, collision: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-prob of each target, and on request log Σ_v p(v)² at its position.

    Args:
        hidden: shape (tokens, hidden): the state from which each target is predicted.
        head: the model's output embeddings.
        targets: shape (tokens,), int64.
        collision: also compute log Σ_v p(v)², which WPO weighs with.

    Returns:
        Log-probs, shape (tokens,), float32, with gradients to hidden states, weight and bias; and log Σ_v p(v)², shape
        (tokens,), float32, without gradient, or None.
    """
    is_frozen = not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
    if is_frozen and hidden.requires_grad and torch.is_grad_enabled() and not collision:
        frozen: Tensor = _FrozenHeadLogps.apply(hidden, head.weight, head.bias, targets, head.logit_map)  # type: ignore[no-untyped-call]
        return frozen, None
    kept = _KeptLogits.of(hidden, head.weight)
    logps, collisions = _TiledLogps.apply(hidden, head.weight, head.bias, targets, head.logit_map, collision, kept)  # type: ignore[no-untyped-call]
    return logps, collisions if collision else None


def _tile(weight: Tensor) -> tuple[int, int]:
    return CUDA_TILE if weight.is_cuda else CPU_TILE


class _TiledLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_map: LogitMap,
        collision: bool,
        kept: "_KeptLogits",
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, logit_map)
        num_tokens = len(hidden)
        target_logits = hidden.new_empty(num_tokens, dtype=torch.float32)
        log_sums = hidden.new_empty(num_tokens, dtype=torch.float32)
        collisions = hidden.new_empty(num_tokens if collision else 0, dtype=torch.float32)
        for rows in _heights(hidden, weight):
            log_sum = log_square_sum = None
            for columns in head.tiles():
                logits = head.logits(hidden[rows], columns)
                kept.put(rows, columns, logits)
                _pick(logits, targets[rows], columns, target_logits[rows])
                log_sum = _add_exponents(log_sum, logits)
                if collision:
                    log_square_sum = _add_exponents(log_square_sum, 2 * logits)
            assert log_sum is not None
            log_sums[rows] = log_sum
            if log_square_sum is not None:
                collisions[rows] = log_square_sum - 2 * log_sum
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums)
        ctx.logit_map, ctx.kept = logit_map, kept
        ctx.mark_non_differentiable(collisions)
        return target_logits - log_sums, collisions

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        head = Head(weight, bias, ctx.logit_map)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # The vocabulary is the outer loop here, so that each tile of the weight's gradient is summed in float32 and
        # written once; only the gradient of the hidden states needs a float32 copy of the whole.
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        weight_grad = torch.empty_like(weight) if needs_weight else None
        bias_grad = torch.empty_like(bias) if needs_bias else None
        for columns in head.tiles():
            tile_weight_grad = torch.zeros_like(weight[columns], dtype=torch.float32) if needs_weight else None
            tile_bias_grad = torch.zeros_like(bias[columns], dtype=torch.float32) if needs_bias else None
            for rows in _heights(hidden, weight):
                mapped = ctx.kept.take(rows, columns)
                if mapped is None:
                    mapped = head.logits(hidden[rows], columns)
                # In place where nobody needs the logits again.
                shifted = mapped.clone() if ctx.logit_map.cap is not None else mapped
                logits_grad = shifted.sub_(log_sums[rows, None]).exp_().mul_(-grad[rows, None])
                _add_at_targets(logits_grad, targets[rows], columns, grad[rows])
                logits_grad = ctx.logit_map.backward(logits_grad, mapped)
                if tile_bias_grad is not None:
                    tile_bias_grad += logits_grad.sum(0)
                logits_grad = logits_grad.to(hidden.dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] += logits_grad @ weight[columns]
                if tile_weight_grad is not None:
                    tile_weight_grad += logits_grad.T @ hidden[rows]
            if weight_grad is not None and tile_weight_grad is not None:
                weight_grad[columns] = tile_weight_grad
            if bias_grad is not None and tile_bias_grad is not None:
                bias_grad[columns] = tile_bias_grad
        in_dtype = None if hidden_grad is None else hidden_grad.to(hidden.dtype)
        return in_dtype, weight_grad, bias_grad, None, None, None, None


class _FrozenHeadLogps(torch.autograd.Function):
    """Where the head is not trained, a log-prob's gradient is known up to one factor as soon as it is computed:

    d log p(t) / dh = w_t − Σ_v p(v) w_v (each w_v times the derivative of the map), which an online softmax sums along
    with the log-sum-exp. So the backward pass makes no logits at all: two products instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_map: LogitMap
    ) -> Tensor:
        head = Head(weight, bias, logit_map)
        target_logits = hidden.new_empty(len(hidden), dtype=torch.float32)
        log_sums = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden)
        for rows in _heights(hidden, weight):
            here = hidden[rows]
            largest = here.new_full((len(here),), -torch.inf, dtype=torch.float32)
            total = torch.zeros_like(largest)
            mean_weight = torch.zeros_like(here, dtype=torch.float32)
            for columns in head.tiles():
                logits = head.logits(here, columns)
                _pick(logits, targets[rows], columns, target_logits[rows])
                before, largest = largest, torch.maximum(largest, logits.amax(dim=-1))
                shrunk = torch.exp(before - largest)
                exponents = torch.exp(logits - largest[:, None])
                total = total * shrunk + exponents.sum(dim=-1)
                bent = logit_map.backward(exponents, logits).to(hidden.dtype)
                mean_weight = mean_weight.mul_(shrunk[:, None]).add_(bent @ weight[columns])
            log_sums[rows] = largest + torch.log(total)
            at_target = logit_map.backward(torch.ones_like(total), target_logits[rows])
            own_weight = weight[targets[rows]].float() * at_target[:, None]
            slopes[rows] = (own_weight - mean_weight / total[:, None]).to(hidden.dtype)
        ctx.save_for_backward(slopes)
        return target_logits - log_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None


class _KeptLogits:
    """The tiles of one call, kept for its backward pass where they are few: making them again costs a product in four."""

    def __init__(self, worthwhile: bool) -> None:
        self._tiles: dict[tuple[int, int], Tensor] | None = {} if worthwhile else None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> "_KeptLogits":
        size = 4 * len(hidden) * len(weight)
        return cls(torch.is_grad_enabled() and not weight.is_cuda and size <= CPU_KEPT_BYTES)

    def put(self, rows: slice, columns: slice, logits: Tensor) -> None:
        if self._tiles is not None:
            self._tiles[rows.start, columns.start] = logits

    def take(self, rows: slice, columns: slice) -> Tensor | None:
        """Once; None where it was not kept, or is taken already (a graph that is kept for a second backward pass)."""
        return self._tiles.pop((rows.start, columns.start), None) if self._tiles else None


def _heights(hidden: Tensor, weight: Tensor) -> Iterator[slice]:
    """Slices of the positions."""
    height, _ = _tile(weight)
    for start in range(0, len(hidden), height):
        yield slice(start, min(start + height, len(hidden)))


def _add_exponents(log_sum: Tensor | None, logits: Tensor) -> Tensor:
    """Log-sum-exp of what was seen so far and one more tile. Shape (positions,)."""
    tile_sum = torch.logsumexp(logits, dim=-1)
    return tile_sum if log_sum is None else torch.logaddexp(log_sum, tile_sum)


def _in_tile(targets: Tensor, columns: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in a tile, and where: a mask and indices that are valid everywhere (no synchronisation)."""
    inside = (targets >= columns.start) & (targets < columns.stop)
    return inside, torch.where(inside, targets - columns.start, 0)[:, None]


def _pick(logits: Tensor, targets: Tensor, columns: slice, into: Tensor) -> None:
    inside, index = _in_tile(targets, columns)
    torch.where(inside, logits.gather(-1, index)[:, 0], into, out=into)


def _add_at_targets(logits_grad: Tensor, targets: Tensor, columns: slice, grad: Tensor) -> None:
    inside, index = _in_tile(targets, columns)
    logits_grad.scatter_add_(-1, index, torch.where(inside, grad, 0.0)[:, None])
