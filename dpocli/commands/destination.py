"""`--out` before anything is written there: it is new, or what an earlier start of the same command left."""

from pathlib import Path
from typing import Literal

from dpocli.artifacts.cache_format import PART_PATTERN, describe_directory
from dpocli.artifacts.files import file_errors_in_words
from dpocli.artifacts.status import StatusFile
from dpocli.errors import UsageError

Command = Literal["precompute", "train", "evaluate"]

_WRITTEN = (
    *("config.yaml", "model", "checkpoints", "metrics.jsonl", "summary.json", "curves.png"),
    *("metrics.json", "pairs.parquet", "pairs", "tensorboard", "wandb"),
)
"""What the commands write, so that it must not be there already from elsewhere."""


def check_out(out: Path, command: Command) -> None:
    """Raises UsageError where `--out` is a file, or holds what this command did not write and would overwrite."""
    with file_errors_in_words(f"Looking at --out {out}"):
        _check(out, command)


def _check(out: Path, command: Command) -> None:
    if not out.is_dir() and (out.exists() or out.is_symlink()):
        what = "a file" if out.exists() else "a link that leads nowhere"
        raise UsageError(f"--out {out}: this is {what}. Give a directory for what {command} writes.")
    owner = _owner(out)
    if owner == command:
        return
    if owner:
        raise UsageError(f"--out {out}: it holds what `dpocli {owner}` wrote. Give {command} a directory of its own.")
    if command == "precompute":
        return  # `cache_writer.check_destination` knows more: parts may come from other workers, or from a copy.
    in_the_way = ", ".join(name for name in _WRITTEN if (out / name).exists())
    found = "a reference cache" if any(out.glob(PART_PATTERN)) else in_the_way or describe_directory(out)
    if found:
        raise UsageError(
            f"--out {out}: it holds {found}, which no earlier `dpocli {command}` wrote there. Give a new or an empty "
            "directory."
        )


def _owner(out: Path) -> str | None:
    """The command that wrote a directory: `config.yaml` begins with it, and before that is written the status has it."""
    try:
        first_line = (out / "config.yaml").read_text(encoding="utf-8").partition("\n")[0]
    except (OSError, UnicodeDecodeError):
        first_line = ""
    words = first_line.replace(",", " ").split()
    if words[:2] == ["#", "dpocli"] and len(words) > 2:
        return words[2]
    status = StatusFile(out).read()
    return status.command if status else None
