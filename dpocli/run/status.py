"""`status.json`: who is writing a directory, how it ended, and whether the writer lives.

Launchers swallow exit codes (torchrun turns every one into 1), so scripts read the outcome here.
"""

import hashlib
import os
import socket
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from dpocli.errors import DpoError, ExitCode, classify
from dpocli.run.files import read_json, write_json

DEAD_AFTER_SECONDS = 60.0
"""A writer on another host that has been silent for so long is taken for dead."""

State = Literal["running", "done", "preempted", "failed"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a command ended."""

    state: State
    exit_code: int
    message: str = ""

    @classmethod
    def of(cls, error: BaseException | None) -> "Outcome":
        """The outcome that an exception means; None for success."""
        if error is None:
            return cls("done", ExitCode.DONE)
        code, message = classify(error)
        return cls("preempted" if code == ExitCode.PREEMPTED else "failed", code, message)


@dataclass(frozen=True, slots=True)
class Status:
    """What stands in `status.json`. Times are seconds since 1970."""

    command: str
    state: State
    exit_code: int | None
    step: int
    message: str
    host: str
    boot: str | None
    """What the system calls its time since it was started: host names of containers may be the same."""
    pid: int
    pid_started: int | None
    """When the system started that process, so that another with the same number is not taken for it."""
    started: float
    heartbeat: float
    launch: str = ""
    """Which processes belong together."""
    token_budget: int | None = None
    """Tokens of a training pass. After a start that ran out of memory the next one uses half."""

    @property
    def is_of_this_host(self) -> bool:
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    @property
    def is_of_this_process(self) -> bool:
        return self.is_of_this_host and (self.pid, self.pid_started) == (os.getpid(), process_start(os.getpid()))


def shard_suffix(shard: str) -> str:
    """What tells the files of several shards in one directory apart; nothing where there is only one."""
    return "" if shard.endswith("/1") else "-" + shard.replace("/", "-of-")


class StatusFile:
    """`status.json`: one for each writer that may work beside others, as the shards of `precompute` do."""

    def __init__(self, directory: Path, shard: str = "0/1", companion: str = "") -> None:
        name = f"status{shard_suffix(shard)}{companion}"
        self.path = directory / f"{name}.json"
        self.lock_path = directory / f".{name}.lock"

    def read(self) -> Status | None:
        """What stands there; None where there is nothing that makes sense."""
        try:
            status = Status(**(read_json(self.path) or {}))
        except TypeError:
            return None
        return status if _makes_sense(status) else None

    def write(self, status: Status) -> None:
        write_json(self.path, asdict(status))


def _makes_sense(status: Status) -> bool:
    """Whether the values are of the types that are written: anybody may have edited the file."""
    numbers = (status.step, status.started, status.heartbeat, status.token_budget or 0)
    return (
        all(isinstance(text, str) for text in (status.command, status.state, status.message, status.host))
        and all(isinstance(number, int | float) for number in numbers)
        and isinstance(status.pid, int)
        and 0 < status.pid < 2**31
    )


def new_status(command: str) -> Status:
    """The status of a command that this process begins."""
    pid = os.getpid()
    return Status(
        command=command,
        state="running",
        exit_code=None,
        step=0,
        message="",
        host=socket.gethostname(),
        boot=_boot(),
        pid=pid,
        pid_started=process_start(pid),
        started=time.time(),
        heartbeat=time.time(),
        launch=launch_name(),
    )


def launch_name() -> str:
    """The same on all processes that one launcher started together, and on no others; empty without one."""
    torchrun = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    found = [os.environ.get(name, "") for name in (*torchrun, "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return hashlib.sha256("/".join(found).encode()).hexdigest()[:12] if any(found) else ""


def is_alive(status: Status) -> bool:
    """Whether the writer of a status lives: here the process is looked for, elsewhere only its heartbeat is seen."""
    if status.state != "running":
        return False
    if status.is_of_this_host:
        return _process_exists(status.pid) and status.pid_started in (None, process_start(status.pid))
    return time.time() - status.heartbeat < DEAD_AFTER_SECONDS


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return not _is_zombie(pid)


def _is_zombie(pid: int) -> bool:
    """Whether it has ended and only nobody has waited for it, as in containers whose first process does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False


def process_start(pid: int) -> int | None:
    """Clock ticks from boot to the start of a process; None where the system does not tell."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return int(stat.rpartition(")")[2].split()[19])


def _boot() -> str | None:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return None


def record_failure(directory: Path, outcome: Outcome, command: str, shard: str = "0/1") -> None:
    """Note a failure in a directory that an earlier start of the same command wrote.

    Not where somebody is writing it, or has just noted it.
    """
    file = StatusFile(directory, shard)
    before = file.read()
    if before is None or before.command != command or is_alive(before) or before.is_of_this_process:
        return
    with suppress(OSError, DpoError):
        file.write(replace(new_status(command), step=before.step, token_budget=before.token_budget, **asdict(outcome)))
