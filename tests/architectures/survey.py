"""What dpocli's numbers are worth, architecture by architecture: `python -m tests.architectures.survey OUT [NAME ...]`.

For each tiny model, in float32 and bfloat16, the cached log-probs are compared with an oracle that shares no code with dpocli:
transformers in float64, one sequence a pass, full logits, no padding. A line says how the pairs were scored, the largest mean
difference of a region (first 8 tokens of a side, last 8, the rest; chosen and rejected apart), what a plain pass in the same
dtype is off by there, the loss of the first training step (ln 2 where the policy is the reference), and whether the saved
model loads in plain transformers with the source's dtype. OUT/survey.jsonl holds all of it.
"""

import json
import random
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from numpy.typing import NDArray
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpocli.cli import run_command_line
from tests.architectures.configurations import ARCHITECTURES
from tests.architectures.models import SAMPLE_MODEL, save

EDGE = 8
"""Tokens of a side's first and last region."""
NUM_PAIRS = 20


@dataclass
class Line:
    """What was found for one architecture and dtype."""

    name: str
    dtype: str
    way: str = ""
    region: str = ""
    """The region with the largest mean difference."""
    difference: float = float("nan")
    """Nats per token between the cache and the oracle in that region."""
    plain: float = float("nan")
    """The same of a plain pass in the cache's dtype."""
    largest: float = float("nan")
    """Of a single token, in nats."""
    signed: float = float("nan")
    """Largest signed mean of a region, in nats."""
    first_loss: float = float("nan")
    saved: str = ""
    error: str = ""


def rows() -> list[dict[str, str]]:
    """Text pairs of 10 to about 250 tokens; some prompts are shared by two pairs, some answers are very short."""
    draw = random.Random(5)
    words = (SAMPLE_MODEL.parent / "text.jsonl").read_text(encoding="utf-8").replace('"', " ").split()
    prompts = [" ".join(draw.choices(words, k=draw.choice([4, 12, 30, 70]))) for _ in range(NUM_PAIRS // 2)]
    return [
        {
            "prompt": prompts[index // 2] + " ",
            "chosen": " ".join(draw.choices(words, k=draw.choice([2, 9, 25, 50]))),
            "rejected": " ".join(draw.choices(words, k=draw.choice([2, 9, 25, 50]))),
        }
        for index in range(NUM_PAIRS)
    ]


def answer_logps(model: PreTrainedModel, prompt: Sequence[int], answer: Sequence[int]) -> NDArray[np.float64]:
    """Log-probs of the answer's tokens, shape (tokens,), by one plain pass over one sequence."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1]
    logps = torch.log_softmax(logits.double() if logits.dtype == torch.float64 else logits.float(), dim=-1)
    found: NDArray[np.float64] = logps.gather(1, torch.tensor(answer)[:, None])[:, 0].double().numpy()
    return found


def regions(values: NDArray[np.float64]) -> Iterator[tuple[str, NDArray[np.float64]]]:
    """First, last and other tokens of a side."""
    yield "first", values[:EDGE]
    if len(values) > EDGE:
        yield "last", values[-EDGE:]
    if len(values) > 2 * EDGE:
        yield "rest", values[EDGE:-EDGE]


def command(*arguments: object) -> tuple[int, str]:
    """Run dpocli in this process; its exit code and what it says."""
    said = StringIO()
    with redirect_stderr(said), redirect_stdout(said):
        code = run_command_line([str(argument) for argument in arguments])
    return int(code), said.getvalue()


def survey(name: str, dtype: str, work: Path) -> Line:
    """Everything about one model."""
    line = Line(name, dtype)
    shutil.rmtree(work, ignore_errors=True)
    model, cache, run = work / "model", work / "cache", work / "run"
    try:
        save(name, model, getattr(torch, dtype))
    except Exception as error:
        line.error = f"not built: {type(error).__name__}"
        return line
    data = work / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows()))
    code, said = command("precompute", "--model", model, "--data", data, "--out", cache, "--dtype", dtype)
    if code:
        line.error = f"precompute: exit {code}: {_last_line(said)}"
        return line
    _judge_cache(line, model, cache, dtype)
    line.way = _way(cache)
    code, said = command(
        *("train", "--model", model, "--reference", cache, "--out", run, "--max-steps", 1, "--batch-size", NUM_PAIRS),
        *("--learning-rate", "1e-9"),
    )
    if code:
        line.error = f"train: exit {code}: {_last_line(said)}"
        return line
    line.first_loss = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])["loss"]
    line.saved = _judge_saved(model, run / "model", cache)
    return line


def _judge_cache(line: Line, model: Path, cache: Path, dtype: str) -> None:
    exact = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64).eval()
    plain = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype)).eval()
    ours: dict[str, list[NDArray[np.float64]]] = {}
    theirs: dict[str, list[NDArray[np.float64]]] = {}
    for pair in _pairs(cache):
        for side in ("chosen", "rejected"):
            oracle = answer_logps(exact, pair["prompt_ids"], pair[f"{side}_ids"])
            cached = np.array(pair[f"ref_{side}_token_logps"], dtype=np.float64)
            same_dtype = answer_logps(plain, pair["prompt_ids"], pair[f"{side}_ids"])
            for region, values in regions(cached - oracle):
                ours.setdefault(f"{side} {region}", []).append(values)
            for region, values in regions(same_dtype - oracle):
                theirs.setdefault(f"{side} {region}", []).append(values)
    means = {region: float(np.abs(np.concatenate(values)).mean()) for region, values in ours.items()}
    excess = {region: mean - float(np.abs(np.concatenate(theirs[region])).mean()) for region, mean in means.items()}
    line.region = max(excess, key=excess.__getitem__)
    line.difference = means[line.region]
    line.plain = line.difference - excess[line.region]
    line.largest = max(float(np.abs(np.concatenate(values)).max()) for values in ours.values())
    line.signed = max((float(np.concatenate(values).mean()) for values in ours.values()), key=abs)


def _judge_saved(source: Path, saved: Path, cache: Path) -> str:
    """What plain transformers finds in a saved model that differs from its source."""
    problems = []
    wanted, found = (AutoConfig.from_pretrained(path).dtype for path in (source, saved))
    before, after = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, saved))
    if wanted != found or before.dtype != after.dtype:
        problems.append(f"dtype {found} ({after.dtype}), source {wanted} ({before.dtype})")
    if before.state_dict().keys() != after.state_dict().keys():
        problems.append("names of tensors")
    pair = _pairs(cache)[0]
    one, other = (answer_logps(model.float(), pair["prompt_ids"], pair["chosen_ids"]) for model in (before, after))
    if (off := float(np.abs(one - other).max())) > 1e-3:
        problems.append(f"log-probs off by {off:.3f}")
    return "; ".join(problems) or "same"


def _pairs(cache: Path) -> list[dict[str, list[int]]]:
    found: list[dict[str, list[int]]] = pq.ParquetDataset(sorted(cache.glob("rows-*.parquet"))).read().to_pylist()
    return found


def _way(cache: Path) -> str:
    footer = json.loads(pq.ParquetFile(next(cache.glob("rows-*.parquet"))).metadata.metadata[b"dpocli"])
    information = footer["fingerprint"]["information"]
    return f"{information.get('scoring')}/{information.get('attention')}"


def _last_line(text: str) -> str:
    lines = [line for line in text.splitlines() if line.startswith("error")] or text.splitlines() or [""]
    return lines[-1][:300]


def main(out: Path, names: Sequence[str]) -> None:
    """Survey the named models, or all, and print a line each."""
    out.mkdir(parents=True, exist_ok=True)
    AutoTokenizer.from_pretrained(SAMPLE_MODEL)
    with (out / "survey.jsonl").open("a", encoding="utf-8") as file:
        for name in names or ARCHITECTURES:
            for dtype in ("float32", "bfloat16"):
                try:
                    line = survey(name, dtype, out / "work")
                except Exception as error:
                    line = Line(name, dtype, error=f"{type(error).__name__}: {str(error)[:200]}")
                file.write(json.dumps(asdict(line)) + "\n")
                file.flush()
                print(
                    f"{name:18} {dtype:8} {line.way:22} {line.region:15} {line.difference:9.2e} plain {line.plain:9.2e} "
                    f"max {line.largest:8.1e} signed {line.signed:+8.1e} loss {line.first_loss:8.6f} {line.saved} {line.error}",
                    flush=True,
                )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
