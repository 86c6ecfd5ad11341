"""What `outputs` runs: command lines in the order of their dependence, and bad input with the broken files it needs.

Paths are relative to the working directory of the recording. `MODEL` and `sample_data/` are copies made there.
"""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from tests.commands.bad_files import BAD_FILES

MODEL = "sample_data/tiny-model"
TRAIN = "sample_data/train.jsonl"
HELD_OUT = "sample_data/heldout.jsonl"


@dataclass(frozen=True)
class Case:
    """A command line of dpocli."""

    name: str
    line: str
    processes: int = 1
    stop_file: Path | None = None
    """Made before the run, with a time in the future, and removed after it: the run stops after one step."""


PRECOMPUTE = f"precompute --model {MODEL}"
REF = f"{PRECOMPUTE} --data {TRAIN} --limit 96 --rows-per-part 32 --out ref"
SHARDS = f"{PRECOMPUTE} --data {TRAIN} --limit 64 --rows-per-part 16 --out shards"
TRAINING = f"train --model {MODEL} --batch-size 8 --learning-rate 5e-4"
DPO = f"{TRAINING} --reference ref --eval-fraction 0.25 --max-steps 12 --save-every 4 --eval-every 4 --out run-dpo"
STOPPED = (
    f"{TRAINING} --reference ref --eval-fraction 0.25 --max-steps 12 --save-every 4 --eval-every 4 --out run-stopped"
)
SIMPO = f"{TRAINING} --data {TRAIN} --limit 64 --loss simpo --max-steps 6 --out run-simpo"
EVALUATE = f"evaluate --model run-dpo/model --model {MODEL} --reference ref-heldout --slice-by fault"

CASES = [
    # the help, at two widths: `COLUMNS` is set by the name
    *(Case(f"help-{width}-{command or 'all'}", f"{command} --help") for width in (80, 160) for command in ("", "precompute", "train", "evaluate")),
    Case("version", "--version"),
    # precompute
    Case("precompute-dry-run", f"{REF} --dry-run"),
    Case("precompute-dry-run-json", f"{REF} --dry-run --json"),
    Case("precompute-messages", REF),
    Case("precompute-again", f"{REF} --json"),
    Case("precompute-verify", f"{REF} --verify 96"),
    Case("precompute-verify-json", f"{REF} --verify 96 --json"),
    Case("precompute-kept", f"{PRECOMPUTE} --data {HELD_OUT} --limit 48 --keep-columns fault --json --out ref-heldout"),
    Case("precompute-text", f"{PRECOMPUTE} --data sample_data/text.jsonl --dtype bfloat16 --out ref-text"),
    Case("precompute-skipped", f"{PRECOMPUTE} --data mixed.jsonl --on-bad-row skip --max-length 40 --truncation keep-end --out ref-mixed"),
    Case("precompute-reuse", f"{PRECOMPUTE} --data {TRAIN} --limit 40 --max-length 2048 --reuse ref --out ref-reused"),
    Case("precompute-shard-0", f"{SHARDS} --shard 0/2"),
    Case("precompute-shard-1", f"{SHARDS} --shard 1/2"),
    # train
    Case("train-dry-run", f"{DPO} --dry-run"),
    Case("train-dry-run-json", f"{DPO} --dry-run --json"),
    Case("train-dpo", DPO),
    Case("train-dpo-again", f"{DPO} --json"),
    Case("train-bfloat16", f"{TRAINING} --reference ref-text --dtype bfloat16 --max-steps 4 --batch-size 4 --out run-bfloat16"),
    Case("train-sum", f"{TRAINING} --reference ref --eval-reference ref-heldout --loss dpo+0.2*sft --keep-best accuracy --max-steps 6 --eval-every 2 --json --out run-sum"),
    Case("train-simpo", SIMPO),
    Case("train-lora", f"{TRAINING} --reference ref --lora-rank 4 --merge --max-steps 4 --out run-lora"),
    Case("train-stopped", STOPPED, stop_file=Path("run-stopped/stop")),
    Case("train-out-of-time", f"{STOPPED} --max-minutes 0.0001"),
    Case("train-resumed", STOPPED),
    Case("train-two-processes", f"{TRAINING} --reference ref --eval-fraction 0.25 --max-steps 6 --out run-two", processes=2),
    # evaluate
    Case("evaluate-several", f"{EVALUATE} --require reward_accuracy>=0.999 --require loss<1 --out report-several"),
    Case("evaluate-checkpoint", f"{EVALUATE} --model run-dpo/checkpoints/step-8 --second-reference ref-heldout --json --out report-checkpoint"),
    Case("evaluate-losses", "evaluate --model run-stopped/model --reference shards --loss dpo,ipo,simpo --show-pairs 3 --out report-losses"),
    Case("evaluate-simpo", f"evaluate --model run-simpo/model --data {HELD_OUT} --limit 30 --json --out report-simpo"),
]  # fmt: skip


ROW = {"prompt": "What is a good soup?", "chosen": "Leek soup.", "rejected": "No soup at all."}
SKIPPED = ROW | {"rejected": ROW["chosen"]}
LONG = {"prompt": "soup " * 50, "chosen": "Leek soup. " * 8, "rejected": "No soup at all. " * 3}

BAD_LINES = f"""
nothing-of-the-kind
precompute
tran --model {MODEL}
--model {MODEL}
train stray
train --model
train --merge=yes
train --no-such 1
{PRECOMPUTE} --data missing.jsonl
{PRECOMPUTE} --data rows.jsonl --data-split test
{PRECOMPUTE} --data rows.jsonl --shard 3/3
{PRECOMPUTE} --data rows.jsonl --shard 1
{PRECOMPUTE} --data rows.jsonl --beta 1
{PRECOMPUTE} --data rows.jsonl --keep-columns colour
{PRECOMPUTE} --data rows.jsonl --keep-columns row
{PRECOMPUTE} --data rows.jsonl --prompt-field q --chosen-field a
{PRECOMPUTE} --data rows.jsonl --max-length 2
{PRECOMPUTE} --data rows.jsonl --max-length none
{PRECOMPUTE} --data rows.jsonl --truncation middle
{PRECOMPUTE} --data rows.jsonl --reuse nothing
{PRECOMPUTE} --data rows.jsonl --verify 4
{PRECOMPUTE} --data rows.jsonl --out rows.jsonl
{PRECOMPUTE} --data rows.jsonl --out run-dpo
{PRECOMPUTE} --data rows.jsonl --out sample_data
{PRECOMPUTE} --data half.jsonl
{PRECOMPUTE} --data half.jsonl --dry-run
{PRECOMPUTE} --data {TRAIN} --out ref --max-length 60
{PRECOMPUTE} --data {TRAIN} --out ref --limit 96 --rows-per-part 8 --dry-run
precompute --model no-such-model --data rows.jsonl
precompute --model ref --data rows.jsonl
precompute --model rows.jsonl --data rows.jsonl
precompute --model no-weights --data rows.jsonl
precompute --model pickled --data rows.jsonl
precompute --model no-config --data rows.jsonl
precompute --model broken-config --data rows.jsonl
precompute --model unknown-architecture --data rows.jsonl
precompute --model other-shape --data rows.jsonl
precompute --model truncated --data rows.jsonl
precompute --model no-template --data {TRAIN}
precompute --model no-tokenizer --data rows.jsonl
precompute --model broken-tokenizer --data rows.jsonl
precompute --model_name_or_path m --data rows.jsonl
train --model {MODEL}
train --model run-dpo --reference ref
train --model more-layers --reference ref
train --model {MODEL} --reference {MODEL}
train --model {MODEL} --reference nothing
train --model {MODEL} --reference run-dpo
train --model {MODEL} --reference incomplete
train --model {MODEL} --reference damaged
train --model {MODEL} --reference ref --data rows.jsonl
train --model {MODEL} --reference ref --eval-reference nothing
train --model {MODEL} --reference ref --eval-fraction .1 --eval-reference ref-heldout
train --model {MODEL} --reference ref --eval-fraction 0.0001
train --model {MODEL} --reference ref --eval-every 3
train --model {MODEL} --reference ref --early-stopping 2
train --model {MODEL} --reference ref --bete 1
train --model {MODEL} --reference ref --lr 1
train --model {MODEL} --reference ref --loss_type x
train --model {MODEL} --reference ref --loss dpoo
train --model {MODEL} --reference ref --loss sigmoid
train --model {MODEL} --reference ref --loss kto
train --model {MODEL} --reference ref --loss dpo+
train --model {MODEL} --reference ref --gamma 1
train --model {MODEL} --reference ref --ld-alpha 2
train --model {MODEL} --reference ref --beta 0
train --model {MODEL} --reference ref --beta much
train --model {MODEL} --reference ref --batch-size 0
train --model {MODEL} --reference ref --epochs 1 --max-steps 3
train --model {MODEL} --reference ref --max-length 9
train --model {MODEL} --reference ref --device cuda
train --model {MODEL} --reference ref --dtype float16
train --model {MODEL} --reference ref --track neptune
train --model {MODEL} --reference ref --lora-alpha 3
train --model {MODEL} --reference ref --merge
train --model {MODEL} --reference ref --router-aux-loss-coef 0.1
train --model {MODEL} --reference ref --out ref
train --model {MODEL} --reference ref --out sample_data/tiny-model
train --model {MODEL} --data rows.jsonl
train --config run-dpo/config.yaml --out run-dpo --seed 3
train --config run-dpo/config.yaml --out run-dpo --max-steps 13
train --config run-dpo/config.yaml --out run-dpo --beta 0.5
train --config none.yaml
train --config unknown-key.yaml
train --config foreign-key.yaml
train --config twice.yaml
train --config wrong-value.yaml
train --config no-options.yaml
train --config not-yaml.yaml
evaluate --model {MODEL}
evaluate --model {MODEL} --reference damaged
evaluate --model {MODEL} --reference ref --loss hinge --label-smoothing 0.1
evaluate --model {MODEL} --reference ref --require accuracy
evaluate --model {MODEL} --reference ref --require nothing>1
evaluate --model {MODEL} --reference ref --slice-by colour
evaluate --model {MODEL} --reference ref --second-reference ref-text
evaluate --model {MODEL} --reference ref --out run-dpo
evaluate --model {MODEL} --data rows.jsonl
evaluate --model {MODEL} --reference ref --per_device_eval_batch_size 1
evaluate --model nan --reference ref
train --model nan --reference ref
""".strip().splitlines()

CONFIGS = {
    "unknown-key": "model: m\nbatch_sise: 8\n",
    "foreign-key": "model: m\nper_device_train_batch_size: 8\n",
    "twice": "beta: 0.1\nmodel: m\nbeta: 0.2\n",
    "wrong-value": "model: m\nbeta: much\n",
    "no-options": "- model\n",
    "not-yaml": "model: [m\n",
}


def make_inputs(work: Path, sample_data: Path) -> None:
    """Everything that the command lines of `CASES` read."""
    shutil.copytree(sample_data, work / "sample_data", ignore=shutil.ignore_patterns("__pycache__"))
    write_rows(
        work / "mixed.jsonl", ROW, SKIPPED, {"prompt": "a"}, LONG, ROW | {"weight": 0.5, "source": "soups"}, LONG
    )
    write_rows(work / "rows.jsonl", *(ROW | {"rejected": f"{number} bad soups."} for number in range(6)))
    write_rows(work / "half.jsonl", ROW, ROW, SKIPPED, SKIPPED, SKIPPED)


def write_rows(path: Path, *rows: object) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_bad_inputs(work: Path) -> list[list[str]]:
    """Broken models, caches, YAML files and data files, and the command lines that name them; the caches must be there."""
    for name, text in CONFIGS.items():
        (work / f"{name}.yaml").write_text(text)
    _break_models(work)
    for name in ("incomplete", "damaged"):
        shutil.copytree(work / "ref", work / name, ignore=shutil.ignore_patterns("*.yaml", "*.json"))
    min((work / "incomplete").glob("rows-*")).unlink()
    part = sorted((work / "damaged").glob("rows-*"))[1]
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 0xFF
    part.write_bytes(content)
    (work / "bad").mkdir()
    files = [(bad.make(work / "bad").relative_to(work), bad.options) for bad in BAD_FILES if bad.code]
    lines = [line.split() for line in BAD_LINES]
    lines += [[*PRECOMPUTE.split(), "--data", str(path), *options] for path, options in files]
    return [line if "--out" in line or len(line) < 4 else [*line, "--out", "out"] for line in lines]


def _break_models(work: Path) -> None:
    def model(name: str, *without: str) -> Path:
        shutil.copytree(work / MODEL, work / name, ignore=shutil.ignore_patterns(*without))
        return work / name

    def configured(name: str, **changes: object) -> None:
        config = model(name) / "config.json"
        config.write_text(json.dumps(json.loads(config.read_bytes()) | changes))

    model("no-weights", "*.safetensors")
    (model("pickled", "*.safetensors") / "pytorch_model.bin").write_bytes(b"\x80\x04")
    model("no-config", "config.json")
    (model("broken-config") / "config.json").write_text('{"model_type": "llama",')
    configured("unknown-architecture", model_type="flux-capacitor")
    configured("other-shape", intermediate_size=64)
    configured("more-layers", num_hidden_layers=5)
    weights = model("truncated") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100_000])
    model("no-template", "chat_template.jinja")
    model("no-tokenizer", "tokenizer*", "chat_template.jinja")
    (model("broken-tokenizer") / "tokenizer.json").write_text("{}")
    weights = model("nan") / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4000] + b"\xff" * 4000)  # 0xffff and 0xffffffff are NaN
