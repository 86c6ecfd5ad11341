"""The directory that a command writes, from its first look at it to the outcome that it leaves there."""

import re
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO

from dpocli.config.options import Options
from dpocli.config.parsing import dump_yaml
from dpocli.console.console import without_nan
from dpocli.errors import DpoError, ExitCode, UsageError, is_lost_peer, mark_recorded
from dpocli.run.files import make_directory, read_json, translating_file_errors, try_lock, write_atomically, write_json
from dpocli.run.metrics_log import MetricsLog
from dpocli.run.status import (
    DEAD_AFTER_SECONDS,
    Outcome,
    Status,
    StatusFile,
    is_alive,
    launch_name,
    new_status,
    shard_suffix,
)

HEARTBEAT_SECONDS = 10.0


class RunDirectory:
    """The output directory of a command, from `with` to its end. On ranks other than 0 nothing is written.

    Entering creates it and refuses a second writer; leaving records the outcome, whatever it is.

    Args:
        path: the directory.
        command: which of the three writes it.
        rank: number of this process.
        shard: "I/N" of `precompute`; every shard has a status and a configuration of its own in the same directory.
        companions: whether others may write beside this process, as workers of a cache do. One that finds another at
            work has a status file of its own, and leaves the configuration to the other.
        say: told when the start is delayed.
    """

    def __init__(
        self,
        path: Path,
        command: str,
        *,
        rank: int = 0,
        shard: str = "0/1",
        companions: bool = False,
        say: Callable[[str], None] = lambda _: None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.path = path
        self.metrics = MetricsLog(path / "metrics.jsonl", enabled=rank == 0)
        self._is_writer = rank == 0
        self._config_path = path / f"config{shard_suffix(shard)}.yaml"
        self._file = StatusFile(path, shard)
        self._failure_path = path / f".failure{shard_suffix(shard)}-{launch_name()}.json"
        if rank == 0:
            # As early as that: a process that is quicker may have failed before this one comes to its directory.
            with suppress(OSError):
                self._failure_path.unlink(missing_ok=True)
        self._shard, self._companions = shard, companions
        self.is_companion = False
        """Whether another writer was there first."""
        self._status = new_status(command)
        self._say, self._sleep = say, sleep
        self._lock: TextIO | None = None
        self._began = time.time()
        self.started = time.monotonic()
        """When this process began with the directory, by the clock of `time.monotonic`."""
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> Self:
        if self._is_writer:
            self._open()
            self._heart.start()
            try:
                self._begin()
            except BaseException as error:
                self.__exit__(type(error), error, error.__traceback__)
                raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.metrics.close()
        outcome = Outcome.of(error)
        if error is not None:
            mark_recorded(error)
        if not self._is_writer:
            self._leave_failure(outcome)
            return
        self._ended.set()
        self._heart.join()
        found = self._with_failure_of_others(outcome, has_lost_peer=error is not None and is_lost_peer(error))
        self._status = replace(self._status, **asdict(found))
        try:
            self._write_status()
        except (OSError, DpoError):
            if error is None:
                raise
        finally:
            if self._lock:
                self._lock.close()

    def _leave_failure(self, outcome: Outcome) -> None:
        """A failure of another process than the first: for the first to find, or into its status if it has ended well."""
        if outcome.state != "failed":
            return
        with suppress(OSError, DpoError):
            write_json(self._failure_path, asdict(outcome))
            status = self._file.read()
            ended_well = status is not None and status.state in ("done", "preempted")
            if status is not None and ended_well and status.launch == launch_name():
                self._file.write(replace(status, **asdict(outcome)))

    def _with_failure_of_others(self, outcome: Outcome, *, has_lost_peer: bool) -> Outcome:
        """The outcome of the run: the failure of another process, where this one has none of its own."""
        failure = read_json(self._failure_path)
        is_none = has_lost_peer or outcome.exit_code in (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.BUG)
        if isinstance(failure, dict) and is_none:
            with suppress(TypeError):
                return Outcome(**failure)
        return outcome

    def update(
        self,
        step: int | None = None,
        message: str | None = None,
        *,
        token_budget: int | None = None,
        at_once: bool = False,
    ) -> None:
        """Say how far the command is; it stands in `status.json` with the next heartbeat, or `at_once`."""
        if step is not None:
            self._status = replace(self._status, step=step)
        if message is not None:
            self._status = replace(self._status, message=message)
        if token_budget is not None:
            self._status = replace(self._status, token_budget=token_budget)
        if at_once and self._is_writer:
            self._write_status()

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
        if self._is_writer and not self.is_companion:
            write_atomically(self._config_path, dump_yaml(options, self._status.command))

    def write_summary(self, summary: Mapping[str, Any], *, from_any: bool = False) -> None:
        """Write `summary.json`; `from_any` process, where the first one may have ended before there was so much to say."""
        if self._is_writer or from_any:
            write_json(self.path / "summary.json", without_nan(summary))

    def _open(self) -> None:
        make_directory(self.path)
        with translating_file_errors(f"Writing into --out {self.path}"):
            self._lock = self._file.lock_path.open("a")
        try:
            try:
                self._refuse_second_writer(self._lock)
            except UsageError:
                if not self._companions:
                    raise
                self._become_companion()
        except BaseException:
            self._lock.close()
            raise

    def _begin(self) -> None:
        self._write_status()
        if self._companions and not self.is_companion:
            remove_dead_companions(self.path, self._shard)
        self._began = self._file.path.stat().st_mtime  # by the clock of the file system, as that of `OUT/stop`

    def _become_companion(self) -> None:
        assert self._lock
        self._lock.close()
        self.is_companion = True
        self._file = companion_file(self.path, self._shard, self._status)
        self._failure_path = failure_path(self._file)
        self._lock = self._file.lock_path.open("a")
        try_lock(self._lock)

    def _refuse_second_writer(self, lock: TextIO) -> None:
        """Raise unless this is the only live writer.

        The lock decides where the file system has locks. A writer on another host whose heartbeat is fresh may have
        been killed a moment ago: it is given a minute for a sign of life, so that a requeued job just goes on.
        """
        if not try_lock(lock):
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
