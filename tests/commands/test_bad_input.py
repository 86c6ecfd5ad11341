"""Whatever is wrong with the input: its exit code, one short paragraph that names it, and nothing half-written.

A command line stands here as in a shell script; `{name}` is a thing of `broken_inputs.World`. Where it gives no `--out`,
`--out {out} --json` is added, `{out}` being a path where nothing is.
"""

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from dpocli.cli import checked
from tests.commands.broken_inputs import NO_PAIR, World, flip_a_byte, make_caches
from tests.commands.conftest import ROOT, Run

USAGE, DATA, CACHE, NUMBERS = 2, 3, 4, 5

BEGUN = {"status.json", ".status.lock", "config.yaml", ".hashes.json", "pairs"}
"""What may be in `--out` after an error that shows only when the work has begun."""

LONGEST_MESSAGE = 700


@pytest.fixture(scope="session")
def world(cache: Path, held_out_cache: Path, tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("world"), cache, held_out_cache)
    make_caches(world)
    return world


Refused = Callable[..., str]


@pytest.fixture
def refused(world: World, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> Iterator[Refused]:
    """Runs a command line that must fail: gives its message, after checking how it is said and what is left."""
    before = world.everything()
    out = tmp_path / "out"
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed

    def run(line: str, code: int) -> str:
        result = dpocli(*world.arguments(line if "--out" in line else f"{line} --out {{out}} --json", out=out))
        assert result.code == code, result.err
        assert result.out == ""
        assert "Traceback" not in result.err
        notes, error, message = result.err.partition("error: ")
        assert error, result.err
        assert "error: " not in message
        assert not notes or notes.endswith("\n")
        assert len(message.replace(str(world.directory), "").replace(str(ROOT), "")) < LONGEST_MESSAGE
        return message

    yield run
    assert world.everything() == before, "nothing of the input was touched"
    if out.exists():
        assert {path.name for path in out.iterdir()} <= BEGUN
        assert json.loads((out / "status.json").read_text())["state"] == "failed"
        assert not list(out.glob("pairs/*"))


def case(line: str, *words: str) -> object:
    return pytest.param(line, words, id=line.replace("{", "").replace("}", ""))


def check(message: str, words: tuple[str, ...], world: World) -> None:
    for word in words:
        assert word.format(**world.paths) in message


# before anything is written

WRONG_FROM_THE_START = {
    USAGE: [
        # data
        case("precompute --model {model} --data {world}/missing.jsonl", "--data {world}/missing.jsonl: there is no such"),
        case("precompute --model {model} --data {prefs}", "prefs.csv", "not read", ".jsonl, .jsonl.gz, .json"),
        case("precompute --model {model} --data '{no_rows}'", "{no_rows}", "holds no .jsonl"),
        case("precompute --model {model} --data {rows} --data-split test", "--data-split test", "files"),
        case("train --model {model} --data {world}/missing.jsonl --loss simpo", "{world}/missing.jsonl: there is no such"),
        case("evaluate --model {model} --data {world}/missing --loss simpo", "{world}/missing: there is no such"),
        # model
        case("precompute --model {no_weights} --data {rows}", "--model {no_weights}", "no weights (*.safetensors)"),
        case("train --model {no_weights} --reference {ref}", "--model {no_weights}", "no weights (*.safetensors)"),
        case("precompute --model {pickled} --data {rows}", "{pickled}", "pickled (pytorch_model.bin)", "save_pretrained"),
        case("evaluate --model {pickled} --reference {ref}", "{pickled}", "pickled (pytorch_model.bin)"),
        case("precompute --model {world}/no-such --data {rows}", "--model {world}/no-such: there is no such directory"),
        case("precompute --model {no_config} --data {rows}", "--model {no_config}", "no config.json"),
        case("train --model {no_config} --reference {ref}", "--model {no_config}", "no config.json"),
        case("precompute --model {broken_config} --data {rows}", "{broken_config}/config.json is not JSON", "again"),
        case("precompute --model {rows} --data {rows}", "--model {rows}: this is a file", "config.json"),
        case("precompute --model {no_tokenizer} --data {rows}", "{no_tokenizer}: there is no tokenizer", "tokenizer.json"),
        case("train --model {no_tokenizer} --reference {ref}", "{no_tokenizer}: there is no tokenizer", "tokenizer.json"),
        case("evaluate --model {broken_tokenizer} --reference {ref}", "its tokenizer cannot be loaded", "tokenizer.json"),
        case("precompute --model {ref} --data {rows}", "--model {ref}: this is a reference cache", "--reference"),
        case("train --model {ref} --reference {ref}", "--model {ref}: this is a reference cache", "--reference"),
        case("evaluate --model {run} --reference {ref}", "--model {run}", "no config.json", "Did you mean {run}/model?"),
        # options
        case("train --model {model} --reference {ref} --bete 1", "--bete: there is no such option; did you mean --beta?"),
        case("train --model {model} --reference {ref} --lr 1", "--lr: this is a name from another tool", "--learning-rate"),
        case("train --model {model} --reference {ref} --loss_type x", "from another tool", "use --loss"),
        case("precompute --model_name_or_path m --data {rows}", "from another tool", "use --model"),
        case("evaluate --model {model} --reference {ref} --per_device_eval_batch_size 1", "from another tool", "--token-budget"),
        case("precompute --model {model} --data {rows} --beta 1", "--beta", "belongs to train and evaluate"),
        case("train --config {unknown_key}", "{unknown_key}:2: batch_sise", "did you mean batch_size?"),
        case("train --config {foreign_key}", "{foreign_key}:2: per_device_train_batch_size", "another tool", "--batch-size"),
        case("train --config {twice}", "{twice}:3: beta: given twice, first in line 1"),
        case("train --config {wrong_value}", "{wrong_value}:2: beta much: must be a number"),
        case("train --config {no_options}", "{no_options}: holds no options"),
        case("train --config {not_yaml}", "{not_yaml}:2: is not valid YAML"),
        case("train --config {world}/none.yaml", "--config {world}/none.yaml: cannot be read"),
        case("train --model {model} --reference {ref} --batch-size 0", "--batch-size 0: must be at least 1"),
        case("train --model {model} --reference {ref} --beta 0", "--beta 0: must be above 0"),
        case("precompute --model {model} --data {rows} --shard 3/3", "--shard", "3/3", "0 <= I < N"),
        case("precompute --model {model} --data {rows} --shard 0/0", "--shard", "0/0", "0 <= I < N"),
        case("precompute --model {model} --data {rows} --shard 1", "--shard 1", "I/N"),
        case("train --model {model} --reference {ref} --loss dpoo", "--loss dpoo: there is no loss dpoo", "Did you mean dpo?", "simpo"),
        case("train --model {model} --reference {ref} --loss sigmoid", "--loss sigmoid", "called dpo here"),
        case("train --model {model} --reference {ref} --gamma 1", "--gamma: dpo does not use it", "simpo"),
        case("evaluate --model {model} --reference {ref} --loss hinge --label-smoothing 0.1", "--label-smoothing: hinge"),
        # combinations
        case("train --model {model}", "--reference: missing", "dpocli precompute"),
        case("evaluate --model {model}", "--reference", "--data"),
        case("train --model {model} --reference {ref} --data {rows}", "--data", "one of --reference and --data"),
        case("train --model {model} --reference {ref} --epochs 1 --max-steps 3", "--epochs or by --max-steps, not both"),
        case("train --model {model} --reference {ref} --eval-every 3", "--eval-every", "--eval-fraction"),
        case("train --model {model} --reference {ref} --eval-fraction .1 --eval-reference {ref_heldout}", "not both"),
        case("train --model {model} --reference {ref} --max-length 9", "--max-length: has no effect here", "precompute"),
        case("train --model {model} --reference {ref} --device cuda", "--device cuda", "--device cpu"),
        case("train --model {model} --reference {ref} --dtype float16", "--dtype", "float16", "bfloat16"),
        case("train --model {model} --reference {ref} --track neptune", "--track", "neptune", "wandb"),
        case("train --model {model} --reference {ref} --track wandb", "--track wandb", "pip install 'dpocli[trackers]'"),
        case("evaluate --model {unscored_run}/model --reference {ref}", "dpocli.json", "simpo", "margin_of_tomorrow", "Update"),
        # a place to write that is none
        case("train --model {model} --reference {ref} --out {dangling} --json", "--out {dangling}: this is a link that"),
        case(f"train --model {{model}} --reference {{ref}} --out {{world}}/{'x' * 256} --json", "--out {world}", "too long"),
        case("precompute --model {model} --data {rows} --out {rows} --json", "--out {rows}: this is a file"),
        case("train --model {model} --reference {ref} --out {rows} --json", "--out {rows}: this is a file"),
        case("evaluate --model {model} --reference {ref} --out {rows} --json", "--out {rows}: this is a file"),
        case("precompute --model {model} --data {rows} --out {rows}/below --json", "{rows}/below", "not a directory"),
        case("train --model {model} --reference {ref} --out {rows}/below --json", "{rows}/below", "not a directory"),
        case("evaluate --model {model} --reference {ref} --out {rows}/below --json", "{rows}/below", "not a directory"),
        case("precompute --model {model} --data {rows} --out {no_weights} --json", "--out {no_weights}", "a model directory"),
        case("precompute --model {model} --data {rows} --out {world} --json", "--out {world}: it holds", "empty directory"),
        case("precompute --model {model} --data {rows} --out {run} --json", "--out {run}: it holds what `dpocli train`"),
        case("train --model {model} --reference {ref} --out {ref} --json", "--out {ref}: it holds what `dpocli precompute`"),
        case("train --model {model} --reference {ref} --out {bare_cache} --json", "{bare_cache}: it holds a reference cache"),
        case("train --model {model} --reference {ref} --out {no_weights} --json", "--out {no_weights}: it holds a model"),
        case("train --model {model} --reference {ref} --out {project} --json", "--out {project}: it holds model, which no"),
        case("evaluate --model {model} --reference {ref} --out {ref} --json", "--out {ref}: it holds what `dpocli precomp"),
        case("evaluate --model {model} --reference {ref} --out {run} --json", "--out {run}: it holds what `dpocli train`"),
    ],
    DATA: [
        case("precompute --model {model} --data {empty}", "{empty}: holds no rows"),
        case("precompute --model {model} --data {blank}", "{blank}: holds no rows"),
        case("train --model {model} --data {empty} --loss simpo", "{empty}: holds no rows"),
        case("precompute --model {model} --data {not_gzip}", "{not_gzip}: the gzip data is damaged", "gzip -t"),
        case("precompute --model {model} --data {not_parquet}", "{not_parquet}: not a Parquet file"),
    ],
    CACHE: [
        case("train --model {model} --reference {model}", "{model} is a model directory", "dpocli precompute"),
        case("evaluate --model {model} --reference {model}", "{model} is a model directory", "dpocli precompute"),
        case("train --model {model} --reference {run}", "{run} is the output directory of a run", "dpocli precompute"),
        case("train --model {model} --reference {world}/none", "There is no reference cache {world}/none", "dpocli precompute"),
        case("train --model {model} --reference '{no_rows}'", "{no_rows}", "not a reference cache", "dpocli precompute"),
        case("train --model {other_tokenizer} --reference {ref}", "{ref}", "another tokenizer", "vocabulary differs"),
        case("evaluate --model {other_tokenizer} --reference {ref}", "{ref}", "another tokenizer", "vocabulary differs"),
        case("train --model {model} --reference {incomplete}", "{incomplete} is incomplete", "1 of 3 parts", "command that made"),
        case("evaluate --model {model} --reference {incomplete}", "{incomplete} is incomplete", "1 of 3 parts"),
        case("train --model {model} --reference {damaged}", "rows-0000000016-0000000032.parquet", "damaged", "command that made"),
        case("evaluate --model {model} --reference {damaged}", "rows-0000000016-0000000032.parquet", "damaged"),
        case("train --model {model} --reference {ref} --eval-reference {other_reference}", "different references", "weights"),
        case("train --model {model} --reference {unscored_run}/pairs", "without a reference", "--loss dpo", "dpocli precompute"),
        case("evaluate --model {model} --reference {unscored_run}/pairs", "without a reference", "dpocli precompute"),
        case("train --model {model} --reference {ref} --eval-reference {model}", "{model} is a model directory"),
        case("train --model {model} --reference {ref} --eval-reference {damaged}", "damaged"),
        case("train --model {model} --loss simpo --data {rows} --eval-reference {world}/none", "There is no reference cache"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "line", "words"),
    [pytest.param(code, *one.values, id=one.id) for code, cases in WRONG_FROM_THE_START.items() for one in cases],
)
def test_wrong_from_the_start(
    code: int, line: str, words: tuple[str, ...], world: World, refused: Refused, tmp_path: Path
) -> None:
    check(refused(line, code), words, world)
    assert not (tmp_path / "out").exists()


# what shows only when the work has begun

WRONG_ON_THE_WAY = {
    DATA: [
        case("precompute --model {model} --data {not_json}", "not_json.jsonl:2: column 12: not JSON"),
        case("precompute --model {model} --data {not_an_object}", "not_an_object.jsonl:2", "found list", "name it .json"),
        case("precompute --model {model} --data {not_utf8}", "not_utf8.jsonl:2", "byte 0xe8 is not UTF-8"),
        case("precompute --model {model} --data {no_field}", "no_field.jsonl:2: rejected: missing", "--rejected-field"),
        case("precompute --model {model} --data {null_field}", "null_field.jsonl:2: chosen: is null"),
        case("precompute --model {model} --data {wrong_type}", "wrong_type.jsonl:2: chosen: text or messages", "a number"),
        case("precompute --model {model} --data {wrong_content}", "wrong_content.jsonl:2: chosen[0].content: text", "a number"),
        case("precompute --model {model} --data {wrong_weight}", "wrong_weight.jsonl:2: weight: a finite number", "-1"),
        case("precompute --model {model} --data {rows} --keep-columns colour", "rows.jsonl:1: colour: missing", "--keep-col"),
        case("precompute --model {model} --data {rows} --prompt-field q --chosen-field a", "rows.jsonl:1: a: missing"),
        case("precompute --model {model} --data {all_skipped}", "2 of 2 rows give no pair", "identical", "jsonl:1:"),
        case("precompute --model {model} --data {all_skipped} --max-skipped 1", "2 of 2 rows give no pair", "no pair is left"),
        case("precompute --model {model} --data {half_skipped}", "3 of 5 rows", "--max-skipped allows 50%", "jsonl:3:"),
        case("precompute --model {model} --data {not_json} --on-bad-row skip --max-skipped 0.1", "1 of 2 rows", "jsonl:2: the row"),
        case("precompute --model {model} --data {rows} --max-length 2", "6 of 6 rows", "the prompt fills --max-length"),
        case("train --model {model} --data {not_json} --loss simpo", "not_json.jsonl:2", "not JSON"),
        case("evaluate --model {model} --data {no_field} --loss simpo", "no_field.jsonl:2: rejected: missing"),
        case("train --model {model} --data {all_skipped} --loss simpo", "2 of 2 rows give no pair"),
        case("train --model {model} --reference {weightless}", "{weightless}", "weight 0"),
        case("evaluate --model {model} --reference {no_pair}", "{no_pair}", "no pair", "skipped"),
        case("train --model {model} --reference {no_pair}", "{no_pair}", "no pair", "skipped"),
    ],
    USAGE: [
        case("precompute --model {no_template} --data {messages}", "messages.jsonl:1", "no chat template", "rows of text"),
        case("train --model {no_template} --data {messages} --loss simpo", "messages.jsonl:1", "no chat template"),
        case("precompute --model {model} --data {rows} --keep-columns row", "--keep-columns row", "Rename the field"),
        case("precompute --model {truncated} --data {rows}", "{truncated}", "damaged", "copy the model again"),
        case("train --model {truncated} --reference {ref}", "{truncated}", "damaged", "copy the model again"),
        case("evaluate --model {truncated} --reference {ref}", "{truncated}", "damaged", "copy the model again"),
        case("precompute --model {empty_weights} --data {rows}", "{empty_weights}", "damaged", "copy the model again"),
        case("precompute --model {other_shape} --data {rows}", "{other_shape}: 12 weights", "[128, 352] instead of [128, 64]"),
        case("train --model {more_layers} --reference {ref}", "{more_layers}: 9 weights", "model.layers.4", "random"),
        case("evaluate --model {unknown_architecture} --reference {ref}", "flux-capacitor", "does not recognize"),
        case("train --model {fewer_embeddings} --reference {ref}", "--model", "embeddings for 200", "more tokens"),
        case("train --model {few_positions} --reference {ref}", "--model", "positions for 16 tokens", "--max-length 16"),
        case("precompute --model {few_positions} --data {rows} --text-as messages", "for 16 tokens", "--max-length 16"),
        case("train --model {model} --reference {ref} --router-aux-loss-coef 0.1", "--router-aux-loss-coef", "no experts"),
        case("train --model {model} --reference {ref} --eval-fraction 0.0001", "--eval-fraction 0.0001", "0 of 40"),
    ],
    NUMBERS: [
        case("precompute --model {nan} --data {rows}", "not finite", "rows 0, 1, 2, 3, 4, 5"),
        case("train --model {nan} --reference {ref} --batch-size 2 --seed 1", "not finite", "source row ", "weights"),
        case("evaluate --model {nan} --reference {ref}", "not finite for 40 pairs", "rows 0, 1, 2", "weights"),
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("code", "line", "words"),
    [pytest.param(code, *one.values, id=one.id) for code, cases in WRONG_ON_THE_WAY.items() for one in cases],
)
def test_wrong_on_the_way(code: int, line: str, words: tuple[str, ...], world: World, refused: Refused) -> None:
    check(refused(line, code), words, world)


# what needs more than a line


def printed_command(message: str) -> list[str]:
    (line,) = (line for line in message.splitlines() if line.startswith("    dpocli "))
    return shlex.split(line)[1:]


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_the_precompute_line_for_raw_rows_works_as_printed(
    command: str, world: World, refused: Refused, dpocli: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = refused(f"{command} --model {{model}} --data '{{odd name}}' --text-as messages --max-length 30", USAGE)
    assert "--loss dpo compares with a reference" in message
    line = printed_command(message)
    assert checked(line)
    monkeypatch.chdir(tmp_path)
    assert dpocli(*line).code == 0
    (part,) = (tmp_path / "reference").glob("rows-*")
    settings = json.loads(pq.read_metadata(part).metadata[b"dpocli"])["fingerprint"]["settings"]
    assert (settings["text_as"], settings["max_length"]) == ("messages", 30)


def test_a_cache_goes_on_only_with_its_own_settings(world: World, dpocli: Run, tmp_path: Path) -> None:
    ref = tmp_path / "ref"
    line = world.arguments(
        "precompute --model {model} --data {rows} --text-as messages --json --out {ref_out}", ref_out=ref
    )
    assert dpocli(*line).code == 0
    (part,) = ref.glob("rows-*")
    written = part.stat().st_mtime_ns
    for more, difference in {
        "--max-length 100": "max_length: 2048 -> 100",
        "--limit 3": "limit: null -> 3",
        "--dtype bfloat16": "dtype: float32 -> bfloat16",
        "--rows-per-part 2": "rows_per_part: 4096 -> 2",
        "--model {other_weights}": "weights: model.safetensors differs",
        "--data {one_pair}": "data: ",
    }.items():
        result = dpocli(*line, *world.arguments(more))
        assert (result.code, result.out) == (CACHE, ""), result.err
        assert difference in result.err
        assert f"{ref} was made with other settings" in result.err
    assert part.stat().st_mtime_ns == written
    assert [path.name for path in ref.glob("rows-*")] == [part.name]


def test_a_damaged_part_is_made_anew_by_the_same_line(world: World, dpocli: Run, tmp_path: Path) -> None:
    ref = tmp_path / "ref"
    line = world.arguments("precompute --model {model} --data {rows} --rows-per-part 2 --out {ref_out}", ref_out=ref)
    assert dpocli(*line).code == 0
    parts = sorted(ref.glob("rows-*"))
    times, table = [part.stat().st_mtime_ns for part in parts], pq.read_table(parts[1])
    flip_a_byte(parts[1])
    assert dpocli(*line).code == 0
    assert pq.read_table(parts[1]).equals(table)
    assert [part.stat().st_mtime_ns == time for part, time in zip(parts, times, strict=True)] == [True, False, True]


def test_a_run_goes_on_only_with_its_own_settings(world: World, dpocli: Run, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(world.paths["run"], run)
    before = (run / "model" / "model.safetensors").stat().st_mtime_ns
    line = f"train --config {run}/config.yaml --out {run} --json"
    for more, difference in {
        "--beta 0.5": "dpo(beta=0.1, label_smoothing=0) -> dpo(beta=0.5, label_smoothing=0)",
        "--seed 3": "seed: 0 -> 3",
        "--max-steps 9": "max_steps: 2 -> 9",
    }.items():
        result = dpocli(*world.arguments(f"{line} {more}"))
        assert (result.code, result.out) == (USAGE, ""), result.err
        assert difference in result.err
    assert dpocli(*world.arguments(line)).json["steps"] == 2
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == before


def test_a_command_leaves_the_status_of_another_ones_output_alone(world: World, dpocli: Run, tmp_path: Path) -> None:
    ref = tmp_path / "ref"
    shutil.copytree(world.cache, ref)
    status = json.loads((ref / "status.json").read_text()) | {
        "pid": 0,
        "pid_started": 0,
    }  # of another process than this
    (ref / "status.json").write_text(json.dumps(status))
    result = dpocli(*world.arguments("train --model {model} --reference {ref} --out {copy}", copy=ref))
    assert (result.code, result.out) == (USAGE, "")
    assert json.loads((ref / "status.json").read_text()) == status


def test_workers_that_together_skip_too_much_say_so(world: World, dpocli: Run) -> None:
    result = dpocli(*world.arguments(NO_PAIR), "--json")
    assert (result.code, result.out) == (DATA, ""), result.err
    assert "2 of 2 rows give no pair" in result.err


# what goes well says nothing else

CHATTER = (
    "Warning",
    "warn(",
    "Traceback",
    "site-packages",
    "transformers",
    "torch",
    "it/s",
    "\r",
    "HF_",
    "WARN",
    "INFO",
    "Failed to",
    "pip install",
    "kernels",
)


def test_json_is_all_of_stdout_and_stderr_is_ours_alone(world: World, tmp_path: Path) -> None:
    """In a process of its own, since what libraries say on import they say once."""
    lines = [
        "precompute --model {model} --data {train} --limit 16 --out {out}/ref --json",
        "train --model {model} --reference {out}/ref --out {out}/run --max-steps 1 --eval-fraction 0.5 --json",
        "evaluate --model {out}/run/model --reference {out}/ref --out {out}/report --json",
        "train --model {model} --reference {out}/ref --out {out}/run --max-steps 1 --eval-fraction 0.5 --json",
    ]
    script = """
import sys, json, dpocli.cli
codes = [dpocli.cli.run_command_line(line) for line in json.loads(sys.argv[1])]
assert not {"peft", "bitsandbytes"} & set(sys.modules), "they take seconds, and are of no use without an adapter"
import dpocli.model.lora
dpocli.model.lora.import_peft("--adapter")
sys.exit(any(codes))
"""
    arguments = json.dumps([world.arguments(line, out=tmp_path) for line in lines])
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script, arguments], capture_output=True, text=True, cwd=ROOT, env=one_thread
    )
    assert done.returncode == 0, done.stderr
    results = [json.loads(line) for line in done.stdout.splitlines()]
    assert [set(result) & {"parts", "steps", "rewards/margins"} for result in results] == [
        {"parts"}, {"steps"}, {"rewards/margins"}, {"steps"},
    ]  # fmt: skip
    assert not [word for word in CHATTER if word in done.stderr], done.stderr


def test_a_damaged_checkpoint_is_named(world: World, dpocli: Run, tmp_path: Path) -> None:
    line = world.arguments(
        "train --model {model} --reference {ref} --out {out}/run --max-steps 2 --save-every 1", out=tmp_path
    )
    assert dpocli(*line).code == 0
    run = tmp_path / "run"
    shutil.rmtree(run / "model")
    shutil.rmtree(run / "checkpoints" / "step-1")  # from which the run would go on
    (weights,) = (run / "checkpoints" / "step-2").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    result = dpocli(*line)
    assert result.code == USAGE
    assert "checkpoints/step-2 cannot be read" in result.err
    shutil.rmtree(weights.parent)
    assert dpocli(*line).code == 0


def test_a_finished_run_is_not_asked_for_its_cache_but_is_refused_other_pairs(
    world: World, dpocli: Run, tmp_path: Path
) -> None:
    ref, other = tmp_path / "ref", tmp_path / "other"
    shutil.copytree(world.cache, ref)
    line = ["train", "--model", world.paths["model"], "--out", tmp_path / "run", "--max-steps", 1, "--reference"]
    assert dpocli(*line, ref).code == 0
    shutil.rmtree(ref)
    assert "nothing to do" in dpocli(*line, ref).out
    result = dpocli(*line, other)
    assert result.code == USAGE
    assert "it holds a finished run, and the pairs of" in result.err


@pytest.mark.parametrize(
    "environment",
    [{"RANK": "5", "WORLD_SIZE": "2", "MASTER_ADDR": "x"}, {"RANK": "one"}, {"RANK": "0", "WORLD_SIZE": "2"}],
    ids=str,
)
def test_an_environment_that_no_launcher_makes(
    environment: dict[str, str], world: World, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = dpocli(
        *world.arguments("precompute --model {model} --data {train} --out {copy}", copy=world.cache / "new")
    )
    assert result.code == USAGE
    assert "Start with a launcher" in result.err
