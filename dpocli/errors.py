"""The one exception tree. Each class carries its exit code; `cli` is the only place that turns one into the other.

Anything a user can cause raises one of these, with a message of one short paragraph: what was attempted, what was
found, and the command or setting that mends it. `assert` is for what cannot happen.
"""

import errno
import re
from enum import IntEnum


class ExitCode(IntEnum):
    """What a shell script sees (and `status.json` keeps, because launchers swallow exit codes)."""

    DONE = 0
    BUG = 1
    USAGE = 2
    DATA = 3
    CACHE = 4
    NUMBERS = 5
    GATE = 6
    RESOURCES = 7
    PREEMPTED = 75
    INTERRUPTED = 130


class DpoError(Exception):
    """Base of every error that a user can cause."""

    exit_code: ExitCode = ExitCode.BUG


class UsageError(DpoError):
    """Bad usage or configuration: an option, a path, a model directory, a combination that cannot work."""

    exit_code = ExitCode.USAGE


class DataError(DpoError):
    """Bad input data: a row that cannot be read, a field that is missing, no pair left to use."""

    exit_code = ExitCode.DATA


class CacheError(DpoError):
    """A reference cache that is missing, incomplete, damaged, or made for something else."""

    exit_code = ExitCode.CACHE


class NumericsError(DpoError):
    """Numbers went bad: NaN or infinity, or a failed step-0 check."""

    exit_code = ExitCode.NUMBERS


class GateError(DpoError):
    """A figure is not as `--require` wants it. Everything is written by then."""

    exit_code = ExitCode.GATE


class ResourceError(DpoError):
    """Out of memory or disk after every fall-back."""

    exit_code = ExitCode.RESOURCES


class PreemptedError(DpoError):
    """Stopped on request after saving: the same line goes on from there."""

    exit_code = ExitCode.PREEMPTED


class StopSignal(KeyboardInterrupt):
    """A signal asked to stop before there was anything to save.

    Raised anywhere, and so of a kind that libraries let pass, as they do with Ctrl-C.
    """


def brief_message(error: Exception) -> str:
    """The first line of what a library says, with the kind of error where that is a mere name or nothing."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(" .:")
    return line if " " in line else f"{type(error).__name__} {line}".rstrip()


def classify(error: BaseException) -> tuple[ExitCode, str]:
    """Exit code and message of an error that ends a command."""
    if isinstance(error, DpoError):
        return error.exit_code, str(error)
    if isinstance(error, StopSignal):
        return (
            ExitCode.PREEMPTED,
            "Stopped on request before there was anything to save. The same command line starts again.",
        )
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "Interrupted. The same command line goes on from what is saved."
    if is_out_of_memory(error):
        first_line = str(error).partition("\n")[0]
        return ExitCode.RESOURCES, f"Out of memory: {first_line or 'no more to be had'}. Try a smaller --token-budget."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExitCode.RESOURCES, f"{error.filename or 'The output'}: {error.strerror}. Make room and start again."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG) and error.filename:
        return ExitCode.USAGE, f"{error.filename}: {error.strerror}."
    if is_lost_peer(error):
        return ExitCode.RESOURCES, (
            "Another process of this run has ended, or cannot be reached any more; what it said stands above, or in its own log. "
            "The same command line goes on from what is saved."
        )
    return ExitCode.BUG, (
        f"{type(error).__name__}: {error}. This is a bug in dpocli: please report it with the traceback and the command."
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says that a process on the other side of an exchange is gone; told without importing torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return bool(names & {"DistNetworkError", "DistBackendError", "DistStoreError"}) or (
        isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))
    )


_LOST_PEER = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Broken pipe.*gloo|gloo.*(Timed out|timeout)", re.DOTALL
)

_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: |CUDA error: out of memory|\b[A-Z]+_STATUS_(\w+_)?ALLOC(ATION)?_FAILED\b"
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on the host or on a device; told without importing torch."""
    names = {kind.__name__ for kind in type(error).__mro__}
    return (
        bool(names & {"MemoryError", "OutOfMemoryError"})
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error))))
    )


def mark_recorded(error: BaseException) -> None:
    """Says that nobody has to note this error any more: the status has it, or must not."""
    error.__dict__["recorded_by_dpocli"] = True


def is_recorded(error: BaseException) -> bool:
    """Whether `mark_recorded` was told of it."""
    return bool(error.__dict__.get("recorded_by_dpocli"))
