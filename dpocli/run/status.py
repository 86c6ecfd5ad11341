"""`status.json`: which process writes a directory, whether it is alive, and how it ended.

Launchers swallow exit codes (torchrun turns every one into 1), so scripts read the outcome here.
"""

import hashlib
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, TypeAdapter, ValidationError

from dpocli.errors import DpoError, ExitCode, classify
from dpocli.run.files import write_json
from dpocli.run.process import boot_id, host_name, start_time

DEAD_AFTER_SECONDS = 60.0
"""A writer on another host is dead when its heartbeat has not changed for so long."""

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
    """The content of `status.json`. Times are seconds since 1970."""

    command: str
    state: State
    exit_code: int | None
    step: int
    message: str
    host: str
    boot: str | None
    pid: Annotated[int, Field(gt=0, lt=2**31)]
    pid_started: int | None
    """Start time of the process, since the system gives its number to another one later."""
    started: float
    heartbeat: float
    launch: str = ""
    """`launch_name` of the process."""
    token_budget: int | None = None
    """Tokens of a training pass. After a start that ran out of memory the next one uses half."""

    @property
    def is_of_this_host(self) -> bool:
        return (self.host, self.boot) == (host_name(), boot_id())

    @property
    def is_of_this_process(self) -> bool:
        return self.is_of_this_host and (self.pid, self.pid_started) == (os.getpid(), start_time(os.getpid()))

    @property
    def has_result(self) -> bool:
        """Whether the command finished; `evaluate` has written its report before a gate fails."""
        return self.state == "done" or self.exit_code == ExitCode.GATE

    @property
    def is_alive(self) -> bool:
        """Whether its writer is: on this host by process number and start time, on another one by the heartbeat."""
        if self.state != "running":
            return False
        if not self.is_of_this_host:
            return time.time() - self.heartbeat < DEAD_AFTER_SECONDS
        started = start_time(self.pid)
        return started is not None and self.pid_started in (None, started)


_STATUS = TypeAdapter(Status)


class StatusFile:
    """One `status.json`, or that of a shard of `precompute`, or of an additional writer of it."""

    def __init__(self, directory: Path, shard: str = "0/1", writer: str = "") -> None:
        name = f"status{shard_suffix(shard)}{writer}"
        self.path = directory / f"{name}.json"
        self.lock_path = directory / f".{name}.lock"

    def read(self) -> Status | None:
        """The status; None where there is none, or the file is damaged."""
        try:
            return _STATUS.validate_json(self.path.read_bytes())
        except (OSError, ValidationError):
            return None

    def write(self, status: Status) -> None:
        write_json(self.path, asdict(status))


def shard_suffix(shard: str) -> str:
    """What the names of a shard's files end with: nothing for the only shard, else `-0-of-2`."""
    return "" if shard.endswith("/1") else "-" + shard.replace("/", "-of-")


def writer_suffix(status: Status) -> str:
    """What the name of an additional writer's status ends with."""
    return f"-{status.host}-{status.pid}"


def new_status(command: str) -> Status:
    """The status of a command that this process begins."""
    pid, now = os.getpid(), time.time()
    return Status(
        command=command,
        state="running",
        exit_code=None,
        step=0,
        message="",
        host=host_name(),
        boot=boot_id(),
        pid=pid,
        pid_started=start_time(pid),
        started=now,
        heartbeat=now,
        launch=launch_name(),
    )


def launch_name() -> str:
    """The same on all processes that one launcher started together, and on no others; empty without a launcher."""
    torchrun = ("MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
    found = [os.environ.get(name, "") for name in (*torchrun, "SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")]
    return hashlib.sha256("/".join(found).encode()).hexdigest()[:12] if any(found) else ""


def holds_result(directory: Path, shard: str = "0/1") -> bool:
    """Whether a directory holds a finished result, which only an accepted start may change.

    Where this shard has no status yet, that of any other shard counts: they fill one cache.
    """
    if (own := StatusFile(directory, shard).read()) is not None:
        return own.has_result
    names = [path.name.removesuffix(".json").removeprefix("status") for path in directory.glob("status*.json")]
    return any((other := StatusFile(directory, writer=name).read()) and other.has_result for name in names)


def record_failure(directory: Path, outcome: Outcome, command: str, shard: str = "0/1") -> None:
    """Record a failure from before `RunDirectory` was entered, so that a script does not requeue for ever.

    Only over the status of an earlier start of the same command that was stopped or failed: a finished result, a live
    writer, and what this process has recorded itself stay.
    """
    now = new_status(command)
    file = StatusFile(directory, shard)
    before, additional = file.read(), StatusFile(directory, shard, writer_suffix(now)).read()
    if before is None or before.command != command or before.has_result or before.is_alive:
        return
    if any(status and status.is_of_this_process for status in (before, additional)):
        return
    with suppress(OSError, DpoError):
        file.write(replace(now, step=before.step, token_budget=before.token_budget, **asdict(outcome)))
