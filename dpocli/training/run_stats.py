"""What a run has taken so far: seconds by what they were spent on, and memory. Kept in checkpoints, so that it adds up."""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch

Work = Literal["training", "evaluation", "checkpoints"]

KINDS: tuple[Work, ...] = ("training", "evaluation", "checkpoints")


class RunStats:
    """The seconds and the memory of a run, over all its starts. Steps that a kill made it do again count once.

    Args:
        device: whose memory is looked at; on a CPU that of the process.
        clock: seconds, for tests.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self._device, self._clock = device, clock
        self._before: dict[str, float] = {}
        self._peak_before = 0
        self._now = dict.fromkeys(KINDS, 0.0)
        self.starts = 1
        """How often the run was started or went on, as far as checkpoints tell."""
        self.notes: dict[str, Any] = {}
        """What is measured once, at the first start, and told at the end."""

    @contextmanager
    def of(self, work: Work) -> Iterator[None]:
        """Around a piece of work."""
        began = self._clock()
        try:
            yield
        finally:
            self._now[work] += self._clock() - began

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

    def check_stop(self, saved: Mapping[str, Any]) -> None:
        """Adds what a checkpoint says of the starts before; nothing where it is of a version that wrote no such thing."""
        if saved:
            self._before, self._peak_before = dict(saved["seconds"]), saved["peak_memory_bytes"]
            self.starts, self.notes = saved["starts"] + 1, dict(saved["notes"])


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
