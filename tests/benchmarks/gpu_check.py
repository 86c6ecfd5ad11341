"""The three commands on one GPU, in bfloat16, with a model of about 1B parameters (random weights).

    python tests/benchmarks/gpu_check.py WORK_DIRECTORY

Shows what a CPU cannot: that FlexAttention is chosen and exact (`scoring` in the results: layout, attention, tokens per
second), that the step-0 check holds in bfloat16 on CUDA, and the time of the commands there (`model_flop_utilisation` in
train's results). `--scoring packed` and `padded` are run beside the default. The pairs are the sample data's, repeated
into conversations of a few hundred tokens; their text does not affect the figures.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SAMPLE = Path(__file__).parents[2] / "sample_data"
SHAPE = {  # Llama 3.2 1B
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128_256,
    "tie_word_embeddings": True,
    "max_position_embeddings": 4096,
}
NUM_PAIRS = 256


def main(work: Path) -> None:
    model, pairs = work / "model", work / "pairs.jsonl"
    if not model.exists():
        make_model(model)
    make_pairs(pairs)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    # The compiler's first time is not what is measured.
    timed("precompute", "--model", model, "--data", pairs, "--out", work / "warm-up", "--limit", 32, "--json")
    timed("precompute", "--model", model, "--data", pairs, "--out", work / "ref", "--json")
    for way in ("packed", "padded"):
        timed("precompute", "--model", model, "--data", pairs, "--out", work / f"ref-{way}", "--scoring", way, "--json")
    reference = ("--reference", work / "ref")
    timed("train", "--model", model, *reference, "--out", work / "run", "--batch-size", 32, "--max-steps", 8,
          "--save-every", 100, "--json")  # fmt: skip
    timed("train", "--model", model, *reference, "--out", work / "run-lora", "--batch-size", 32, "--max-steps", 8,
          "--save-every", 100, "--lora-rank", 16, "--json")  # fmt: skip
    timed("evaluate", "--model", work / "run" / "model", *reference, "--out", work / "report", "--json")


def make_model(directory: Path) -> None:
    """Random weights in bfloat16, beside the tokenizer of the tiny model."""
    torch.manual_seed(0)
    with torch.device("cuda"):
        LlamaForCausalLM(LlamaConfig(**SHAPE)).bfloat16().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SAMPLE / "tiny-model" / name, directory)


def make_pairs(path: Path) -> None:
    """Longer pairs out of the sample: six answers in a row on each side."""
    rows = [json.loads(line) for line in (SAMPLE / "train.jsonl").read_text().splitlines()]
    answers = [(text(row["chosen"]), text(row["rejected"])) for row in rows]
    with path.open("w") as file:
        for index in range(NUM_PAIRS):
            sides = zip(*(answers[(6 * index + turn) % len(answers)] for turn in range(6)), strict=True)
            chosen, rejected = (" ".join(side) for side in sides)
            prompt = f"Pair {index}. " + " ".join(answers[(index + 7) % len(answers)])
            file.write(json.dumps({"prompt": messages("user", prompt), "chosen": messages("assistant", chosen),
                                   "rejected": messages("assistant", rejected)}) + "\n")  # fmt: skip


def text(side: Any) -> str:
    """The last thing said in a side, whatever its form."""
    last = side[-1] if isinstance(side, list) else side
    return last if isinstance(last, str) else str(last.get("content", last.get("value")))


def messages(role: str, content: str) -> list[dict[str, str]]:
    return [{"role": role, "content": content}]


def timed(*arguments: object) -> None:
    """Runs a command, and shows its plan, its step-0 check, its last lines and its whole-process time."""
    started = time.monotonic()
    command = [sys.executable, "-m", "dpocli", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(f"\n$ dpocli {arguments[0]}: exit {done.returncode} after {time.monotonic() - started:.1f} s")
    print("\n".join(done.stderr.splitlines()[-25:]))
    if done.returncode == 0:
        result = json.loads(done.stdout)
        print(
            {
                key: result[key]
                for key in ("pairs", "tokens", "metrics", "rewards/accuracies", "loss", "scoring")
                if key in result
            }
        )


if __name__ == "__main__":
    main(Path(sys.argv[1]))
