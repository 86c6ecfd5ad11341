"""Atomic and synced file writes, file locks, and file-system errors as errors of the tree."""

import contextlib
import errno
import fcntl
import json
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from dpocli.errors import DpoError, ResourceError, UsageError
from dpocli.run.process import host_name, start_time

STATE_NAME = "state.json"
"""File of a checkpoint directory that describes it."""

ABANDONED_HERE_SECONDS = 60.0
"""Age from which a temporary file of a dead process of this host is removed. Containers may share a host name and see
only their own processes; a live writer's file is younger than this."""

ABANDONED_ELSEWHERE_SECONDS = 24 * 3600.0
"""The same for a process of another host: nothing here takes a day to write."""

_TEMPORARY_NAME = re.compile(r"\..+~(?P<host>[^~]*)~(?P<pid>\d+)~[0-9a-f]+\.tmp")

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}

_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}

_WRONG_PATH = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EEXIST}


def write_atomically(path: Path, content: str | bytes | Callable[[BinaryIO], None]) -> None:
    """Write and sync a file; at any moment its name has the old content or all of the new.

    Args:
        path: the file, in a directory that exists.
        content: the content, or a function that writes it to the open file (readable, seekable).

    Raises:
        ResourceError: no room is left, or the file system fails.
        UsageError: the file may not be written.
    """
    temporary = path.with_name(f".{path.name}~{_host()}~{os.getpid()}~{secrets.token_hex(4)}.tmp")
    with translating_file_errors(f"Writing {path}"):
        try:
            with temporary.open("x+b") as file:
                if callable(content):
                    content(file)
                else:
                    file.write(content.encode() if isinstance(content, str) else content)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        sync_directory(path.parent)


def sync_file(path: Path) -> None:
    """Make the content of a file survive a power cut."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Make the names in a directory survive a power cut."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a directory
            raise
    finally:
        os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create a directory with its parents, unless it exists.

    Raises:
        UsageError: the path is a file, or may not be written.
    """
    with translating_file_errors(f"Creating the directory {directory}"):
        directory.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write a value as JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=2) + "\n")


def read_json(path: Path) -> Any | None:
    """The value of a JSON file; None where there is no such file, or it is damaged."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError):
        return None


def remove_stale_temporaries(directory: Path) -> list[Path]:
    """Remove what killed writers of `write_atomically` left behind, and nothing that a live one may still need."""
    removed = []
    for path in sorted(directory.glob(".*.tmp")):
        with contextlib.suppress(OSError):
            if _is_abandoned(path):
                path.unlink()
                removed.append(path)
    return removed


def try_lock(file: IO[Any]) -> bool:
    """Lock a file until it is closed. False: another process has it. True also where the file system has no locks.

    A POSIX lock, which ends with its process and which forked processes do not inherit.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


@contextmanager
def translating_file_errors(attempt: str) -> Iterator[None]:
    """Turn an OSError inside the block into an error of the tree.

    Args:
        attempt: what is being done, the beginning of the message: "Writing ref/rows-….parquet".
    """
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise translated_file_error(error, attempt) from error


def translated_file_error(error: OSError, attempt: str) -> DpoError:
    """The error of the tree that an OSError with an `errno` means."""
    found = f"{attempt} failed: {os.strerror(error.errno or 0).lower()}."
    if error.errno in _NO_ROOM:
        return ResourceError(f"{found} Make room (or raise the quota) and rerun the same command to resume.")
    if error.errno in _NOT_ALLOWED:
        return UsageError(f"{found} Use a directory that this user may read and write.")
    if error.errno in _WRONG_PATH:
        return UsageError(f"{found} Check the path.")
    return ResourceError(f"{found} This comes from the file system: check it, and rerun the same command.")


def _is_abandoned(path: Path) -> bool:
    name = _TEMPORARY_NAME.fullmatch(path.name)
    if name is None:
        return False
    is_dead = name["host"] == _host() and start_time(int(name["pid"])) is None
    return time.time() - path.stat().st_mtime > (ABANDONED_HERE_SECONDS if is_dead else ABANDONED_ELSEWHERE_SECONDS)


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9.-]", "-", host_name())
