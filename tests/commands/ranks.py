"""A command line on several processes that know of each other, as a launcher would start it: forked, so that it is cheap."""

import multiprocessing
import os
import socket
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from dpocli.cli import run_command_line
from dpocli.engine.stop import EarlyStop

_FORKED = multiprocessing.get_context("forkserver")
_FORKED.set_forkserver_preload(["tests.commands.warmed_up"])
PATIENCE = 300


def on_processes(count: int, *line: object) -> None:
    """Runs a command line on `count` processes, all of which must end well."""
    codes, said = ended(count, *line)
    assert codes == [0] * count, said


def ended(count: int, *line: object) -> tuple[list[int | None], str]:
    """The exit code of each process, and what all of them said."""
    with tempfile.TemporaryDirectory() as directory, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        logs = [Path(directory) / str(rank) for rank in range(count)]
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
        processes = [
            _FORKED.Process(
                target=_work,
                args=([str(word) for word in line], logs[rank], meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}),
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


def _work(line: list[str], log: Path, environment: Mapping[str, str]) -> None:
    early_stop = EarlyStop()
    os.environ |= environment
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    torch.set_num_threads(1)
    sys.exit(run_command_line(line, early_stop))
