"""A command line on several processes that know of each other, as a launcher would start it: forked, so that it is cheap."""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch

from dpocli.cli import run_command_line
from dpocli.distributed.signals import EarlyStop
from tests.commands.shortcuts import shortened

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.commands.warmed_up"])
PATIENCE = 300
TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "dpocli")
"""For the tests of what only a real launcher does."""


Environment = Callable[[int, int, int], dict[str, str]]
"""Of a process, from its rank, the number of processes and a port that is free."""


def torchrun(rank: int, count: int, port: int) -> dict[str, str]:
    """As torchrun and accelerate set it."""
    numbers = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
    return {"MASTER_ADDR": "127.0.0.1"} | {name: str(number) for name, number in numbers.items()}


def srun(rank: int, count: int, port: int) -> dict[str, str]:
    """As srun sets it for the tasks of a step, in a job whose script chose the port."""
    numbers = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_STEP_NUM_TASKS": count, "MASTER_PORT": port}
    return {"SLURM_STEP_NODELIST": "localhost"} | {name: str(number) for name, number in numbers.items()}


def on_processes(count: int, *line: object, launcher: Environment = torchrun) -> None:
    """Runs a command line on `count` processes, all of which must end well."""
    codes, said = ended(count, *line, launcher=launcher)
    assert codes == [0] * count, said


def ended(
    count: int, *line: object, launcher: Environment = torchrun, prepare: Callable[[int], None] | None = None
) -> tuple[list[int | None], str]:
    """The exit code of each process, and what all of them said. `prepare` is called in each before, with its rank."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        logs = [Path(directory) / str(rank) for rank in range(count)]
        words = shortened(line)
        processes = [
            _FORKED.Process(
                target=_work,
                args=(words, logs[rank], launcher(rank, count, port), partial(prepare, rank) if prepare else None),
            )
            for rank in range(count)
        ]
        probe.close()
        for process in processes:
            process.start()
        for process in processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
                process.join()
        return [process.exitcode for process in processes], "\n".join(log.read_text() for log in logs if log.exists())


def _work(line: list[str], log: Path, environment: Mapping[str, str], prepare: Callable[[], None] | None) -> None:
    early_stop = EarlyStop()
    os.environ |= environment
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    if prepare:
        prepare()
    sys.exit(run_command_line(line, early_stop))
