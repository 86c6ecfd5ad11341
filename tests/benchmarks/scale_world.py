"""A reference, a policy, rows and a finished cache of them, all random: what the benchmark of scale measures.

The cache is the one that `dpocli precompute` would go on with: its fingerprint names this reference and these rows. Its
tokens and log-probs are drawn instead of computed.
"""

import json
import shutil
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from environments import ROOT
from numpy.typing import NDArray

from dpocli.config.flags import build_options
from dpocli.data.pair_tokens import pair_id
from dpocli.data.preference import EncodedPair, ReferenceLogps

TOKENIZER = ROOT / "sample_data" / "tiny-model"
VOCABULARY = 49_152
MAX_LENGTH = 2048
MEAN_TOKENS = (150, 250, 250)
"""Of prompt, chosen and rejected, as in UltraFeedback."""
SPREAD = 0.7
"""Standard deviation of the logarithm of a length."""

SCATTER = np.uint64(0x9E3779B97F4A7C15)
"""Lays small numbers over all of 64 bits, as hashes lie: `--eval-fraction` goes by their size."""


@dataclass(frozen=True, slots=True)
class World:
    """Where everything lies, and how much of it there is."""

    root: Path
    pairs: int
    repeated: float
    """Share of the pairs whose prompt others have too."""
    rows_per_part: int

    @property
    def reference(self) -> Path:
        return self.root / "reference"

    @property
    def policy(self) -> Path:
        return self.root / "policy"

    @property
    def data(self) -> Path:
        return self.root / f"{self.pairs}.jsonl"

    @property
    def cache(self) -> Path:
        return self.root / f"cache-{self.pairs}-{self.rows_per_part}"

    @property
    def num_parts(self) -> int:
        return -(-self.pairs // self.rows_per_part)

    @property
    def cache_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.cache.glob("rows-*"))

    def precompute_line(self) -> list[str]:
        """Makes the cache; on the finished one there is nothing to do."""
        given = {"model": self.reference, "data": self.data, "out": self.cache, "rows-per-part": self.rows_per_part}
        return ["precompute", *(f"--{name}={value}" for name, value in given.items()), "--dtype=float32"]

    def make(self, processes: int) -> None:
        """Makes what is not there yet."""
        for seed, directory in enumerate((self.reference, self.policy)):
            if not directory.exists():
                _save_model(directory, seed)
        if not self.data.exists():
            _write_rows(self.data, self.pairs)
        with ProcessPoolExecutor(processes) as pool:
            for share in [pool.submit(write_share, self, index, processes) for index in range(processes)]:
                share.result()


def write_share(world: World, index: int, count: int) -> None:
    """The tiles that one of several processes writes."""
    from dpocli.commands.precompute import Job
    from dpocli.config.commands import PrecomputeOptions
    from dpocli.console.console import Console

    options = build_options(
        PrecomputeOptions,
        model=str(world.reference),
        data=[str(world.data)],
        out=world.cache,
        rows_per_part=world.rows_per_part,
        dtype="float32",
    )
    writer = Job.of(options, Console()).writer()
    writer.check()
    for tile in writer.missing(index, count):
        writer.write(tile, random_pairs(tile.start, tile.stop, world))


def random_pairs(start: int, stop: int, world: World) -> list[EncodedPair]:
    generator = np.random.default_rng([start, world.pairs])
    count = stop - start
    lengths = [random_lengths(generator, mean, count) for mean in MEAN_TOKENS]
    tokens = [_split(generator.integers(4, VOCABULARY, each.sum(), dtype=np.int32), each) for each in lengths]
    logps = [_split(-generator.exponential(2.0, each.sum()).astype(np.float32), each) for each in lengths[1:]]
    hashes = generator.integers(0, 2**64, count, dtype=np.uint64)
    shared = generator.random(count) < world.repeated
    # Two pairs have each of these prompts, on average, wherever in the data they stand.
    num_shared = max(int(world.pairs * world.repeated / 2), 1)
    hashes[shared] = generator.integers(0, num_shared, int(shared.sum()), dtype=np.uint64) * SCATTER
    return [
        EncodedPair(
            row=row,
            pair_id=pair_id(prompt, chosen, rejected),
            prompt_ids=prompt,
            chosen_ids=chosen,
            rejected_ids=rejected,
            source=f"source {row % 7}",
            prompt_hash=int(prompt_hash),
            reference=ReferenceLogps(*references),
        )
        for row, prompt, chosen, rejected, prompt_hash, *references in zip(
            range(start, stop), *tokens, hashes, *logps, strict=True
        )
    ]


def random_lengths(generator: np.random.Generator, mean: int, count: int) -> NDArray[np.int64]:
    drawn = generator.lognormal(np.log(mean) - SPREAD**2 / 2, SPREAD, count)
    return np.clip(drawn, 4, MAX_LENGTH // 2).astype(np.int64)


def _split(values: Any, lengths: Any) -> list[Any]:
    return np.split(values, np.cumsum(lengths)[:-1])


def _write_rows(path: Path, count: int) -> None:
    """About as many characters as the tokens stand for; nobody encodes them."""
    generator = np.random.default_rng(count)
    words = "".join(generator.choice([*"etaoin shrdlu "], 1 << 16).tolist())
    lengths = [(4 * random_lengths(generator, mean, count)).tolist() for mean in MEAN_TOKENS]
    starts = generator.integers(0, len(words) - 4 * MAX_LENGTH, count).tolist()
    with path.open("w") as file:
        for start, *sides in zip(starts, *lengths, strict=True):
            texts: Sequence[str] = [words[start + 11 * place :][:length] for place, length in enumerate(sides)]
            file.write(json.dumps(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True))) + "\n")


def _save_model(directory: Path, seed: int) -> None:
    """As small as a model can be that has a row for every token, so that what is measured is not its arithmetic."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=3,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    for path in (*TOKENIZER.glob("tokenizer*"), *TOKENIZER.glob("chat_template*")):
        shutil.copy(path, directory)
