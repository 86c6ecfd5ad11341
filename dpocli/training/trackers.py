"""Metrics to TensorBoard and Weights & Biases, for those who ask for it with `--track`."""

import hashlib
import importlib.util
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Self

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import values_of
from dpocli.errors import UsageError


class Trackers:
    """Sends each logged row to the trackers of `--track`; from one process only."""

    def __init__(self, options: TrainOptions, first_step: int = 1, *, enabled: bool) -> None:
        self._sinks = [_OPENERS[name](options, first_step) for name in options.logging.track] if enabled else []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for _, close in self._sinks:
            close()

    def log(self, row: Mapping[str, float]) -> None:
        """One row of `metrics.jsonl`."""
        for write, _ in self._sinks:
            write(row)


_Sink = tuple[Callable[[Mapping[str, float]], None], Callable[[], None]]


def _tensorboard(options: TrainOptions, first_step: int) -> _Sink:
    from torch.utils.tensorboard import SummaryWriter

    writer: Any = SummaryWriter(str(options.out / "tensorboard"), purge_step=first_step if first_step > 1 else None)

    def write(row: Mapping[str, float]) -> None:
        for name, value in row.items():
            if name != "step":
                writer.add_scalar(name, value, int(row["step"]))
        writer.flush()

    return write, writer.close


def _wandb(options: TrainOptions, _first_step: int) -> _Sink:
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


def check_trackers(options: TrainOptions) -> None:
    """Raises UsageError where a tracker of `--track` is not installed."""
    for name in options.logging.track:
        if importlib.util.find_spec(name) is None:
            raise UsageError(
                f"--track {name}: it is not installed. `pip install 'dpocli[trackers]'`, or leave the option out."
            )


_OPENERS: Mapping[str, Callable[[TrainOptions, int], _Sink]] = {"tensorboard": _tensorboard, "wandb": _wandb}
