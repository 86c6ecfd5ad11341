"""Workers that found another writer at work in their directory: each has a status, a lock and a failure of its own."""

import re
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from dpocli.artifacts.files import try_lock
from dpocli.artifacts.status import Status, StatusFile, is_alive, new_status, shard_suffix


def companion_file(directory: Path, shard: str, status: Status) -> StatusFile:
    """Where the status of a companion stands."""
    return StatusFile(directory, shard, f"-{status.host}-{status.pid}")


def failure_path(file: StatusFile) -> Path:
    """Where a companion's other ranks leave their failure."""
    return file.path.with_name(f".failure-of-{file.path.name}")


def remove_dead_companions(directory: Path, shard: str) -> None:
    """Remove what the companions of a shard left behind whose process is gone, however it ended; nothing of living ones.

    For the first writer of a shard. Whether one lives is judged by its status, and by its lock where there are locks.
    """
    name = re.compile(rf"\.status{re.escape(shard_suffix(shard))}(-.+-\d{{1,9}})\.lock")
    for lock_path in sorted(directory.glob(".status*.lock")):
        if found := name.fullmatch(lock_path.name):
            _remove_if_dead(directory, shard, found[1])


def _remove_if_dead(directory: Path, shard: str, companion: str) -> None:
    file = StatusFile(directory, shard, companion)
    # Without a status it was killed before it wrote one, or is about to.
    status = file.read() or _of_this_host(companion)
    if status is None or companion != f"-{status.host}-{status.pid}" or status.is_of_this_process or is_alive(status):
        return
    with suppress(OSError), file.lock_path.open("a") as lock:
        if try_lock(lock):
            for path in (failure_path(file), file.path, file.lock_path):
                path.unlink(missing_ok=True)


def _of_this_host(companion: str) -> Status | None:
    """What is known of a companion by the name of its files alone; None where its process cannot be looked for here."""
    here = new_status("")
    host, _, pid = companion[1:].rpartition("-")
    return replace(here, pid=int(pid), pid_started=None) if host == here.host else None
