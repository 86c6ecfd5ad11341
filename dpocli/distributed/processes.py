"""The processes of a run and the exchanges between them.

One engine: replicas × shards, gloo on CPU and NCCL on GPUs, so that clusters run what the tests run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, but not listed
from torch.distributed.device_mesh import DeviceMesh

from dpocli.distributed.launch import Launcher, launched, slurm_address
from dpocli.distributed.signals import StopFlag
from dpocli.errors import DpoError, UsageError
from dpocli.run.directory import RunDirectory

T = TypeVar("T")

TIMEOUT = timedelta(hours=2)
"""For every group: rank 0 may hash a large model, or write a checkpoint, while the others wait."""


@dataclass(frozen=True, slots=True)
class Processes:
    """This process among all. With only one process, every exchange returns its input."""

    rank: int
    count: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """Process group of these processes; None: all."""
    team_mesh: DeviceMesh | None = None
    """Mesh of a `team`."""

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
        """Whether the flag is set on any process. On the CPU, so that no GPU is waited for."""
        return bool(self.sum(torch.tensor(int(flag))).item())

    def gather(self, items: list[T]) -> list[T]:
        """The items of every process, in order of rank, on every process."""
        if self.count == 1:
            return items
        everywhere: list[list[T]] = [[]] * self.count
        dist.all_gather_object(everywhere, items, group=self.group)
        return list(chain.from_iterable(everywhere))

    def wait(self) -> None:
        """Wait until all processes are here."""
        if self.count > 1:
            dist.barrier(group=self.group)

    def from_first(self, value: T) -> T:
        """The value of the first process, on every process."""
        return self.gather([value])[0]

    def first_does(self, work: Callable[[], T]) -> T:
        """Do work on the first process alone; its result, or its error, on every process."""
        found: list[T] = []
        with self.agreeing():
            if self.is_first:
                found = [work()]
        return self.gather(found)[0]

    @contextmanager
    def agreeing(self) -> Iterator[None]:
        """Leave the block on all processes without an error, or on all with the first DpoError of any.

        The block must have no exchange that a process with an error would not reach.
        """
        own: DpoError | None = None
        try:
            yield
        except DpoError as error:
            own = error
        errors = [error for error in self.gather([own]) if error]
        if own and errors[0].args == own.args:
            raise own  # with its traceback
        if errors:
            raise errors[0]

    def mesh(self, shards: int) -> DeviceMesh:
        """The mesh replicas × shards of all processes.

        Raises:
            UsageError: the number of processes is no multiple of `shards`.
        """
        if self.count % shards:
            raise UsageError(
                f"--shards {shards}: {self.count} process(es) cannot be cut into groups of {shards}. Start a multiple of {shards}, "
                "for example with torchrun --nproc-per-node."
            )
        ranks = torch.arange(self.count).view(-1, shards)
        groups = [_subgroup(ranks.T), _subgroup(ranks)]
        return DeviceMesh.from_group(groups, self.device.type, ranks, mesh_dim_names=("replicate", "shard"))

    def team(self, size: int) -> "Processes":
        """The processes that share one copy of a model with this one. They exchange among themselves only.

        Raises:
            UsageError: the number of processes is no multiple of `size`.
        """
        if size == 1:
            return Processes(0, 1, self.device)
        mesh = self.mesh(size)["shard"]
        return Processes(mesh.get_local_rank(), size, self.device, mesh.get_group(), mesh)


def _subgroup(ranks: Tensor) -> dist.ProcessGroup:
    """The group of this process's row of `ranks`. `init_device_mesh` would give it the default time-out of 30 minutes."""
    if len(ranks) == 1:
        assert dist.group.WORLD
        return dist.group.WORLD
    group: dist.ProcessGroup
    group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=TIMEOUT)  # type: ignore[no-untyped-call]
    return group


@dataclass(frozen=True, slots=True)
class StopRequest:
    """A signal, or the file OUT/stop."""

    flag: StopFlag
    out: RunDirectory
    processes: Processes

    def agreed(self) -> bool:
        """Whether any process was asked to stop. Collective."""
        return self.processes.any(bool(self.flag) or self.out.stop_requested())


@contextmanager
def init_processes(
    device: torch.device, launcher: Launcher = "torchrun", *, even_alone: bool = False
) -> Iterator[Processes]:
    """Join the process group that the launcher's environment names, and leave it at the end.

    Args:
        device: of this process.
        launcher: whose environment it is.
        even_alone: make a group of one where there is no launcher (sharding needs a group).
    """
    rank, count, _ = launched(launcher)
    if count == 1 and not even_alone:
        yield Processes(0, 1, device)
        return
    where: dict[str, Any] = {}
    if count == 1:
        where = {"store": HashStore(), "rank": 0, "world_size": 1}
    elif launcher == "slurm":
        where = {"init_method": f"tcp://{slurm_address()}", "rank": rank, "world_size": count}
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", timeout=TIMEOUT, **where)
    try:
        yield Processes(rank, count, device)
    finally:
        dist.destroy_process_group()
