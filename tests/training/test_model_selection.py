"""Which evaluation is the best, when a run has stalled, and which checkpoint `best.json` names."""

import json
from pathlib import Path

import pytest
import torch

from dpocli.checkpoint.retention import best_step, latest, remove_old
from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.distributed.processes import Processes
from dpocli.run.files import write_json
from dpocli.training.model_selection import BestCheckpoint, Evaluation, ModelSelection, best, evaluations, has_stalled

ALONE = Processes(0, 1, torch.device("cpu"))


def row(step: int, loss: float, accuracy: float = 0.5) -> dict[str, float]:
    return {"step": step, "loss": 0.5, "eval/loss": loss, "eval/rewards/accuracies": accuracy}


def found(*losses: float) -> list[Evaluation]:
    return [Evaluation(10 * place, loss, 0.5) for place, loss in enumerate(losses)]


def checkpoints(directory: Path, *steps: int) -> Path:
    for step in steps:
        (directory / f"step-{step}").mkdir(parents=True)
    return directory


def steps_of(directory: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in directory.glob("step-*"))


def test_rows_without_held_out_figures_are_no_evaluations() -> None:
    rows = [{"step": 0}, row(0, 0.7), {"step": 1, "loss": 0.6}, row(2, 0.6) | {"eval/loss": None}, row(3, 0.5)]
    assert [evaluation.step for evaluation in evaluations(rows)] == [0, 3]


def test_the_best_is_the_earliest_of_equals() -> None:
    some = [Evaluation(1, 0.6, 0.7), Evaluation(2, 0.5, 0.6), Evaluation(3, 0.5, 0.6), Evaluation(4, 0.55, 0.7)]
    assert (best(some, "loss"), best(some, "accuracy")) == (some[1], some[3])  # of equal accuracies, the lower loss
    assert best([], "loss") is None


@pytest.mark.parametrize(
    ("losses", "patience", "stalled"),
    [
        ([], 1, False),
        ([0.7], 1, False),
        ([0.7, 0.6], 1, False),
        ([0.7, 0.7], 1, True),  # the same is no improvement
        ([0.7, 0.8, 0.75], 3, False),
        ([0.7, 0.8, 0.75, 0.71], 3, True),  # never below the untrained policy
        ([0.7, 0.6, 0.65, 0.62, 0.59], 3, False),
        ([0.7, 0.6, 0.65, 0.62, 0.61], 3, True),
    ],
)
def test_stalled_is_so_many_evaluations_without_a_lower_loss(losses: list[float], patience: int, stalled: bool) -> None:
    assert has_stalled(found(*losses), patience) is stalled


def test_the_best_checkpoint_is_named_and_read(tmp_path: Path) -> None:
    directory = checkpoints(tmp_path, 10, 20)
    kept = BestCheckpoint(directory, "loss", [])
    assert best_step(directory) is None
    assert kept.is_beaten_by(Evaluation(10, 0.9, 0.5))
    kept.name(Evaluation(10, 0.6, 0.5))
    assert best_step(directory) == 10
    assert json.loads((directory / "best.json").read_text()) == {
        "by": "loss", "step": 10, "loss": 0.6, "accuracy": 0.5,
    }  # fmt: skip
    assert not kept.is_beaten_by(Evaluation(20, 0.6, 0.9))
    assert kept.is_beaten_by(Evaluation(20, 0.59, 0.1))


@pytest.mark.parametrize(
    ("there", "named", "expected"),
    [
        ((10, 20, 30), 10, 20),  # killed between the checkpoint and its name
        ((10, 20, 30), None, 20),
        ((10, 30), 10, 30),  # the best was removed by hand: it may not keep a later one from being the best
        ((), 20, None),
        ((10, 20, 30), 20, 20),
    ],
)
def test_a_start_names_the_best_that_is_there(
    there: tuple[int, ...], named: int | None, expected: int | None, tmp_path: Path
) -> None:
    directory = checkpoints(tmp_path / "checkpoints", *there)
    directory.mkdir(exist_ok=True)
    if named:
        write_json(directory / "best.json", {"by": "loss", "step": named, "loss": 0.1, "accuracy": 1.0})
    (directory / ".best.json~host~1~aa.tmp").touch()
    BestCheckpoint(directory, "loss", found(0.7, 0.65, 0.5, 0.6))
    assert best_step(directory) == expected
    assert not list(directory.glob(".*"))


@pytest.mark.parametrize("text", ["", "[]", '{"step": "20"}', '{"step": 40}', '{"stop": 20}'])
def test_a_file_that_names_no_checkpoint_keeps_none(text: str, tmp_path: Path) -> None:
    directory = checkpoints(tmp_path, 20, 30)
    (directory / "best.json").write_text(text)
    assert best_step(directory) is None


def test_the_best_is_not_counted_and_not_removed(tmp_path: Path) -> None:
    directory = checkpoints(tmp_path, 10, 20, 30, 40, 50)
    write_json(directory / "best.json", {"step": 20})
    remove_old(directory, 2, 50)
    assert steps_of(directory) == [20, 40, 50]
    write_json(directory / "best.json", {"step": 50})
    remove_old(directory, 2, 50)
    assert steps_of(directory) == [20, 40, 50]
    (directory / "best.json").unlink()
    remove_old(directory, 2, 50)
    assert steps_of(directory) == [40, 50]


@pytest.mark.parametrize(
    ("keep_last", "sound", "kept"),
    [
        (1, 49, [40, 50]),
        (1, 39, [30, 50]),
        (1, 50, [50]),
        (2, 49, [40, 50]),
        (2, 9, [40, 50]),
        (3, 19, [10, 30, 40, 50]),
    ],
)
def test_the_newest_that_is_known_to_be_good_is_not_removed(
    keep_last: int, sound: int, kept: list[int], tmp_path: Path
) -> None:
    directory = checkpoints(tmp_path, 10, 20, 30, 40, 50)
    remove_old(directory, keep_last, sound)
    assert steps_of(directory) == kept


def test_the_newest_up_to_a_step(tmp_path: Path) -> None:
    directory = checkpoints(tmp_path, 10, 20, 30)
    assert latest(directory) == (30, directory / "step-30")
    assert latest(directory, up_to=29) == (20, directory / "step-20")
    assert latest(directory, up_to=9) is None


LOSSES = (0.7, 0.6, 0.5, 0.55, 0.45, 0.46, 0.47, 0.48)


@pytest.mark.parametrize("kill_after", range(1, len(LOSSES)))
def test_a_selection_that_is_interrupted_ends_as_if_it_had_not_been(kill_after: int, tmp_path: Path) -> None:
    """Killed after the row of an evaluation, before its checkpoint or before that is named: the step is done again."""

    def drive(run: Path, kills: list[int]) -> list[tuple[int, bool, bool]]:
        options = build_options(
            TrainOptions, model="m", out=run, reference="r", eval_fraction=0.1, keep_best="loss", early_stopping=3
        )
        rows, decided, done = [row(0, LOSSES[0])], [], 0
        directory = checkpoints(run / "checkpoints")
        directory.mkdir(parents=True)
        selection = ModelSelection(options, rows, ALONE)
        while done < len(LOSSES) - 1 and not selection.has_stalled():
            step = done + 1
            selection.add(row(step, LOSSES[step]))
            entry = (step, selection.is_best_at(step), selection.has_stalled())
            if kills and kills[0] == step:
                kills.pop()
                if step % 2:  # the checkpoint is there, and best.json does not know of it
                    checkpoints(directory, step)
                    rows.append(row(step, LOSSES[step]))
                    decided.append(entry)
                    done = step
                selection = ModelSelection(options, rows, ALONE)
                continue
            rows.append(row(step, LOSSES[step]))
            if entry[1]:
                checkpoints(directory, step)
            selection.saved(step)
            decided.append(entry)
            done = step
        return decided

    undisturbed = drive(tmp_path / "undisturbed", [])
    assert [step for step, is_best, _ in undisturbed if is_best] == [1, 2, 4]
    assert [step for step, _, ends in undisturbed if ends] == [7]
    assert drive(tmp_path / "killed", [kill_after]) == undisturbed
    assert best_step(tmp_path / "killed/checkpoints") == best_step(tmp_path / "undisturbed/checkpoints") == 4
