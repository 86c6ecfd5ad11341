"""Check of `--out` before anything is written: it is new, or an earlier start of the same command wrote it."""

from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

from dpocli.errors import UsageError
from dpocli.run.files import translating_file_errors
from dpocli.run.status import StatusFile

Command = Literal["precompute", "train", "evaluate"]

PART_PATTERN = "rows-*.parquet"
"""Names of the parts of a reference cache."""

_WRITTEN = (
    *("config.yaml", "model", "checkpoints", "metrics.jsonl", "summary.json", "curves.png"),
    *("metrics.json", "inputs.json", "pairs.parquet", "report.html", "plots", "pairs", "tensorboard", "wandb"),
)
"""What train and evaluate write, and must not overwrite where another program wrote it."""

_BESIDE_PARTS = (
    *(".*", "config*.yaml", "status*.json", "summary*.json", "stop", "scratch"),
    *("*.log", "*.out", "*.err", "*.txt", "*.md"),
)
"""What a new cache's directory may hold: the files of commands and of shell scripts."""


def check_out(out: Path, command: Command) -> None:
    """Raise UsageError where `--out` is a file, or holds what this command did not write and would overwrite."""
    with translating_file_errors(f"Looking at --out {out}"):
        if not out.is_dir() and (out.exists() or out.is_symlink()):
            what = "a file" if out.exists() else "a link that leads nowhere"
            raise UsageError(f"--out {out}: this is {what}. Give a directory for what {command} writes.")
        owner = _owner(out)
        if owner and owner != command:
            raise UsageError(
                f"--out {out}: it holds what `dpocli {owner}` wrote. Give {command} a directory of its own."
            )
        if owner:
            return
        if command == "precompute":
            check_destination(out)
            return
        written = ", ".join(name for name in _WRITTEN if (out / name).exists())
        if found := "a reference cache" if any(out.glob(PART_PATTERN)) else written or describe_directory(out):
            raise UsageError(
                f"--out {out}: it holds {found}, which no earlier `dpocli {command}` wrote there. Give a new or an empty "
                "directory."
            )


def check_destination(directory: Path) -> None:
    """Refuse a directory for a cache that is something else.

    Raises:
        UsageError: it is a file, a model directory, the output of a run, or holds unrelated files.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(f"--out {directory}: this is a file. Give a directory for the reference cache.")
    if not directory.exists() or any(directory.glob(PART_PATTERN)):
        return
    if what := describe_directory(directory):
        raise UsageError(f"--out {directory}: this is {what}, not a reference cache. Give the cache its own directory.")
    names = sorted(path.name for path in directory.iterdir())
    if others := [name for name in names if not any(fnmatch(name, pattern) for pattern in _BESIDE_PARTS)]:
        raise UsageError(
            f"--out {directory}: it holds {', '.join(others[:3])}{' and more' if len(others) > 3 else ''}, and no part of "
            "a reference cache. Choose a new or an empty directory."
        )


def describe_directory(directory: Path) -> str | None:
    """Name what a directory without a cache is, as far as its files show; else None."""
    if (directory / "config.json").is_file() or any(directory.glob("*.safetensors")):
        return "a model directory"
    is_run = any((directory / name).exists() for name in ("model", "checkpoints", "metrics.jsonl", "pairs.parquet"))
    return "the output directory of a run" if is_run else None


def _owner(out: Path) -> str | None:
    """The command that wrote a directory: in the first line of `config.yaml`, and before that exists in the status."""
    try:
        first_line = (out / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        first_line = ""
    words = first_line.replace(",", " ").split()
    if words[:2] == ["#", "dpocli"] and len(words) > 2:
        return words[2]
    status = StatusFile(out).read()
    return status.command if status else None
