"""The one exception tree. Each class carries its exit code; `cli` is the only place that turns one into the other.

Anything a user can cause raises one of these, with a message of one short paragraph: what was attempted, what was
found, and the command or setting that mends it. `assert` is for what cannot happen.
"""

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


def in_words(error: Exception) -> str:
    """The first line of what a library says, with the kind of error where that is a mere name or nothing."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(" .:")
    return line if " " in line else f"{type(error).__name__} {line}".rstrip()
