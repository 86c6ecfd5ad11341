"""Tokens, seconds and model FLOP utilization (MFU) of scoring."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dpocli.scoring.layout import TokenCounter
from dpocli.scoring.scorer import PairScorer

PROBE_SECONDS = 0.2


class Throughput:
    """Count the tokens of a scorer's passes, and the time that they take.

    Args:
        scorer: whose passes are counted while the clock runs.
        backward: whether the time includes the backward pass; then only passes with gradient count.
    """

    def __init__(self, scorer: PairScorer, *, backward: bool = False) -> None:
        self._scorer = scorer
        self._backward = backward
        self._trains_all = all(parameter.requires_grad for parameter in scorer.parameters())
        self._seconds = 0.0
        self._tally = TokenCounter(with_gradient_only=backward)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Measure a block of work that ends with its results on the CPU."""
        start = time.perf_counter()
        self._scorer.tally = self._tally
        try:
            yield
        finally:
            self._scorer.tally = TokenCounter()
            self._seconds += time.perf_counter() - start

    @property
    def num_splits(self) -> int:
        """Passes that ran out of memory and were split in two."""
        return self._tally.splits

    def summary(self) -> dict[str, Any]:
        """Layout, attention, tokens and seconds of this process, for `summary.json`."""
        tally = self._tally
        facts: dict[str, Any] = dict(self._scorer.layout_info)
        if not tally.unique or not self._seconds:
            return facts
        return facts | {
            "tokens_computed": tally.computed,
            "tokens_unique": tally.unique,
            "tokens_scored": tally.scored,
            "padding_share": round(tally.padding / tally.computed, 4),
            "passes_split": tally.splits,
            "seconds": round(self._seconds, 3),
            "unique_tokens_per_second": round(tally.unique / self._seconds, 1),
        }

    def share_of_the_rate(self, seconds: float) -> float | None:
        """MFU: `flops` per second, as a share of the measured rate of matrix products; None before any pass.

        Args:
            seconds: that the passes took.
        """
        if not self._tally.unique or not seconds:
            return None
        try:
            return self.flops() / (self._rate * seconds)
        except Exception:  # a configuration without the usual names; a figure never ends the work it describes
            return None

    @cached_property
    def _rate(self) -> float:
        return matmul_rate(self._scorer)

    def flops(self) -> float:
        """Model FLOPs of the counted passes (a multiplication and an addition are two): a lower bound for any method.

        Each distinct token goes through the layers once, and through the head once if it is scored. Attention counts as full
        causal attention, which is slightly too high for layers with a window.
        """
        tally, model = self._tally, self._scorer.model
        config = model.config.get_text_config()
        head = model.get_output_embeddings()
        per_scored = int(head.weight.numel()) if isinstance(head, nn.Linear) else 0
        heads: int = getattr(config, "num_attention_heads", 0)
        width: int = heads * (getattr(config, "head_dim", None) or config.hidden_size // max(heads, 1))
        by_weights: float = 2.0 * self._weights_per_token * tally.unique + 2.0 * per_scored * tally.scored
        attention: float = 4.0 * config.num_hidden_layers * width * tally.attended
        if not self._backward:
            return by_weights + attention
        # The backward pass has two products for each of the forward pass; a frozen weight needs no gradient of its own.
        return by_weights * (3 if self._trains_all else 2) + attention * 3

    @cached_property
    def _weights_per_token(self) -> float:
        """Weights that multiply each token between embeddings and head; of experts, those that a token is routed to."""
        model = self._scorer.model
        config = model.config.get_text_config()
        outside = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
        experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
        used = getattr(config, "num_experts_per_tok", None)
        total = 0.0
        for name, parameter in self._scorer.named_parameters():
            if parameter.dim() >= 2 and id(parameter) not in outside:
                total += parameter.numel() * (used / experts if used and experts and ".experts" in name else 1.0)
        return total


def matmul_rate(scorer: PairScorer) -> float:
    """Measure the FLOPs per second of a large matrix product, in the dtype of the scorer's forward pass."""
    device = scorer.device
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(scorer.compute_dtype) for _ in range(2))
    fastest, deadline = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < deadline or fastest == float("inf"):
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest
