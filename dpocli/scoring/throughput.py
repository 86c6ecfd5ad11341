"""What scoring took, beside what it had to take: tokens, seconds, and the share of the FLOP floor."""

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
    """Measures the scoring of one command.

    The floor is the time that the multiplications which no method can leave out would take at the rate of a large
    matrix product on this device: every distinct token once through the layers, and once through the head if it is scored.
    Attention is counted in full, so that where layers have a window the floor is a little too high.

    Args:
        scorer: whose passes are counted.
        backward: whether the time includes the backward pass, which takes twice the forward pass.
    """

    def __init__(self, scorer: PairScorer, *, backward: bool = False) -> None:
        self._scorer = scorer
        self._backward = backward
        self._trains_all = all(parameter.requires_grad for parameter in scorer.parameters())
        self._seconds = 0.0
        self._tally = TokenCounter(with_gradient_only=backward)

    @contextmanager
    def clock(self) -> Iterator[None]:
        """Around work that ends with its results on the CPU."""
        start = time.perf_counter()
        self._scorer.tally = self._tally
        try:
            yield
        finally:
            self._scorer.tally = TokenCounter()
            self._seconds += time.perf_counter() - start

    @property
    def num_splits(self) -> int:
        """Passes that were made in two for lack of memory."""
        return self._tally.splits

    def summary(self) -> dict[str, Any]:
        """For `summary.json`; figures are those of this process."""
        tally = self._tally
        facts: dict[str, Any] = dict(self._scorer.way)
        if not tally.unique or not self._seconds:
            return facts
        floor = self.flops() / self._rate
        return facts | {
            "tokens_computed": tally.computed,
            "tokens_unique": tally.unique,
            "tokens_scored": tally.scored,
            "padding_share": round(tally.padding / tally.computed, 4),
            "passes_split": tally.splits,
            "seconds": round(self._seconds, 3),
            "unique_tokens_per_second": round(tally.unique / self._seconds, 1),
            "fraction_of_flop_floor": round(floor / self._seconds, 3),
        }

    def share_of_the_rate(self, seconds: float) -> float | None:
        """Model FLOP utilisation: the floor's operations in `seconds`, as a share of what matrix products reach here.

        The rate is measured and not taken from a data sheet; None where nothing was done yet.
        """
        return self.flops() / (self._rate * seconds) if self._tally.unique and seconds else None

    @cached_property
    def _rate(self) -> float:
        """Floating-point operations a second. Measured once, when it is first asked for."""
        return matmul_rate(self._scorer)

    @cached_property
    def _weights_per_token(self) -> float:
        return _active_weights(self._scorer)

    def flops(self) -> float:
        """The floor in floating-point operations, a multiplication and an addition being two."""
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
        # A frozen weight passes gradients on and takes none itself.
        return by_weights * (3 if self._trains_all else 2) + attention * 3


def _active_weights(scorer: PairScorer) -> float:
    """Weights that multiply each token between embeddings and head: of experts, those that a token is routed to."""
    config = scorer.model.config.get_text_config()
    outside = {
        id(module.weight) for module in (scorer.model.get_input_embeddings(), scorer.model.get_output_embeddings())
    }
    experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    used = getattr(config, "num_experts_per_tok", None)
    total = 0.0
    for name, parameter in scorer.model.named_parameters():
        if parameter.dim() < 2 or id(parameter) in outside:
            continue
        share = used / experts if used and experts and ".experts" in name else 1.0
        total += parameter.numel() * share
    return total


def matmul_rate(scorer: PairScorer) -> float:
    """Floating-point operations a second of a large matrix product, in the dtype of the forward pass."""
    device = scorer.device
    size = 4096 if device.type == "cuda" else 1024
    left, right = (torch.randn(size, size, device=device).to(scorer.compute_dtype) for _ in range(2))
    fastest, deadline = float("inf"), time.perf_counter() + PROBE_SECONDS
    while time.perf_counter() < deadline or fastest == float("inf"):
        start = time.perf_counter()
        left @ right
        _wait(device)
        fastest = min(fastest, time.perf_counter() - start)
    return 2.0 * size**3 / fastest


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
