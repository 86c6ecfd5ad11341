"""What a run goes on from: only its own checkpoints, of the same content, whole; and what it says where they are not."""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from traceback import StackSummary
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.api import CheckpointException

from dpocli.checkpoint import retention, storage
from dpocli.commands import train_outputs, train_setup
from dpocli.distributed import shared_filesystem
from dpocli.model.save import save_model
from dpocli.training import trainer
from dpocli.training.monitor import Monitor
from dpocli.training.trainer import Trainer
from tests.commands.broken_inputs import replace_json
from tests.commands.conftest import MODEL, TRAIN, Result, Run, metrics_of, quiet
from tests.commands.ranks import ended

SETTINGS = ("--learning-rate", "1e-3", "--batch-size", 8, "--max-steps", 4, "--save-every", 1, "--keep-last", 9)
ONE_STEP = ("--max-minutes", "1e-6")
Line = tuple[object, ...]


@pytest.fixture(scope="module")
def line(cache: Path, held_out_cache: Path) -> Line:
    held_out = ("--eval-reference", held_out_cache, "--eval-every", 1, "--keep-best", "loss")
    return ("train", "--model", MODEL, "--reference", cache, *held_out, *SETTINGS)


@pytest.fixture(scope="module")
def undisturbed(line: Line, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("undisturbed") / "run"
    quiet(*line, "--out", out)
    return out


@pytest.fixture
def stopped(undisturbed: Path, tmp_path: Path) -> Path:
    """As it was after step 2, when its time was up."""
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    for path in (out / "model", out / "checkpoints" / "step-3", out / "checkpoints" / "step-4"):
        shutil.rmtree(path)
    for name in ("summary.json", "curves.png"):
        (out / name).unlink(missing_ok=True)
    rows = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(rows[:3]))
    replace_json(out / "status.json", lambda status: status.update(state="preempted", exit_code=75, step=2))
    best = min((row for row in metrics_of(out)[1:]), key=lambda row: row["eval/loss"])
    write_best(out, int(best["step"]), best)
    return out


def write_best(out: Path, step: int, row: dict[str, float]) -> None:
    value = {"by": "loss", "step": step, "loss": row["eval/loss"], "accuracy": row["eval/rewards/accuracies"]}
    (out / "checkpoints" / "best.json").write_text(json.dumps(value))


def said(result: Result) -> str:
    return " ".join(result.err.split())


def assert_refused(result: Result, *words: object) -> None:
    assert result.code == 2, result.err
    for word in words:
        assert str(word) in said(result), result.err
    assert "Traceback" not in result.err


def assert_goes_on(result: Result, after: int, *words: object) -> None:
    assert result.code == 0, result.err
    assert f"Resuming after step {after} of 4" in result.err
    for word in words:
        assert str(word) in said(result), result.err


def change_weights(model: Path) -> None:
    path = model / "model.safetensors"
    tensors = load_file(path)
    next(iter(tensors.values())).mul_(1.25)
    save_file(tensors, path, metadata={"format": "pt"})


# what the run is made from


def change_config(model: Path) -> None:
    replace_json(model / "config.json", lambda config: config.update(rms_norm_eps=1e-3))


@pytest.mark.parametrize(
    ("kind", "change", "words"),
    [
        (("--lora-rank", 2), change_weights, "the weights of --model"),
        ((), change_weights, "the weights of --model"),
        ((), change_config, "the configuration of --model"),
    ],
    ids=["base of an adapter", "full", "config.json"],
)
def test_another_model_under_the_same_name(
    kind: Line, change: Callable[[Path], None], words: str, cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    line = (
        "train",
        "--model",
        model,
        "--reference",
        cache,
        *SETTINGS,
        *kind,
        "--max-steps",
        2,
        "--out",
        tmp_path / "run",
    )
    assert dpocli(*line, *ONE_STEP).code == 75
    kept = tmp_path / "kept"
    shutil.copytree(model, kept)
    change(model)
    assert_refused(dpocli(*line), "step-1", words, "or give another --out")
    shutil.rmtree(model)
    kept.rename(model)
    assert dpocli(*line).code == 0
    change(model)
    assert_refused(dpocli(*line), "a finished run", words)


def test_another_dropout_of_the_adapter_that_training_begins_with(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    quiet(
        "train", "--model", MODEL, "--reference", cache, *SETTINGS, "--lora-rank", 2, "--max-steps", 1,
        "--out", tmp_path / "first",
    )  # fmt: skip
    adapter = tmp_path / "first" / "model"
    line = ("train", "--model", MODEL, "--adapter", adapter, "--reference", cache, *SETTINGS, "--out", tmp_path / "run")
    assert dpocli(*line, *ONE_STEP).code == 75
    replace_json(adapter / "adapter_config.json", lambda config: config.update(lora_dropout=0.5))
    assert_refused(dpocli(*line), "step-1", "the configuration of --model", "adapter_config.json")


def test_other_held_out_pairs_under_the_same_name(
    cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    held_out, out = tmp_path / "held-out", tmp_path / "run"
    shutil.copytree(held_out_cache, held_out)
    line = ("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--eval-reference", held_out, "--out", out)
    line = (*line, "--max-steps", 2)
    assert dpocli(*line, *ONE_STEP).code == 75
    shutil.rmtree(held_out)
    shutil.copytree(cache, held_out)
    assert_refused(dpocli(*line), "step-1", "the held-out pairs of --eval-reference")
    shutil.rmtree(held_out)
    shutil.copytree(held_out_cache, held_out)
    assert dpocli(*line).code == 0
    shutil.rmtree(held_out)
    shutil.copytree(cache, held_out)
    assert_refused(dpocli(*line), "a finished run", f"the held-out pairs of {held_out}")
    shutil.rmtree(held_out)
    assert dpocli(*line).code == 0, "a cache may be deleted when all is done"


def test_other_names_of_the_same_content(
    undisturbed: Path, stopped: Path, line: Line, held_out_cache: Path, cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    (model := tmp_path / "model").symlink_to(MODEL)
    moved = tmp_path / "held-out"
    shutil.copytree(held_out_cache, moved)
    other = {held_out_cache: moved, MODEL: model}
    finished = tmp_path / "finished"
    shutil.copytree(undisturbed, finished)
    renamed = [other.get(word, word) if isinstance(word, Path) else word for word in line]
    assert dpocli(*renamed, "--out", finished).code == 0
    assert_goes_on(dpocli(*renamed, "--out", stopped), 2)
    for changed, words in (
        ([cache if word == held_out_cache else word for word in line], f"the held-out pairs of {cache}"),
        ([tmp_path / "gone" if word == held_out_cache else word for word in line], f"of {tmp_path / 'gone'}"),
        ([word for word in line if word not in ("--eval-reference", held_out_cache)], ""),
    ):
        assert_refused(dpocli(*changed, "--out", finished), words)


def test_a_finished_run_on_rows_knows_them_by_content(tmp_path: Path, dpocli: Run) -> None:
    data, elsewhere = tmp_path / "t.jsonl", tmp_path / "elsewhere.jsonl"
    rows = TRAIN.read_text().splitlines(keepends=True)
    data.write_text("".join(rows[:16]))
    line = ("train", "--model", MODEL, "--loss", "simpo", *SETTINGS, "--max-steps", 1, "--out", tmp_path / "run")
    assert dpocli(*line, "--data", data).code == 0
    shutil.copy(data, elsewhere)
    for path in (data, elsewhere):
        result = dpocli(*line, "--data", path)
        assert result.code == 0, result.err
        assert "nothing to do" in result.out + result.err
    data.write_text("".join(rows[16:32]))
    assert_refused(dpocli(*line, "--data", data), "a finished run", f"the pairs of {data}")
    data.unlink()
    assert dpocli(*line, "--data", data).code == 0, "rows may be deleted when all is done"
    assert_refused(dpocli(*line, "--data", tmp_path / "nowhere.jsonl"), "nowhere.jsonl")


# whose checkpoint it is


def test_a_checkpoint_under_another_name(stopped: Path, line: Line, dpocli: Run) -> None:
    (stopped / "checkpoints" / "step-2").rename(stopped / "checkpoints" / "step-3")
    assert_refused(dpocli(*line, "--out", stopped), "step-3", "written after step 2")


def test_a_checkpoint_beyond_the_end(stopped: Path, line: Line, dpocli: Run) -> None:
    place = stopped / "checkpoints" / "step-9"
    (stopped / "checkpoints" / "step-2").rename(place)
    replace_json(place / "state.json", lambda state: state.update(step=9))
    assert_refused(dpocli(*line, "--out", stopped), "step-9", "longer run", "4 steps")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"format": 2}', "field required"),
        ("[]", "state.json"),
        ("{", "state.json"),
        ('{"format": 2, "step": "2", "pairs": "x", "num_pairs": 40}', "`step`: input should be a valid integer"),
        ('{"format": 3}', "has format 3, and this dpocli reads format 2"),
        (None, "state.json is missing"),
    ],
)
def test_a_state_that_makes_no_sense(text: str | None, words: str, stopped: Path, line: Line, dpocli: Run) -> None:
    shutil.rmtree(stopped / "checkpoints" / "step-1")
    path = stopped / "checkpoints" / "step-2" / "state.json"
    path.unlink() if text is None else path.write_text(text)
    assert_refused(dpocli(*line, "--out", stopped), path.parent, words)
    assert path.parent.is_dir()


# damage


def cut_off(place: Path) -> None:
    (tensors,) = place.glob("*.safetensors")
    tensors.write_bytes(tensors.read_bytes()[:-100])


def break_header(place: Path) -> None:
    (tensors,) = place.glob("*.safetensors")
    tensors.write_bytes(b"\xff" * tensors.stat().st_size)


def remove_tensors(place: Path) -> None:
    next(place.glob("*.safetensors")).unlink()


def empty_state(place: Path) -> None:
    (place / "state.json").write_text("{}")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut_off, "were written"),
        (break_header, "a file of tensors is cut off or damaged"),
        (remove_tensors, "is missing"),
        (empty_state, "state.json: `pairs`: field required"),
    ],
)
def test_a_damaged_checkpoint_stays_aside_and_the_one_before_goes_on(
    damage: Callable[[Path], None], words: str, stopped: Path, undisturbed: Path, line: Line, dpocli: Run
) -> None:
    """With the same values as if there had been no damage, though the damaged one was the best so far."""
    places = stopped / "checkpoints"
    write_best(stopped, 2, metrics_of(stopped)[2])
    damage(places / "step-2")
    result = dpocli(*line, "--out", stopped)
    assert_goes_on(result, 1, "warning: The checkpoint", words, "resumes from step-1", places / ".damaged-step-2")
    assert not any(name in result.err for name in ("KeyError", "SafetensorError", "Error:"))
    assert (places / ".damaged-step-2").is_dir()
    assert (places / "step-2").is_dir(), "made again"
    assert metrics_of(stopped) == metrics_of(undisturbed)
    assert (places / "best.json").read_bytes() == (undisturbed / "checkpoints" / "best.json").read_bytes()
    models = [load_file(out / "model" / "model.safetensors") for out in (stopped, undisturbed)]
    assert all(torch.equal(models[0][name], models[1][name]) for name in models[1])


def test_where_all_are_damaged_nothing_is_touched(stopped: Path, line: Line, dpocli: Run) -> None:
    for step in (1, 2):
        cut_off(stopped / "checkpoints" / f"step-{step}")
    assert_refused(dpocli(*line, "--out", stopped), "step-2 cannot be read", "Remove that directory")
    assert {path.name for path in (stopped / "checkpoints").iterdir()} == {"best.json", "step-1", "step-2"}


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Out of memory: CUDA"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Out of memory"),
        (MemoryError(), "Out of memory"),
        (SafetensorError("Error while reading: Cannot allocate memory (os error 12)"), "Out of memory"),
        (OSError(24, "Too many open files"), "too many open files"),
        (SafetensorError("Error while reading: Too many open files (os error 24)"), "too many open files"),
        (SafetensorError("Input/output error (os error 5)"), "input/output error"),
        (FileNotFoundError(f"No such file or directory: {MODEL / 'model.safetensors'}"), "cannot be opened"),
    ],
    ids=lambda value: None if isinstance(value, str) else type(value).__name__,
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_shortage_is_no_damage(
    error: Exception, words: str, wrapped: bool, stopped: Path, line: Line, held_out_cache: Path, dpocli: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    met = CheckpointException("load", {0: (error, StackSummary.from_list([]))}) if wrapped else error

    def short(*_: object, **__: object) -> None:
        raise met

    monkeypatch.setattr(storage.state_dict_loader, "load", short)
    place = stopped / "checkpoints" / "step-2"
    judged = ("evaluate", "--model", place, "--reference", held_out_cache, "--out", stopped.parent / "report")
    for result in (dpocli(*line, "--out", stopped), dpocli(*judged)):
        assert result.code == 7, result.err
        assert words in said(result), result.err
        assert "damaged" not in result.err
        assert "Remove" not in result.err
    assert {path.name for path in place.parent.iterdir()} == {"best.json", "step-1", "step-2"}


def test_a_second_damaged_one_of_the_same_step_gets_a_name_of_its_own(tmp_path: Path) -> None:
    for _ in range(3):
        (tmp_path / "step-2").mkdir()
        retention.set_aside(tmp_path / "step-2")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".damaged-step-2", ".damaged-step-2-2", ".damaged-step-2-3",
    ]  # fmt: skip


def test_a_damaged_best_one_that_is_not_the_newest(undisturbed: Path, line: Line, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    shutil.copytree(undisturbed, out)
    shutil.rmtree(out / "model")
    (out / "summary.json").unlink()
    rows = metrics_of(out)
    rows[1]["eval/loss"] = 0.0
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    following = int(min(rows[2:], key=lambda row: row["eval/loss"])["step"])
    place = out / "checkpoints" / "step-1"
    cut_off(place)
    words = (place, "that of the best step by held-out loss", f"step-{following}, then becomes OUT/model")
    result = dpocli(*line, "--out", out)
    assert_refused(result, *words)
    assert "resumes from the checkpoint before" not in said(result)
    shutil.rmtree(place)
    assert_goes_on(dpocli(*line, "--out", out), 4)
    assert json.loads((out / "summary.json").read_text())["model_step"] == following


# what is told


@pytest.mark.parametrize(("kept", "gone"), [(0, "3 of the 3 rows"), (2, "1 of the 3 rows")])
def test_rows_that_are_gone_are_told(kept: int, gone: str, stopped: Path, line: Line, dpocli: Run) -> None:
    path = stopped / "metrics.jsonl"
    rows = path.read_text().splitlines(keepends=True)
    path.write_text("".join(rows[:kept])) if kept else path.unlink()
    which = "steps 1 to 2" if not kept else "steps 2"
    result = dpocli(*line, "--out", stopped)
    assert_goes_on(result, 2, "warning:", path, gone, which, "lost for --keep-best")
    shutil.rmtree(stopped / "model")
    (stopped / "summary.json").unlink()
    assert "rows up to" not in dpocli(*line, "--out", stopped).err, "what was told is not told again"


def test_the_best_so_far_stays_the_best_without_its_row(stopped: Path, line: Line, dpocli: Run) -> None:
    write_best(stopped, 1, {"eval/loss": 0.0, "eval/rewards/accuracies": 1.0})
    (stopped / "metrics.jsonl").unlink()
    assert_goes_on(dpocli(*line, "--out", stopped), 2, "best.json")
    assert json.loads((stopped / "summary.json").read_text())["model_step"] == 1


def test_a_kill_before_the_row_is_back_does_not_lose_the_evaluation(
    stopped: Path, undisturbed: Path, line: Line, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stopped / "metrics.jsonl"
    rows = metrics_of(stopped)
    rows[-1] = {name: value for name, value in rows[-1].items() if not name.startswith("eval/")}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    (stopped / "checkpoints" / "best.json").unlink()

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "log", killed)
        assert dpocli(*line, "--out", stopped).code == 130
    assert [row["step"] for row in metrics_of(stopped)] == [0, 1]
    assert_goes_on(dpocli(*line, "--out", stopped), 2)
    expected, found = metrics_of(undisturbed), metrics_of(stopped)
    expected[2] = {name: expected[2][name] for name in expected[2] if name in found[2]}
    assert found == expected
    assert {"step", "epoch", "eval/loss", "eval/rewards/accuracies"} <= found[2].keys()
    assert (stopped / "checkpoints" / "best.json").read_bytes() == (
        undisturbed / "checkpoints" / "best.json"
    ).read_bytes()


def test_no_row_is_missed_where_none_is_gone(stopped: Path, line: Line, dpocli: Run) -> None:
    result = dpocli(*line, "--out", stopped)
    assert_goes_on(result, 2)
    assert "warning" not in result.err


def test_the_status_knows_the_step_before_the_first_new_one(
    stopped: Path, line: Line, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the first moment on, and where an older checkpoint had to do."""
    seen = []

    def look(*_: object) -> Any:
        seen.append(json.loads((stopped / "status.json").read_text())["step"])
        raise MemoryError

    cut_off(stopped / "checkpoints" / "step-2")
    with monkeypatch.context() as patch:
        patch.setattr(train_setup, "load_policy", look)
        assert dpocli(*line, "--out", stopped).code == 7
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", look)
        assert dpocli(*line, "--out", stopped).code == 7
    assert seen == [2, 1]
    assert dpocli(*line, "--out", stopped, "--loss", "ipo").code == 2
    assert json.loads((stopped / "status.json").read_text())["step"] == 1


# which checkpoints stay


def test_the_last_one_that_is_known_to_be_good_stays(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "run"
    result = dpocli("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--keep-last", 1, "--out", out)
    assert result.code == 0, result.err
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-3", "step-4"}


# a full disk


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 64 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", path]
    if os.geteuid() or subprocess.run(mount, check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


def fill(disk: Path, *, but: int) -> None:
    """But for so many bytes."""
    room = os.statvfs(disk)
    (disk / "filler").write_bytes(bytes(room.f_bavail * room.f_frsize - but))


def assert_out_of_room(result: Result, out: Path) -> None:
    assert result.code == 7, result.err
    assert "Traceback" not in result.err
    status = json.loads((out / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert not list((out / "checkpoints").glob(".*"))


def test_a_checkpoint_that_finds_no_room_leaves_the_disk_as_it_was(
    line: Line, small_disk: Path, undisturbed: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, whole = small_disk / "run", Trainer.save
    size = sum(path.stat().st_size for path in (undisturbed / "checkpoints" / "step-4").iterdir())

    def filling(self: Trainer, step: int, *more: Any) -> None:
        if step == 2:
            fill(small_disk, but=size // 2)
        whole(self, step, *more)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", filling)
        assert_out_of_room(dpocli(*line, "--out", out), out)
    (small_disk / "filler").unlink()
    assert_goes_on(dpocli(*line, "--out", out), 1)
    assert metrics_of(out) == metrics_of(undisturbed)


def test_a_model_that_finds_no_room(
    line: Line, small_disk: Path, undisturbed: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = small_disk / "run"
    size = (undisturbed / "model" / "model.safetensors").stat().st_size

    def filling(*arguments: Any) -> None:
        fill(small_disk, but=size // 2)
        save_model(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(train_outputs, "save_model", filling)
        result = dpocli(*line, "--out", out)
    assert_out_of_room(result, out)
    assert "Make room" in result.err
    assert not list(out.glob(".model*"))
    (small_disk / "filler").unlink()
    assert_goes_on(dpocli(*line, "--out", out), 4)


def test_a_state_that_finds_no_room(line: Line, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(_: Path) -> None:
        raise OSError(28, "No space left on device")

    out = tmp_path / "run"
    monkeypatch.setattr(storage, "sync_file", no_room)
    result = dpocli(*line, "--out", out)
    assert_out_of_room(result, out)
    assert "Make room" in result.err


# several processes


def own_directory(place: Path, rank: int) -> None:
    """Each process is somewhere else, as on machines that share no disk."""
    here = place / str(rank)
    here.mkdir()
    os.chdir(here)
    shared_filesystem.PATIENCE_SECONDS = 0.2


def test_machines_that_share_no_output_directory(cache: Path, tmp_path: Path) -> None:
    """Replicas: each of them writes a share of every checkpoint."""
    line = ("train", "--model", MODEL, "--reference", cache, *SETTINGS, "--out", "run")
    codes, words = ended(2, *line, prepare=partial(own_directory, tmp_path))
    assert codes == [2, 2], words
    assert "process 1 does not see what the first process has written there" in " ".join(words.split())
    assert not list((tmp_path / "0" / "run").glob(".seen*"))
    status = json.loads((tmp_path / "0" / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def blind(rank: int) -> None:
    """The second process does not see checkpoints."""
    if rank == 1:
        plain = shared_filesystem.appears
        trainer.appears = lambda path: not path.name.startswith("step-") and plain(path)


def test_all_go_by_the_checkpoint_that_the_first_process_sees(stopped: Path, line: Line) -> None:
    codes, words = ended(2, *line, "--out", stopped, prepare=blind)
    assert codes == [2, 2], words
    assert "the first process sees this checkpoint, and process 1 does not" in " ".join(words.split())


def test_the_output_directory_may_have_another_name_on_the_first_machine(
    stopped: Path, line: Line, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = retention.latest

    def mounted_elsewhere(directory: Path, up_to: int | None = None) -> tuple[int, Path] | None:
        found = plain(directory, up_to)
        return found and (found[0], Path("/mnt/elsewhere") / found[1].name)

    monkeypatch.setattr(retention, "latest", mounted_elsewhere)
    assert_goes_on(dpocli(*line, "--out", stopped), 2)


def test_two_processes_go_back_together(stopped: Path, undisturbed: Path, line: Line) -> None:
    cut_off(stopped / "checkpoints" / "step-2")
    codes, words = ended(2, *line, "--out", stopped)
    assert codes == [0, 0], words
    assert "resumes from step-1" in " ".join(words.split())
    assert [row["step"] for row in metrics_of(stopped)] == [row["step"] for row in metrics_of(undisturbed)]


def no_room_on_the_second(rank: int) -> None:
    def no_room(_: Path) -> None:
        raise OSError(28, "No space left on device")

    if rank == 1:
        storage.sync_file = no_room


def test_no_room_for_the_share_of_one_process(line: Line, tmp_path: Path) -> None:
    codes, words = ended(2, *line, "--out", tmp_path / "run", prepare=no_room_on_the_second)
    assert codes == [7, 7], words
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    assert json.loads((tmp_path / "run" / "status.json").read_text())["exit_code"] == 7


def without_the_share_of_the_second(rank: int) -> None:
    """The first process does not see what the second has written."""
    plain = shared_filesystem.appears
    storage.appears = lambda path: not path.name.startswith("shard-00002") and plain(path)


def test_a_checkpoint_that_is_nowhere_whole_is_none(line: Line, tmp_path: Path) -> None:
    codes, words = ended(2, *line, "--out", tmp_path / "run", prepare=without_the_share_of_the_second)
    assert codes == [2, 2], words
    assert "process 1 has written its piece shard-00002" in " ".join(words.split())
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
