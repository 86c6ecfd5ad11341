"""What a measuring process needs whichever tool it measures: model, pairs, peak memory, clock, what it says at its end.

It imports neither dpocli nor TRL, so that it runs in either environment. Both build the same random model and the same
random pairs from the seed.
"""

import ctypes
import gc
import json
import math
import re
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

VOCABULARY = 49_152
BETA = 0.1
SEED = 0
PACKAGES = ("torch", "transformers", "accelerate", "trl", "dpocli")

Sides = tuple[list[float], list[float]]
"""Log-probs of every token of the chosen and of the rejected side, nats."""


@dataclass(frozen=True)
class Pair:
    """Tokens, and the reference's log-probs where the pair is to be trained on."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    reference: Sides | None = None

    @property
    def num_tokens(self) -> int:
        """Distinct ones: the prompt once."""
        return len(self.prompt_ids) + len(self.chosen_ids) + len(self.rejected_ids)

    @property
    def reference_sums(self) -> tuple[float, float]:
        """Nats."""
        assert self.reference is not None
        chosen, rejected = self.reference
        return math.fsum(chosen), math.fsum(rejected)


@dataclass(frozen=True)
class Outcome:
    """What one process measured and computed."""

    before: int
    """Resident bytes just before the measured part."""
    peak: int
    """Largest number of resident bytes during it."""
    seconds: float = 0.0
    """Of the measured part."""
    sums: list[list[float]] = field(default_factory=list)
    """Scoring: per pair, summed log-probs of the chosen and of the rejected side."""
    logps: list[Sides] = field(default_factory=list)
    """Scoring: per pair, those of every token, where the tool shows them."""
    loss: float | None = None
    grad_norm: float | None = None
    """Training step: the batch's DPO loss, and the norm of its gradient."""
    floor_flops: float | None = None
    """Floating-point operations that no method can leave out, where the tool counts them."""
    flops_per_second: float | None = None
    """Of a large matrix product, measured just after the measured part."""
    cache_seconds: float | None = None
    """To read the batch from the reference cache, all bytes verified."""

    def print(self) -> None:
        """As the last line of stdout, for the process that started this one."""
        print(json.dumps(asdict(self) | {"versions": versions()}))


class PeakMemory:
    """Resident memory of this process while the block runs, from the kernel's own high-water mark (Linux).

    The mark (VmHWM) is set back at the start, so that what loading the model took does not count.
    """

    before = peak = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        self.before = _status_bytes("VmRSS")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.peak = _status_bytes("VmHWM")


def _status_bytes(name: str) -> int:
    found = re.search(rf"^{name}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


class Stopwatch:
    """Seconds from the start to the last lap."""

    def __init__(self) -> None:
        self.started = self.last = time.perf_counter()

    def lap(self) -> None:
        self.last = time.perf_counter()

    @property
    def seconds(self) -> float:
        return self.last - self.started


def save_random_model(directory: Path) -> Path:
    """A Llama of 25 million parameters with tied embeddings, float32, its log-probs far from uniform."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=384,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).float().save_pretrained(directory)
    return directory


def random_pairs(count: int, shortest: int, longest: int, seed: int) -> list[Pair]:
    """Pairs whose prompt and sides have from `shortest` to `longest` tokens each; the reference is uniform."""
    generator = np.random.default_rng(seed)

    def pair(lengths: Sequence[int]) -> Pair:
        prompt, chosen, rejected = (generator.integers(3, VOCABULARY, size=length).tolist() for length in lengths)
        return Pair(prompt, chosen, rejected, (_uniform(chosen), _uniform(rejected)))

    return [pair(lengths) for lengths in generator.integers(shortest, longest + 1, size=(count, 3))]


def _uniform(ids: list[int]) -> list[float]:
    return [-math.log(VOCABULARY)] * len(ids)


def save_pairs(pairs: Iterable[Pair], path: Path) -> None:
    path.write_text(json.dumps([asdict(pair) for pair in pairs]))


def load_pairs(path: Path) -> list[Pair]:
    return [Pair(**fields) for fields in json.loads(path.read_text())]


def warm_up_pairs() -> list[Pair]:
    """So small that they leave no trace, they pay for everything that is made once: threads, late imports, buffers."""
    return random_pairs(1, 4, 8, SEED + 1)


def grad_norm(parameters: Iterable[nn.Parameter]) -> float:
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    whole: list[Tensor] = [grad.full_tensor() if hasattr(grad, "full_tensor") else grad for grad in grads]
    return float(torch.stack([grad.double().square().sum() for grad in whole]).sum().sqrt())


def versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found | {"python": sys.version.split()[0], "threads": str(torch.get_num_threads())}
