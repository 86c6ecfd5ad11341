"""The output directory of a command: one writer at a time, a heartbeat while it runs, the outcome when it ends."""

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
from dpocli.errors import DpoError, ExitCode, UsageError, is_lost_peer
from dpocli.run.files import make_directory, read_json, translating_file_errors, try_lock, write_atomically, write_json
from dpocli.run.metrics_log import MetricsLog
from dpocli.run.status import (
    DEAD_AFTER_SECONDS,
    Outcome,
    Status,
    StatusFile,
    holds_result,
    launch_name,
    new_status,
    shard_suffix,
    writer_suffix,
)

HEARTBEAT_SECONDS = 10.0


class RunDirectory:
    """The output directory of a command. Only rank 0 writes.

    Entering creates the directory and refuses a second writer; leaving records the outcome. The status of a finished
    result stays as it is until `write_config`, which a command calls when it has accepted the start.

    Args:
        path: the directory.
        command: which of the three writes it.
        rank: number of this process.
        shard: "I/N" of `precompute`; every shard has its own status and configuration in the same directory.
        companions: whether other processes may write at the same time, as workers of a cache do. An additional writer has
            its own status file and writes no configuration.
        say: called with a line when the start is delayed.
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
        self.is_companion = False
        """Whether another process was writing here first."""
        self.started = time.monotonic()
        self._is_writer, self._shard, self._companions = rank == 0, shard, companions
        self._config_path = path / f"config{shard_suffix(shard)}.yaml"
        self._failure_path = path / f".failure{shard_suffix(shard)}-{launch_name()}.json"
        self._file = StatusFile(path, shard)
        self._status = new_status(command)
        self._before = self._file.read()
        self.is_accepted = not holds_result(path, shard)
        """Whether this start may write: no finished result is here, or `write_config` was called."""
        if rank == 0:
            with suppress(OSError):  # here, since another rank may fail before this one enters
                self._failure_path.unlink(missing_ok=True)
        self._say, self._sleep = say, sleep
        self._lock: TextIO | None = None
        self._stop_after = self._status.started
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
        if not self._is_writer:
            self._leave_failure(outcome)
            return
        self._ended.set()
        self._heart.join()
        found = self._with_failure_of_others(outcome, has_lost_peer=error is not None and is_lost_peer(error))
        self._status = replace(self._status, **asdict(found))
        self.is_accepted |= outcome.state == "preempted"  # a stopped start is resumed, a refused one is not
        try:
            self._write_status()
        except (OSError, DpoError):
            if error is None:
                raise
        finally:
            if self._lock:
                self._lock.close()

    def update(
        self,
        step: int | None = None,
        message: str | None = None,
        *,
        token_budget: int | None = None,
        at_once: bool = False,
    ) -> None:
        """Set what the next heartbeat writes to `status.json`; `at_once` writes it now."""
        if step is not None:
            self._status = replace(self._status, step=step)
        if message is not None:
            self._status = replace(self._status, message=message)
        if token_budget is not None:
            self._status = replace(self._status, token_budget=token_budget)
        if at_once and self._is_writer:
            self._write_status()

    def stop_requested(self) -> bool:
        """Whether the file `OUT/stop` was made or touched since this run began; a later start ignores it."""
        try:
            return (self.path / "stop").stat().st_mtime >= self._stop_after
        except OSError:
            return False

    def write_config(self, options: Options) -> None:
        """Accept the start: from now on it may change an earlier result. Write `config.yaml`, which --config takes."""
        self.is_accepted = True
        if self._is_writer:
            self._write_status()
            if not self.is_companion:
                write_atomically(self._config_path, dump_yaml(options, self._status.command))

    def write_summary(self, summary: Mapping[str, Any], *, from_any: bool = False) -> None:
        """Write `summary.json`, `from_any` also on other ranks than 0, where the last to finish has the whole result."""
        if self._is_writer or from_any:
            write_json(self.path / "summary.json", without_nan(summary))

    def _open(self) -> None:
        make_directory(self.path)
        with translating_file_errors(f"Writing into --out {self.path}"):
            self._lock = self._file.lock_path.open("a")
        try:
            self._refuse_second_writer(self._lock)
            self.is_accepted = not holds_result(self.path, self._shard)
        except BaseException as error:
            self._lock.close()
            if not (self._companions and isinstance(error, UsageError)):
                raise
            self._lock = None
            self.is_companion = self.is_accepted = True
            self._file = StatusFile(self.path, self._shard, writer_suffix(self._status))

    def _begin(self) -> None:
        self._write_status()
        if self._companions and not self.is_companion:
            self._remove_dead_companions()
        if self.is_accepted:
            self._stop_after = self._file.path.stat().st_mtime  # in the clock of the file system, as that of `OUT/stop`

    def _refuse_second_writer(self, lock: TextIO) -> None:
        """Raise UsageError where another process writes the directory.

        The lock decides where the file system has locks. A writer on another host may have been killed a moment ago: it
        has a minute to show a heartbeat, so that a requeued job can start.
        """
        has_lock, status = try_lock(lock), self._file.read()
        if has_lock:
            if status is None or not status.is_alive:
                return
            if not status.is_of_this_host and (status := self._changed_status(status)) is None:
                return
        is_known = status is not None and status.state == "running"
        who = (
            f"dpocli {status.command}, process {status.pid} on {status.host}"
            if status and is_known
            else "another process"
        )
        raise UsageError(
            f"--out {self.path}: {who} is writing it. Wait for it to end, stop it with `touch {self.path}/stop`, "
            "or give another directory."
        )

    def _changed_status(self, status: Status) -> Status | None:
        """The next heartbeat of a writer on another host; None where none comes, or the writer has ended."""
        self._say(f"{self.path}: was being written on {status.host} a moment ago; waiting to see whether it still is.")
        for _ in range(int(DEAD_AFTER_SECONDS)):
            self._sleep(1.0)
            latest = self._file.read()
            if latest is None or latest.state != "running":
                return None
            if latest.heartbeat != status.heartbeat:
                return latest
        return None

    def _remove_dead_companions(self) -> None:
        """Remove the status files that additional writers of this shard left, however they ended."""
        start = f"status{shard_suffix(self._shard)}"
        for path in self.path.glob(f"{start}-*.json"):
            name = path.name.removeprefix(start).removesuffix(".json")
            status = StatusFile(self.path, self._shard, name).read()
            if status and name == writer_suffix(status) and not status.is_alive and not status.is_of_this_process:
                path.unlink(missing_ok=True)

    def _leave_failure(self, outcome: Outcome) -> None:
        """Record a failure on another rank than 0: in the status where rank 0 has ended well, else for it to find."""
        status = self._file.read()
        was_refused = not self.is_accepted and status == self._before
        if outcome.state != "failed" or was_refused:
            return
        with suppress(OSError, DpoError):
            write_json(self._failure_path, asdict(outcome))
            if status and status.state in ("done", "preempted") and status.launch == launch_name():
                self._file.write(replace(status, **asdict(outcome)))

    def _with_failure_of_others(self, outcome: Outcome, *, has_lost_peer: bool) -> Outcome:
        """The failure of another rank, where this one finished, stopped, lost it, or met an error that it cannot explain."""
        failure = read_json(self._failure_path)
        is_none = has_lost_peer or outcome.exit_code in (ExitCode.DONE, ExitCode.PREEMPTED, ExitCode.BUG)
        if isinstance(failure, dict) and is_none:
            with suppress(TypeError):
                return Outcome(**failure)
        return outcome

    def _write_status(self) -> None:
        if self.is_accepted:
            self._file.write(replace(self._status, heartbeat=time.time()))

    def _beat(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError, DpoError):  # a disk that is full now may have room at the next beat
                self._write_status()
