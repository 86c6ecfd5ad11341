"""The processes of a run, as the launcher's environment describes them, and what they say to each other.

One engine: replicas × shards, gloo on CPU and NCCL on GPUs, so that what the tests run is what clusters run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not listed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from dpocli.distributed.launch import Launcher, launched, slurm_address
from dpocli.errors import DpoError, UsageError

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""Rank 0 may hash a large model, or write a checkpoint, while the others wait."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all. Where there is only one, every exchange returns what it was given."""

    rank: int
    count: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Which of all processes these are; None: all."""
    team_mesh: DeviceMesh | None = None
    """Of a `team`."""

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over processes."""
        if self.count > 1:
            values = values.clone()
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether the flag is up on any process: how all agree on the step at which to stop."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item()) if self.count > 1 else flag

    def gather(self, items: list[T]) -> list[T]:
        """The items of every process, in order of rank, on every process."""
        if self.count == 1:
            return items
        everywhere: list[list[T]] = [[]] * self.count
        dist.all_gather_object(everywhere, items, group=self.group)
        return list(chain.from_iterable(everywhere))

    def wait(self) -> None:
        """Until all processes are here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def from_first(self, value: T) -> T:
        """What the first process has, on every process."""
        return self.gather([value])[0]

    def first_does(self, work: Callable[[], T]) -> T:
        """What the first process finds, on every process. Its error is the error of all, which else would wait for it."""
        found: list[T] = []
        with self.agreeing():
            if self.is_first:
                found = [work()]
        return self.gather(found)[0]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """All processes leave the block well, or all with the same error of the tree: that of the first one that met any.

        In the block there may be no exchange that a process with an error would not come to.
        """
        own: DpoError | None = None
        try:
            yield
        except DpoError as error:
            own = error
        errors = [error for error in self.gather([own]) if error]
        if own and errors[0].args == own.args:
            raise own  # with where it came from
        if errors:
            raise errors[0]

    def mesh(self, shards: int) -> DeviceMesh:
        """The mesh replicas × shards of all processes.

        Raises:
            UsageError: they do not come out even.
        """
        if self.count % shards:
            raise UsageError(
                f"--shards {shards}: {self.count} process(es) cannot be cut into groups of {shards}. Start a multiple of {shards}, "
                "for example with torchrun --nproc-per-node."
            )
        shape = (self.count // shards, shards)
        return init_device_mesh(self.device.type, shape, mesh_dim_names=("replicate", "shard"))

    def team(self, size: int) -> "Processes":
        """The processes that share one copy of a model with this one: it is with them alone that it keeps step.

        Raises:
            UsageError: the processes do not come out even.
        """
        if size == 1:
            return Processes(0, 1, self.device)
        mesh = self.mesh(size)["shard"]
        return Processes(mesh.get_local_rank(), size, self.device, mesh.get_group(), mesh)


@contextmanager
def init_processes(
    device: torch.device, launcher: Launcher = "torchrun", *, even_alone: bool = False
) -> Iterator[Processes]:
    """Joins the process group that the launcher's environment names, and leaves it at the end.

    Args:
        device: of this process.
        launcher: whose environment it is.
        even_alone: make a group of one where there is no launcher (sharding needs a group).
    """
    rank, count, _ = launched(launcher)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if count == 1 and not even_alone:
        yield Processes(0, 1, device)
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if count == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1, timeout=TIMEOUT)
    elif launcher == "slurm":
        meeting = f"tcp://{slurm_address()}"
        dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=count, timeout=TIMEOUT)
    else:
        dist.init_process_group(backend, timeout=TIMEOUT)
    try:
        yield Processes(rank, count, device)
    finally:
        dist.destroy_process_group()
