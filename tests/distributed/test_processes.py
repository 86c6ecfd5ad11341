"""The exchanges between processes, and their time-outs."""

import os
import subprocess
import sys

import pytest
import torch
from torch import distributed as dist

from dpocli.distributed.processes import TIMEOUT, Processes, init_processes
from dpocli.errors import DataError, UsageError

TWO = """
import os, sys
import torch
from torch import distributed as dist
from dpocli.distributed.processes import TIMEOUT, init_processes
from dpocli.errors import DataError

with init_processes(torch.device("cpu")) as processes:
    assert processes.any(processes.rank == 1)
    assert not processes.any(False)
    assert processes.gather([processes.rank]) == [0, 1]
    assert processes.sum(torch.tensor([1.0, 2.0])).tolist() == [2.0, 4.0]
    assert processes.first_does(lambda: processes.rank) == 0
    try:
        with processes.agreeing():
            if processes.rank == 1:
                raise DataError("row 7")
        raise SystemExit("the error of rank 1 was lost")
    except DataError as error:
        assert str(error) == "row 7"
    for shards in (1, 2):
        mesh = processes.mesh(shards)
        assert (mesh.mesh_dim_names, tuple(mesh.shape)) == (("replicate", "shard"), (2 // shards, shards))
        assert list(mesh.get_coordinate()) == ([processes.rank, 0] if shards == 1 else [0, processes.rank])
        for name in mesh.mesh_dim_names:
            group = mesh.get_group(name)
            assert dist.get_world_size(group) == mesh.size(mesh.mesh_dim_names.index(name))
            assert group._get_backend(torch.device("cpu")).options._timeout == TIMEOUT, name
    team = processes.team(2)
    assert (team.rank, team.count, team.any(processes.rank == 0)) == (processes.rank, 2, True)
"""


def test_two_processes() -> None:
    port = 20000 + os.getpid() % 10000
    shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TWO], env=shared | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    said = [rank.communicate(timeout=120)[1] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(said)


def test_one_process_exchanges_nothing() -> None:
    alone = Processes(0, 1, torch.device("cpu"))
    assert (alone.any(True), alone.any(False), alone.gather([3]), alone.from_first(4)) == (True, False, [3], 4)
    with pytest.raises(DataError), alone.agreeing():
        raise DataError("row 7")
    with pytest.raises(UsageError, match=r"--shards 2: 1 process\(es\) cannot be cut into groups of 2"):
        alone.mesh(2)


def test_a_group_of_one() -> None:
    with init_processes(torch.device("cpu"), even_alone=True) as processes:
        assert tuple(processes.mesh(1).shape) == (1, 1)
        assert dist.group.WORLD._get_backend(torch.device("cpu")).options._timeout == TIMEOUT
    assert not dist.is_initialized()
