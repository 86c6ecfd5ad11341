"""The data sets of the speed benchmark, as token ids: real preference pairs, and prompt-heavy ones made from them.

`dpocli precompute` encodes the rows, with a model of no size in the place of the reference, so that both contenders get
the ids that users of dpocli get, and a cache lies ready to be read from.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from measuring import Pair, save_pairs, save_random_model
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from dpocli.cache.reader import PairStore

MAX_LENGTH = 1024
"""Of prompt + the longer side: TRL's default, beyond which it would cut."""
PROMPT_PER_SIDE = 4
"""Tokens of a prompt-heavy prompt for each token of its longer side."""
SHORTEST_SIDE = 8
LONGEST_PROMPT = MAX_LENGTH * PROMPT_PER_SIDE // (PROMPT_PER_SIDE + 1)


def make(data: Path, tokenizer: Path, count: int, out: Path) -> None:
    """Writes `demo.json`, `prompt-heavy.json`, each of `count` pairs, `cache`, and the random model, `25m`.

    Args:
        data: preference rows.
        tokenizer: a directory that holds one.
        count: pairs of each data set.
        out: directory to write to.
    """
    save_random_model(out / "25m")
    cache = out / "cache"
    # More rows than pairs, since some give no pair.
    _encode(data, _tiny_model(tokenizer, out / "tiny"), 2 * count, cache)
    store = PairStore.open(cache)
    demo = [Pair(*(ids.tolist() for ids in pair.all_ids)) for pair in store.load(range(len(store)))]
    for name, pairs in (("demo", demo), ("prompt-heavy", list(prompt_heavy(demo)))):
        if len(pairs) < count:
            sys.exit(f"{data} gives {len(pairs)} pairs for the data set {name}, and {count} are wanted.")
        save_pairs(pairs[:count], out / f"{name}.json")


def prompt_heavy(pairs: Sequence[Pair]) -> Iterator[Pair]:
    """Each pair behind the prompts of the pairs next to it, as many as it takes; where that is not enough, its sides are
    cut."""
    for index, pair in enumerate(pairs):
        wanted = PROMPT_PER_SIDE * max(len(pair.chosen_ids), len(pair.rejected_ids))
        prompt = pair.prompt_ids
        for other in (*pairs[index + 1 :], *pairs[:index]):
            if len(prompt) >= wanted:
                break
            prompt = other.prompt_ids + prompt
        prompt = prompt[-LONGEST_PROMPT:]
        longest = len(prompt) // PROMPT_PER_SIDE
        chosen, rejected = pair.chosen_ids[:longest], pair.rejected_ids[:longest]
        if min(len(chosen), len(rejected)) >= SHORTEST_SIDE and chosen != rejected:
            yield Pair(prompt, chosen, rejected)


def _tiny_model(tokenizer_directory: Path, out: Path) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_directory)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def _encode(data: Path, model: Path, limit: int, cache: Path) -> None:
    options = {"model": model, "data": data, "out": cache, "limit": limit, "max-length": MAX_LENGTH, "device": "cpu"}
    flags = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    done = subprocess.run(
        [sys.executable, "-m", "dpocli", "precompute", *flags], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"dpocli precompute: exit status {done.returncode}\n{done.stderr[-4000:]}")
