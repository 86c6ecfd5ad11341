"""The directory of all checkpoints of a run: which are there, which stay, and which are out of the way."""

import re
import shutil
from itertools import count
from pathlib import Path

from dpocli.run.files import read_json, sync_directory

_NAME = re.compile(r"step-(\d+)")


def latest(directory: Path, up_to: int | None = None) -> tuple[int, Path] | None:
    """Step and path of the newest checkpoint, or None. A half-written one has another name and is never seen.

    Args:
        directory: of all checkpoints of the run.
        up_to: the last step to be looked at, where not all count.
    """
    found = [(int(match[1]), path) for path in _entries(directory) if (match := _NAME.fullmatch(path.name))]
    return max((entry for entry in found if up_to is None or entry[0] <= up_to), default=None)


def set_aside(path: Path) -> Path:
    """Gives a damaged checkpoint a name under which no start looks for one, and returns it. Nothing is removed."""
    wanted = path.with_name(f".damaged-{path.name}")
    names = (wanted if number == 1 else wanted.with_name(f"{wanted.name}-{number}") for number in count(1))
    free = next(name for name in names if not name.exists())
    path.rename(free)
    sync_directory(path.parent)
    return free


def remove_unfinished(directory: Path) -> None:
    """Clears what a killed writer left behind."""
    for path in _entries(directory):
        if path.name.startswith(".step-"):
            shutil.rmtree(path, ignore_errors=True)


def remove_old(directory: Path, keep_last: int, last_finite_step: int) -> None:
    """Removes checkpoints that nobody needs any more.

    What stays: the newest `keep_last`; the one that `best.json` names, which does not count among these; and the newest
    one up to `last_finite_step`, whether it is among these or not. A checkpoint is only known to be good when the step after
    it went well: with `keep_last` 1 there are two of them, since the newest one alone may hold weights that an update
    has just broken. With 2 or more this takes no more room.

    Args:
        directory: of all checkpoints.
        keep_last: at least 1.
        sound_step: the last step whose weights are known to be good.
    """
    steps = sorted(int(match[1]) for path in _entries(directory) if (match := _NAME.fullmatch(path.name)))
    best, sound = best_step(directory), latest(directory, up_to=last_finite_step)
    for step in [step for step in steps if step != best][:-keep_last]:
        if sound is None or step != sound[0]:
            shutil.rmtree(directory / f"step-{step}", ignore_errors=True)


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []


NAME = "best.json"


def best_step(directory: Path) -> int | None:
    """The step that `best.json` names; None where there is no such file, or no such checkpoint."""
    value = read_json(directory / NAME)
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) and (directory / f"step-{step}").is_dir() else None
