"""Fused linear cross-entropy per token: hidden states → log-probs, with logits of one tile at a time.

A plain head materializes logits of shape (batch, length, vocabulary), and a float32 copy of them for the softmax. Here a
block of positions meets a tile of the vocabulary; an online log-sum-exp in float32 accumulates over the tiles, and each tile
is dropped. The backward pass recomputes it. Peak memory is that of one tile, whatever the batch (on the CPU, up to
`CPU_CACHED_BYTES` of logits are kept instead).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

CPU_TILE = (1024, 2048)
"""Positions × vocabulary entries. Measured: 1.6 to 2 times faster than 256 positions × the whole vocabulary."""

CUDA_TILE = (4096, 16384)

CPU_CACHED_BYTES = 512 * 2**20
"""Logits of a forward pass are kept for its backward pass if they take no more than this."""


@dataclass(frozen=True, slots=True)
class LogitMap:
    """What a model applies between its output embeddings and its logits: cap · tanh(scale · x / cap)."""

    scale: float = 1.0
    cap: float | None = None

    def __call__(self, logits: Tensor) -> Tensor:
        """Map raw logits of any shape and dtype, elementwise."""
        scaled = logits if self.scale == 1.0 else logits * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)

    def backward(self, grad: Tensor, mapped: Tensor) -> Tensor:
        """Gradient of the map's input, from the gradient of its output and the output itself."""
        if self.cap is not None:
            grad = grad * (1 - (mapped / self.cap) ** 2)
        return grad if self.scale == 1.0 else grad * self.scale


@dataclass(frozen=True, slots=True)
class Head:
    """The output embeddings of a model, and the map after them."""

    weight: Tensor
    """Shape (vocabulary, hidden)."""
    bias: Tensor | None
    """Shape (vocabulary,)."""
    logit_map: LogitMap

    def row_blocks(self, num_tokens: int) -> Iterator[slice]:
        """Slices of the positions."""
        return _slices(num_tokens, (CUDA_TILE if self.weight.is_cuda else CPU_TILE)[0])

    def vocabulary_tiles(self) -> Iterator[slice]:
        """Slices of the vocabulary."""
        return _slices(len(self.weight), (CUDA_TILE if self.weight.is_cuda else CPU_TILE)[1])

    def logits(self, hidden: Tensor, tile: slice) -> Tensor:
        """Logits of one tile: the product in the model's dtype, then float32. Shape (positions, vocabulary of the tile)."""
        bias = None if self.bias is None else self.bias[tile]
        return self.logit_map(torch.nn.functional.linear(hidden, self.weight[tile], bias).float())


def token_logps(
    hidden: Tensor, head: Head, targets: Tensor, *, collision: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Compute the log-prob of each target, and optionally log Σ_v p(v)² at its position.

    Args:
        hidden: shape (tokens, hidden): the state that predicts each target.
        head: the model's output embeddings.
        targets: shape (tokens,), int64.
        collision: also compute log Σ_v p(v)², the weight of WPO (Zhou et al. 2024, arXiv:2406.11827).

    Returns:
        Log-probs, shape (tokens,), float32, nats, differentiable in hidden states, weight and bias; and log Σ_v p(v)², shape
        (tokens,), float32, without gradient, or None.
    """
    is_frozen = not (head.weight.requires_grad or (head.bias is not None and head.bias.requires_grad))
    if is_frozen and hidden.requires_grad and torch.is_grad_enabled() and not collision:
        frozen: Tensor = _FrozenHeadLogps.apply(hidden, head.weight, head.bias, targets, head.logit_map)  # type: ignore[no-untyped-call]
        return frozen, None
    cache = _LogitCache.of(hidden, head.weight)
    logps, collisions = _TiledLogps.apply(hidden, head.weight, head.bias, targets, head.logit_map, collision, cache)  # type: ignore[no-untyped-call]
    return logps, collisions if collision else None


class _TiledLogps(torch.autograd.Function):
    """Log-probs with gradients to hidden states, weight and bias."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        logit_map: LogitMap,
        collision: bool,
        cache: "_LogitCache",
    ) -> tuple[Tensor, Tensor]:
        head = Head(weight, bias, logit_map)
        num_tokens = len(hidden)
        target_logits = hidden.new_empty(num_tokens, dtype=torch.float32)
        log_sums = hidden.new_empty(num_tokens, dtype=torch.float32)
        collisions = hidden.new_empty(num_tokens if collision else 0, dtype=torch.float32)
        for rows in head.row_blocks(num_tokens):
            log_sum = log_square_sum = None
            for tile in head.vocabulary_tiles():
                logits = head.logits(hidden[rows], tile)
                cache.put(rows, tile, logits)
                _gather_targets(logits, targets[rows], tile, target_logits[rows])
                log_sum = _online_logsumexp(log_sum, logits)
                if collision:
                    log_square_sum = _online_logsumexp(log_square_sum, 2 * logits)
            assert log_sum is not None
            log_sums[rows] = log_sum
            if log_square_sum is not None:
                collisions[rows] = log_square_sum - 2 * log_sum
        ctx.save_for_backward(hidden, weight, bias, targets, log_sums)
        ctx.logit_map, ctx.cache = logit_map, cache
        ctx.mark_non_differentiable(collisions)
        return target_logits - log_sums, collisions

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, log_sums = ctx.saved_tensors
        head = Head(weight, bias, ctx.logit_map)
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        # The vocabulary is the outer loop, so that each tile of the weight's gradient is accumulated in float32 and written
        # once; only the gradient of the hidden states needs a full float32 copy.
        hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if needs_hidden else None
        weight_grad = torch.empty_like(weight) if needs_weight else None
        bias_grad = torch.empty_like(bias) if needs_bias else None
        for tile in head.vocabulary_tiles():
            tile_weight_grad = torch.zeros_like(weight[tile], dtype=torch.float32) if needs_weight else None
            tile_bias_grad = torch.zeros_like(bias[tile], dtype=torch.float32) if needs_bias else None
            for rows in head.row_blocks(len(hidden)):
                logits = ctx.cache.take(rows, tile)
                if logits is None:
                    logits = head.logits(hidden[rows], tile)
                # d log p(t) / d logits = 1[t] - softmax. In place, unless the map's derivative needs the logits again.
                buffer = logits.clone() if ctx.logit_map.cap is not None else logits
                logits_grad = buffer.sub_(log_sums[rows, None]).exp_().mul_(-grad[rows, None])
                _add_at_targets(logits_grad, targets[rows], tile, grad[rows])
                logits_grad = ctx.logit_map.backward(logits_grad, logits)
                if tile_bias_grad is not None:
                    tile_bias_grad += logits_grad.sum(0)
                logits_grad = logits_grad.to(hidden.dtype)
                if hidden_grad is not None:
                    hidden_grad[rows] += logits_grad @ weight[tile]
                if tile_weight_grad is not None:
                    tile_weight_grad += logits_grad.T @ hidden[rows]
            if weight_grad is not None and tile_weight_grad is not None:
                weight_grad[tile] = tile_weight_grad
            if bias_grad is not None and tile_bias_grad is not None:
                bias_grad[tile] = tile_bias_grad
        in_dtype = None if hidden_grad is None else hidden_grad.to(hidden.dtype)
        return in_dtype, weight_grad, bias_grad, None, None, None, None


class _FrozenHeadLogps(torch.autograd.Function):
    """Log-probs with a gradient to the hidden states alone, computed in the forward pass up to the incoming factor.

    d log p(t) / dh = w_t - Σ_v p(v) w_v (each w_v times the derivative of the map). An online softmax accumulates the sum
    together with the log-sum-exp, so that the backward pass needs no logits: two matrix products instead of three.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, logit_map: LogitMap
    ) -> Tensor:
        head = Head(weight, bias, logit_map)
        target_logits = hidden.new_empty(len(hidden), dtype=torch.float32)
        log_sums = hidden.new_empty(len(hidden), dtype=torch.float32)
        slopes = torch.empty_like(hidden)
        for rows in head.row_blocks(len(hidden)):
            block = hidden[rows]
            maximum = block.new_full((len(block),), -torch.inf, dtype=torch.float32)
            total = torch.zeros_like(maximum)
            mean_weight = torch.zeros_like(block, dtype=torch.float32)
            for tile in head.vocabulary_tiles():
                logits = head.logits(block, tile)
                _gather_targets(logits, targets[rows], tile, target_logits[rows])
                before, maximum = maximum, torch.maximum(maximum, logits.amax(dim=-1))
                rescale = torch.exp(before - maximum)
                exponentials = torch.exp(logits - maximum[:, None])
                total = total * rescale + exponentials.sum(dim=-1)
                weights = logit_map.backward(exponentials, logits).to(hidden.dtype)
                mean_weight = mean_weight.mul_(rescale[:, None]).add_(weights @ weight[tile])
            log_sums[rows] = maximum + torch.log(total)
            at_target = logit_map.backward(torch.ones_like(total), target_logits[rows])
            target_weight = weight[targets[rows]].float() * at_target[:, None]
            slopes[rows] = (target_weight - mean_weight / total[:, None]).to(hidden.dtype)
        ctx.save_for_backward(slopes)
        return target_logits - log_sums

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (slopes,) = ctx.saved_tensors
        return (slopes * grad[:, None]).to(slopes.dtype), None, None, None, None


class _LogitCache:
    """Logits of one forward pass, kept for its backward pass if they are few: recomputing them is one product of four."""

    def __init__(self, is_used: bool) -> None:
        self._tiles: dict[tuple[int, int], Tensor] | None = {} if is_used else None

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> "_LogitCache":
        size = 4 * len(hidden) * len(weight)
        return cls(torch.is_grad_enabled() and not weight.is_cuda and size <= CPU_CACHED_BYTES)

    def put(self, rows: slice, tile: slice, logits: Tensor) -> None:
        if self._tiles is not None:
            self._tiles[rows.start, tile.start] = logits

    def take(self, rows: slice, tile: slice) -> Tensor | None:
        """Once; None if it was not kept, or already taken by an earlier backward pass of a retained graph."""
        return self._tiles.pop((rows.start, tile.start), None) if self._tiles else None


def _slices(length: int, step: int) -> Iterator[slice]:
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def _online_logsumexp(log_sum: Tensor | None, logits: Tensor) -> Tensor:
    """Log-sum-exp of the tiles so far and one more. Shape (positions,)."""
    of_tile = torch.logsumexp(logits, dim=-1)
    return of_tile if log_sum is None else torch.logaddexp(log_sum, of_tile)


def _in_tile(targets: Tensor, tile: slice) -> tuple[Tensor, Tensor]:
    """Mask of the targets in a tile, and their indices in it (0 elsewhere, so that nothing depends on the data's shape)."""
    inside = (targets >= tile.start) & (targets < tile.stop)
    return inside, torch.where(inside, targets - tile.start, 0)[:, None]


def _gather_targets(logits: Tensor, targets: Tensor, tile: slice, out: Tensor) -> None:
    """Write the logits of the targets in this tile to `out`."""
    inside, index = _in_tile(targets, tile)
    torch.where(inside, logits.gather(-1, index)[:, 0], out, out=out)


def _add_at_targets(logits_grad: Tensor, targets: Tensor, tile: slice, grad: Tensor) -> None:
    inside, index = _in_tile(targets, tile)
    logits_grad.scatter_add_(-1, index, torch.where(inside, grad, 0.0)[:, None])
