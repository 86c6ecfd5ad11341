"""Identity of a process: host, boot, number and start time tell whether a writer is still alive."""

import os
import socket
from pathlib import Path


def host_name() -> str:
    """Name of this machine, as its own system knows it."""
    return socket.gethostname()


def boot_id() -> str | None:
    """Id of the system's current boot, since containers may share a host name; None where the system has none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def start_time(pid: int) -> int | None:
    """Start of a process in clock ticks since boot: None where it has ended, 0 where the system does not say."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (OSError, ValueError):
        return 0 if _exists(pid) else None
    return None if state in "ZX" else int(fields[18])  # a zombie has ended, and nobody has waited for it


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True
