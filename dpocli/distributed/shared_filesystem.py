"""Check that all processes of a run see the same output directory, before anything depends on it."""

import secrets
import time
from collections.abc import Callable
from pathlib import Path

from dpocli.distributed.processes import Processes
from dpocli.errors import UsageError
from dpocli.run.files import translating_file_errors

PATIENCE_SECONDS = 60.0
"""How long a network file system may hide a directory that another machine has made."""

_NAME = ".seen-by-all-"


def check_shared(directory: Path, processes: Processes) -> None:
    """Write a small file on the first process and look for it on all others. Collective: call on every rank.

    Replicas need it as shards do: every process writes its share of a checkpoint's tensors.

    Args:
        directory: that the first process has made.
        processes: of the run.

    Raises:
        UsageError: on all processes, where one of them does not see the file.
    """
    if processes.count == 1:
        return
    probe = directory / processes.from_first(_NAME + secrets.token_hex(8))
    try:
        with processes.agreeing():
            if processes.is_first:
                _write(probe)
        with processes.agreeing():
            if not appears(probe):
                raise UsageError(
                    f"--out {directory}: process {processes.rank} does not see what the first process has written there. "
                    "Every process writes its share of a checkpoint, so give a directory on a file system that all "
                    "machines of the run share (and a path that means the same on all of them)."
                )
    finally:
        if processes.is_first:
            probe.unlink(missing_ok=True)


def appears(path: Path, sleep: Callable[[float], None] = time.sleep) -> bool:
    """Whether a path exists, now or within a minute: network file systems remember that it did not."""
    waited, pause = 0.0, 0.05
    while not path.exists():
        if waited >= PATIENCE_SECONDS:
            return False
        sleep(pause)
        waited, pause = waited + pause, min(2 * pause, 5.0)
    return True


def _write(probe: Path) -> None:
    for leftover in probe.parent.glob(f"{_NAME}*"):  # of a killed start
        leftover.unlink(missing_ok=True)
    with translating_file_errors(f"Writing into --out {probe.parent}"):
        probe.touch()
