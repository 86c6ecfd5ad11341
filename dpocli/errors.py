"""The exception tree. Each class has its exit code, and `cli` alone turns one into the other.

Anything that a user can cause raises one of these, with a message of one short paragraph: what was attempted, what was
found, and the command or setting that fixes it. `assert` is for what cannot happen.
"""

import errno
import re
from enum import IntEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """What a shell script sees, and `status.json` holds because launchers swallow exit codes."""

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

    exit_code: ClassVar[ExitCode]


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
    """Bad numbers: NaN or infinity, or a failed step-0 check."""

    exit_code = ExitCode.NUMBERS


class GateError(DpoError):
    """A figure that does not meet `--require`. Raised after all output is written."""

    exit_code = ExitCode.GATE


class ResourceError(DpoError):
    """Out of memory or disk, after every fallback."""

    exit_code = ExitCode.RESOURCES


class PreemptedError(DpoError):
    """A stop on request after saving: the same command resumes."""

    exit_code = ExitCode.PREEMPTED


class StopSignal(KeyboardInterrupt):
    """A stop signal before there was anything to save.

    Raised anywhere, and so of a kind that libraries let pass, as they do with Ctrl-C.
    """


def brief_message(error: Exception) -> str:
    """The first line of a library's error, with the kind of error where that line is a mere name or empty."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(" .:")
    return line if " " in line else f"{type(error).__name__} {line}".rstrip()


def classify(error: BaseException) -> tuple[ExitCode, str]:
    """Exit code and message of an error that ends a command."""
    if isinstance(error, DpoError):
        return error.exit_code, str(error)
    if isinstance(error, StopSignal):
        return (
            ExitCode.PREEMPTED,
            "Stopped on request before there was anything to save. Rerun the same command to start again.",
        )
    if isinstance(error, KeyboardInterrupt):
        return ExitCode.INTERRUPTED, "Interrupted. Rerun the same command to resume from what is saved."
    if is_out_of_memory(error):
        first_line = str(error).partition("\n")[0]
        return ExitCode.RESOURCES, f"Out of memory: {first_line or 'no more is free'}. Try a smaller --token-budget."
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return ExitCode.RESOURCES, f"{error.filename or 'The output'}: {error.strerror}. Make room and start again."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.ENAMETOOLONG) and error.filename:
        return ExitCode.USAGE, f"{error.filename}: {error.strerror}."
    if is_lost_peer(error):
        return ExitCode.RESOURCES, (
            "Another process of this run has ended or cannot be reached; its own message is above or in its log. "
            "Rerun the same command to resume from what is saved."
        )
    return ExitCode.BUG, (
        f"{type(error).__name__}: {error}. This is a bug in dpocli: please report it with the traceback and the command."
    )


_LOST_PEER = re.compile(
    r"Connection (closed|reset) by (remote )?peer|Broken pipe.*gloo|gloo.*(Timed out|timeout)", re.DOTALL
)

_OUT_OF_MEMORY = re.compile(
    r"DefaultCPUAllocator: |CUDA (driver )?error: out of memory|Triton Error \[CUDA\]: out of memory"
    r"|Cuda failure (2\b|'out of memory')|Failed to CUDA (c|m)alloc|CUDA_ERROR_OUT_OF_MEMORY|cudaErrorMemoryAllocation"
    r"|\b[A-Z]+_STATUS_(\w+_)?ALLOC(ATION)?_FAILED\b"
)
"""Of torch's allocators, the CUDA runtime and driver, Triton, NCCL, cuBLAS and its siblings."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out, on the host or on a device. By names, so that torch is not imported."""
    return (
        bool(_class_names(error) & {"MemoryError", "OutOfMemoryError"})
        or (isinstance(error, OSError) and error.errno == errno.ENOMEM)
        or (isinstance(error, RuntimeError) and bool(_OUT_OF_MEMORY.search(str(error))))
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether another process in an exchange has ended or cannot be reached. By names, so that torch is not imported."""
    return bool(_class_names(error) & {"DistNetworkError", "DistBackendError", "DistStoreError"}) or (
        isinstance(error, RuntimeError) and bool(_LOST_PEER.search(str(error)))
    )


def _class_names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}
