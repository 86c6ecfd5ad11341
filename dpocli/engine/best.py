"""`checkpoints/best.json`: which checkpoint is the best by held-out pairs. The one that it names is never removed.

The file is written after the checkpoint that it names, and the next best takes its place before the checkpoint of the
last best may go: at any moment it names a whole checkpoint, or there is none.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dpocli.artifacts.files import read_json, write_json
from dpocli.engine.evaluations import By, Evaluation, best

NAME = "best.json"


def best_step(directory: Path) -> int | None:
    """The step that `best.json` names; None where there is no such file, or no such checkpoint."""
    value = read_json(directory / NAME)
    step = value.get("step") if isinstance(value, dict) else None
    return step if isinstance(step, int) and (directory / f"step-{step}").is_dir() else None


class BestCheckpoint:
    """The best checkpoint so far; for the first process, which alone writes.

    Args:
        directory: of all checkpoints.
        by: what is compared.
        found: the evaluations up to the step that a run goes on from. Of these only such count as have a checkpoint: one
            that is lost (removed by hand) shall not keep a later one from being the best.
        done: that step. What `best.json` says of a step up to it counts too, should its row be lost.
    """

    def __init__(self, directory: Path, by: By, found: Sequence[Evaluation], done: int = 0) -> None:
        self._directory, self._by = directory, by
        for leftover in directory.glob(f".{NAME}~*.tmp"):  # of a killed writer: there is only one at a time
            leftover.unlink(missing_ok=True)
        known = {one.step: one for one in [*self._named_until(done), *found]}
        self.standing = best([known[step] for step in sorted(known) if (directory / f"step-{step}").is_dir()], by)
        if self.standing is None:
            (directory / NAME).unlink(missing_ok=True)
        else:
            self.name(self.standing)

    def _named_until(self, done: int) -> list[Evaluation]:
        """What `best.json` says, where it was compared as now; a later step than `done` is made again."""
        value = read_json(self._directory / NAME)
        if not isinstance(value, dict) or value.pop("by", None) != self._by:
            return []
        try:
            named = Evaluation(int(value["step"]), float(value["loss"]), float(value["accuracy"]))
        except (KeyError, TypeError, ValueError):
            return []
        return [named] if named.step <= done else []

    def is_beaten_by(self, evaluation: Evaluation) -> bool:
        return self.standing is None or evaluation.is_better_than(self.standing, self._by)

    def name(self, evaluation: Evaluation) -> None:
        """Writes down that the checkpoint of this evaluation, which is there, is the best."""
        assert (self._directory / f"step-{evaluation.step}").is_dir()
        self.standing = evaluation
        value = {"by": self._by} | asdict(evaluation)
        if read_json(self._directory / NAME) != value:
            write_json(self._directory / NAME, value)
