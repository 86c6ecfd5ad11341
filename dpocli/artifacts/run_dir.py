"""The directory that a command writes: who is writing it, how it ended, its metrics and its configuration.

Launchers swallow exit codes (torchrun turns every one into 1), so scripts read the outcome from `status.json`.
"""

import errno
import fcntl
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self, TextIO

from dpocli.artifacts.files import file_errors_in_words, make_directory, read_json, write_atomically, write_json
from dpocli.config.models import Options
from dpocli.errors import DpoError, ExitCode, UsageError
from dpocli.options import dump_yaml
from dpocli.terminal import without_nan

HEARTBEAT_SECONDS = 10.0
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
        code, message = _classify(error)
        return cls("preempted" if code == ExitCode.PREEMPTED else "failed", code, message)


def _classify(error: BaseException) -> tuple[ExitCode, str]:
    if isinstance(error, DpoError):
        return error.exit_code, str(error)
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "Interrupted. The same command line goes on from what is saved."
    if is_out_of_memory(error):
        first_line = str(error).partition("\n")[0]
        return ExitCode.RESOURCES, f"Out of memory: {first_line or 'no more to be had'}. Try a smaller --token-budget."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExitCode.RESOURCES, f"{error.filename or 'The output'}: {error.strerror}. Make room and start again."
    if isinstance(error, PermissionError) and error.filename:
        return ExitCode.USAGE, f"{error.filename}: {error.strerror}."
    return ExitCode.BUG, (
        f"{type(error).__name__}: {error}. This is a bug in dpocli: please report it with the traceback and the command."
    )


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on a device; told without importing torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"MemoryError", "OutOfMemoryError"}) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )


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

    @property
    def is_of_this_host(self) -> bool:
        return (self.host, self.boot) == (socket.gethostname(), _boot())

    @property
    def is_of_this_process(self) -> bool:
        return self.is_of_this_host and (self.pid, self.pid_started) == (os.getpid(), _process_start(os.getpid()))


def shard_suffix(shard: str) -> str:
    """What tells the files of several shards in one directory apart; nothing where there is only one."""
    return "" if shard.endswith("/1") else "-" + shard.replace("/", "-of-")


class StatusFile:
    """`status.json`: one for each writer that may work beside others, as the shards of `precompute` do."""

    def __init__(self, directory: Path, shard: str = "0/1") -> None:
        self.path = directory / f"status{shard_suffix(shard)}.json"
        self.lock_path = directory / f".status{shard_suffix(shard)}.lock"

    def read(self) -> Status | None:
        """What stands there; None where there is nothing that makes sense."""
        try:
            return Status(**(read_json(self.path) or {}))
        except TypeError:
            return None

    def write(self, status: Status) -> None:
        write_json(self.path, asdict(status))


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
        pid_started=_process_start(pid),
        started=time.time(),
        heartbeat=time.time(),
    )


def is_alive(status: Status) -> bool:
    """Whether the writer of a status lives: here the process is looked for, elsewhere only its heartbeat is seen."""
    if status.state != "running":
        return False
    if status.is_of_this_host:
        return _process_exists(status.pid) and status.pid_started in (None, _process_start(status.pid))
    return time.time() - status.heartbeat < DEAD_AFTER_SECONDS


def _process_exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _process_start(pid: int) -> int | None:
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
    """Note a failure in a directory that an earlier run wrote, unless somebody is writing it or has just noted it."""
    file = StatusFile(directory, shard)
    before = file.read()
    if before is None or is_alive(before) or before.is_of_this_process:
        return
    with suppress(OSError, DpoError):
        file.write(replace(new_status(command), **asdict(outcome)))


class RunDirectory:
    """The output directory of a command, from `with` to its end. On ranks other than 0 nothing is written.

    Entering creates it and refuses a second writer; leaving records the outcome, whatever it is.

    Args:
        path: the directory.
        command: which of the three writes it.
        rank: number of this process.
        shard: "I/N" of `precompute`; every shard has a status and a configuration of its own in the same directory.
        say: told when the start is delayed.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        *,
        rank: int = 0,
        shard: str = "0/1",
        say: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = path
        self.metrics = MetricsLog(path / "metrics.jsonl", enabled=rank == 0)
        self._is_writer = rank == 0
        self._config_path = path / f"config{shard_suffix(shard)}.yaml"
        self._file = StatusFile(path, shard)
        self._status = new_status(command)
        self._say, self._sleep = say, sleep
        self._lock: TextIO | None = None
        self._began = time.time()
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._is_writer:
            self._open()
            self._heart.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.close()
        if not self._is_writer:
            return
        self._ended.set()
        self._heart.join()
        self._status = replace(self._status, **asdict(Outcome.of(error)))
        try:
            self._write_status()
        except (OSError, DpoError):
            if error is None:
                raise
        finally:
            if self._lock:
                self._lock.close()

    def update(self, step: int | None = None, message: str | None = None) -> None:
        """Say how far the command is; it stands in `status.json` with the next heartbeat."""
        if step is not None:
            self._status = replace(self._status, step=step)
        if message is not None:
            self._status = replace(self._status, message=message)

    def stop_requested(self) -> bool:
        """Whether somebody made (or touched) the file `OUT/stop` since this run began.

        Nobody has to remove it: the same command line given again is younger than the request.
        """
        try:
            return (self.path / "stop").stat().st_mtime >= self._began
        except OSError:
            return False

    def write_config(self, options: Options) -> None:
        """Write `config.yaml`, which given back to --config reproduces the command."""
        if self._is_writer:
            write_atomically(self._config_path, dump_yaml(options, self._status.command))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write `summary.json`."""
        if self._is_writer:
            write_json(self.path / "summary.json", without_nan(summary))

    def _open(self) -> None:
        make_directory(self.path)
        with file_errors_in_words(f"Writing into --out {self.path}"):
            self._lock = self._file.lock_path.open("a")
        try:
            self._refuse_second_writer(self._lock)
            self._write_status()
            self._began = self._file.path.stat().st_mtime  # by the clock of the file system, as that of `OUT/stop`
        except BaseException:
            self._lock.close()
            raise

    def _refuse_second_writer(self, lock: TextIO) -> None:
        """Raise unless this is the only live writer.

        The lock decides where the file system has locks. A writer on another host whose heartbeat is fresh may have
        been killed a moment ago: it is given a minute for a sign of life, so that a requeued job just goes on.
        """
        if not _try_lock(lock):
            raise self._second_writer(self._file.read())
        status = self._file.read()
        if status is None or not is_alive(status):
            return
        if status.is_of_this_host:
            raise self._second_writer(status)
        self._say(f"{self.path}: was being written on {status.host} a moment ago; waiting to see whether it still is.")
        for _ in range(int(DEAD_AFTER_SECONDS)):
            self._sleep(1.0)
            latest = self._file.read()
            if latest is None or latest.state != "running":
                return
            if latest.heartbeat != status.heartbeat:
                raise self._second_writer(latest)

    def _second_writer(self, status: Status | None) -> UsageError:
        who = f"dpocli {status.command}, process {status.pid} on {status.host}" if status else "another process"
        return UsageError(
            f"--out {self.path}: {who} is writing it. Wait for it to end, stop it with `touch {self.path}/stop`, "
            "or give another directory."
        )

    def _write_status(self) -> None:
        self._file.write(replace(self._status, heartbeat=time.time()))

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError, DpoError):  # a full disk now may not be full at the next beat
                self._write_status()


def _try_lock(file: TextIO) -> bool:
    """Lock a file until it is closed. False: somebody else has it. True also where the file system has no locks.

    A POSIX lock, since processes forked for other purposes do not inherit it: it dies with its owner.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno not in (errno.EACCES, errno.EAGAIN)
    return True


class MetricsLog:
    """`metrics.jsonl`: one object per logged step, appended and flushed."""

    def __init__(self, path: Path, enabled: bool = True) -> None:
        self.path = path
        self._enabled = enabled
        self._stream: TextIO | None = None

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; NaN and infinity become null, since JSON has neither."""
        if not self._enabled:
            return
        if self._stream is None:
            self.truncate_after(sys.maxsize)
            self._stream = self.path.open("a", encoding="utf-8")
        self._stream.write(json.dumps(without_nan(row)) + "\n")
        self._stream.flush()

    def truncate_after(self, step: int) -> None:
        """Drop the rows of later steps, which a resumed run does again, and a last line that was cut off."""
        if not self._enabled or not self.path.exists():
            return
        self.close()
        text = self.path.read_text(encoding="utf-8", errors="replace")
        kept = "".join(json.dumps(row) + "\n" for row in _rows(text) if row.get("step", 0) <= step)
        if kept != text:
            write_atomically(self.path, kept)

    def rows(self) -> list[dict[str, Any]]:
        """All rows so far; a line that is half written is left out."""
        return list(_rows(self.path.read_text(encoding="utf-8", errors="replace"))) if self.path.exists() else []

    def close(self) -> None:
        if self._stream:
            self._stream.close()
            self._stream = None


def _rows(text: str) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict):
                yield row


class StopFlag:
    """Whether a signal asked to stop. The handler sets a flag and nothing else; the work looks at it where it can.

    For use with `with`, in the main thread; leaving brings the earlier handlers back.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

    def __init__(self) -> None:
        self.is_set = False
        self._earlier: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        self._earlier = {number: signal.signal(number, self._set) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.is_set

    def _set(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002 - what a handler is given
        self.is_set = True
