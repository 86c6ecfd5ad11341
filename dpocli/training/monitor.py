"""What a run reports while it trains: rows of metrics, trackers, the live line, warnings, curves, time and memory."""

import hashlib
import importlib.util
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Self

import torch

from dpocli.checkpoint.state import Spent
from dpocli.config.commands import TrainOptions
from dpocli.config.flags import values_of
from dpocli.console.console import Console
from dpocli.console.progress import Progress
from dpocli.errors import UsageError
from dpocli.report.training_curves import draw_curves
from dpocli.run.directory import RunDirectory
from dpocli.training.diagnostics import Diagnostics
from dpocli.training.trainer import StepOutcome, Trainer

SECONDS_BETWEEN_DRAWINGS = 30.0

DRAWING_TAKES_AT_MOST = 0.02
"""Share of the time that goes into curves between the first step and the last."""

Work = Literal["training", "evaluation", "checkpoints"]

KINDS: tuple[Work, ...] = ("training", "evaluation", "checkpoints")


class RunStats:
    """The seconds and the memory of a run, over all its starts. Steps that are repeated after a kill count once.

    Args:
        device: whose memory is measured; on a CPU that of the process.
        saved: the totals stored in the checkpoint that the run resumes from; None where there are none.
    """

    def __init__(self, device: torch.device, saved: Spent | None = None) -> None:
        self._device = device
        self._before = dict(saved.seconds) if saved else {}
        self._peak_before = saved.peak_memory_bytes if saved else 0
        self._now = dict.fromkeys(KINDS, 0.0)
        self.starts = saved.starts + 1 if saved else 1
        """How often the run was started or resumed, as far as checkpoints say."""
        self.notes: dict[str, Any] = dict(saved.notes) if saved else {}
        """What is measured once, at the first start, and reported at the end."""

    @contextmanager
    def timing(self, work: Work) -> Iterator[None]:
        """Count the seconds of the block."""
        began = perf_counter()
        try:
            yield
        finally:
            self._now[work] += perf_counter() - began

    def seconds(self, work: Work) -> float:
        return self._before.get(work, 0.0) + self._now[work]

    def seconds_of_this_start(self, work: Work) -> float:
        return self._now[work]

    @property
    def peak_bytes(self) -> int:
        """The largest amount of memory at once: allocated on the GPU, or resident in this process."""
        return max(self._peak_before, peak_memory(self._device))

    def to_json(self) -> dict[str, Any]:
        return {
            "starts": self.starts,
            "seconds": {kind: round(self.seconds(kind), 3) for kind in KINDS},
            "peak_memory_bytes": self.peak_bytes,
            "notes": self.notes,
        }


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that tensors on a GPU took at once; on a CPU, the most that this process had in memory."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # KiB on Linux; elsewhere a guess


class Monitor:
    """Reports a run. The trackers are open inside `with`, on the first process.

    Args:
        trainer: of the run.
        out: its directory.
        stats: its time and memory.
        done: the step that it resumes from; 0 for a new run.
        console: for the live line and warnings.
    """

    def __init__(self, trainer: Trainer, out: RunDirectory, stats: RunStats, done: int, console: Console) -> None:
        self._trainer, self._out, self.stats, self._done, self._console = trainer, out, stats, done, console
        self._diagnostics = Diagnostics(trainer.setup.loss, trainer.setup.schedule)
        self._trackers: list[_Tracker] = []
        self._progress: Progress | None = None
        self._next_drawing = perf_counter() + SECONDS_BETWEEN_DRAWINGS
        self._draws = trainer.setup.processes.is_first
        self._slowest_save = 0.0

    def __enter__(self) -> Self:
        if self._trainer.setup.processes.is_first:
            self._trackers = open_trackers(self._trainer.setup.options, self._done + 1)
        return self

    def __exit__(self, *exception: object) -> None:
        for _, close in self._trackers:
            close()

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Read the rows of earlier starts; their warnings are not repeated."""
        for row in rows:
            self._diagnostics.see(row)

    def log(self, row: Mapping[str, float]) -> None:
        """Append a row to `metrics.jsonl`, and warn of what it shows."""
        self._out.metrics.append(row)
        for write, _ in self._trackers:
            write(row)
        for warning in self._diagnostics.see(row):
            self._console.warn(f"Step {warning.step}: {warning.text}")

    def warn(self, text: str) -> None:
        """Warn of something that does not end the run."""
        self._console.warn(text)

    @contextmanager
    def progress(self) -> Iterator[None]:
        """The live line, while there are steps."""
        last = self._trainer.setup.schedule.num_steps
        with self._console.progress(last, "train", unit="steps", initial=self._done) as self._progress:
            yield

    def show(self, outcome: StepOutcome) -> None:
        """Show a step on the live line."""
        assert self._progress
        if not self._trainer.setup.processes.is_first:
            return
        share = self._trainer.throughput.share_of_the_rate(self.stats.seconds_of_this_start("training"))
        self._progress.update(
            pairs=outcome.num_pairs,
            tokens=outcome.num_tokens,
            loss=outcome.metrics["loss"],
            accuracy=outcome.metrics["rewards/accuracies"],
            margin=outcome.metrics["rewards/margins"],
            MFU=None if share is None else f"{share:.0%}",
            memory=f"{self.stats.peak_bytes / 2**30:.1f} GiB",
        )

    @contextmanager
    def saving(self) -> Iterator[None]:
        """Around a checkpoint: report its time where it grows, and warn where it is too long to survive a preemption."""
        began = perf_counter()
        with self.stats.timing("checkpoints"):
            yield
        seconds, grace = perf_counter() - began, self._trainer.setup.options.checkpoints.grace_seconds
        if seconds <= 2 * self._slowest_save:
            return
        self._slowest_save = seconds
        self._console.say(f"Saving a checkpoint took {seconds:.1f} s.")
        if seconds > grace:
            self._console.warn(
                f"That is longer than the {grace:g} s between a stop signal and the kill (--grace-seconds): a run that is "
                "preempted then loses the steps since its last checkpoint. Raise the launcher's limit (torchrun "
                "--shutdown-timeout, SLURM's --signal=B:USR1@SECONDS) or save more often with --save-every."
            )

    def draw(self) -> None:
        """Draw `curves.png` of the rows so far, unless that would take too much of the run's time."""
        began = perf_counter()
        if not self._draws or began < self._next_drawing:
            return
        self._draws = draw_curves_or_warn(self._out, self._console)
        ended = perf_counter()
        self._next_drawing = ended + max(SECONDS_BETWEEN_DRAWINGS, (ended - began) / DRAWING_TAKES_AT_MOST)


def draw_curves_or_warn(out: RunDirectory, console: Console) -> bool:
    """Draw `curves.png`; False where that fails, with a warning: plotting errors never fail a run."""
    try:
        draw_curves(out.metrics.rows(), out.path / "curves.png")
    except Exception as error:
        console.warn(f"curves.png could not be drawn ({type(error).__name__}: {error}). The run continues without it.")
        return False
    return True


_Tracker = tuple[Callable[[Mapping[str, float]], None], Callable[[], None]]
"""Takes a row of metrics; and closes."""


def check_trackers(names: Sequence[str]) -> None:
    """Raises UsageError where a tracker of `--track` is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"--track {name}: it is not installed. `pip install 'dpocli[trackers]'`, or leave the option out."
            )


def open_trackers(options: TrainOptions, first_step: int) -> list[_Tracker]:
    """Open the trackers of `--track`, for steps from this one on."""
    openers = {"tensorboard": _tensorboard, "wandb": _wandb}
    return [openers[name](options, first_step) for name in options.logging.track]


def _tensorboard(options: TrainOptions, first_step: int) -> _Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(options.out / "tensorboard"), purge_step=first_step if first_step > 1 else None)

    def write(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, int(row["step"]))
        writer.flush()

    return write, writer.close


def _wandb(options: TrainOptions, _first_step: int) -> _Tracker:
    import wandb

    # The path of the directory names the run, so that a resumed run goes on in the same curves and no other does.
    path = options.out.resolve()
    run = wandb.init(
        project="dpocli",
        id=f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}",
        name=path.name,
        resume="allow",
        dir=str(options.out),
        config=values_of(options),
    )
    return lambda row: run.log(dict(row), step=int(row["step"])), run.finish
