"""The results of an evaluation: written whole, recognised when the command is given again, never replaced."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from dpocli.cache.reader import PairStore
from dpocli.commands.models import EvaluatedModel
from dpocli.commands.pairs import fingerprint_of_rows
from dpocli.config.commands import EvaluateOptions
from dpocli.config.flags import options_of, values_of
from dpocli.config.options import NUMBERS_OF_LOSSES
from dpocli.data.sources import open_rows
from dpocli.errors import UsageError
from dpocli.model.hashing import HASH_MEMORY_NAME, HashMemory, changes
from dpocli.run.files import make_directory, read_json, sync_directory, translating_file_errors, write_json

METRICS, INPUTS, STAGING = "metrics.json", "inputs.json", ".unfinished"

NEUTRAL = frozenset(
    {
        *("out", "json", "device", "launcher", "shards", "scratch", "scoring", "token_budget", "require"),
        *("model", "data", "reference", "second_reference", "loss", *NUMBERS_OF_LOSSES),
    }
)
"""Options that cannot change a result; and models, pairs and losses, which are compared by content."""


def is_finished(out: Path) -> bool:
    """Whether a directory holds a finished evaluation; `metrics.json` is written last."""
    return (out / METRICS).is_file()


def finished_report(options: EvaluateOptions, models: Sequence[EvaluatedModel]) -> dict[str, Any]:
    """Read the report of a finished evaluation, if the same command made it.

    Raises:
        UsageError: it was made of something else, or cannot be read.
    """
    second = _digests_of_cache(options.second_reference)
    now = inputs_of(options, models, _digests_of_pairs(options, models), second)
    report, before = read_json(options.out / METRICS), read_json(options.out / INPUTS)
    if isinstance(report, dict) and isinstance(before, dict) and before.keys() >= now.keys():
        if found := _differences(before, now):
            raise UsageError(
                f"--out {options.out}: it holds a finished evaluation with other settings or inputs ({'; '.join(found)}). "
                "Give another directory."
            )
        return report
    damaged = INPUTS if isinstance(report, dict) else METRICS
    raise UsageError(
        f"--out {options.out}: it holds a finished evaluation, but {damaged} is missing or damaged, so it cannot be compared "
        "with this one. Give another directory."
    )


def inputs_of(
    options: EvaluateOptions,
    models: Sequence[EvaluatedModel],
    pairs: Sequence[str],
    second: Sequence[str],
) -> dict[str, Any]:
    """Name everything that decides an evaluation: the content of `inputs.json`.

    Args:
        options: of the command.
        models: of `--model`.
        pairs: digests of the fingerprints of their pairs; empty where the files were deleted since.
        second: the digest of the second reference's cache, likewise.
    """
    memory = HashMemory(options.out / HASH_MEMORY_NAME)
    content = {_place(model.name): model.digests(memory) for model in models}
    if not is_finished(options.out):
        memory.save()
    values = values_of(options)
    return {
        "options": {name: value for name, value in values.items() if name not in NEUTRAL},
        "model": [_place(model.name) for model in models],
        "loss": [", ".join(map(str, model.losses.values())) for model in models],
        "content": content,
        "pairs": {"path": str(options.reference or options.data.files), "digests": list(dict.fromkeys(pairs))},
        "second_reference": {"path": str(options.second_reference), "digests": list(second)}
        if options.second_reference
        else None,
    }


def write_results(out: Path, inputs: Mapping[str, Any], write: Callable[[Path], None]) -> None:
    """Write the results into a directory beside, then move them into place, `metrics.json` last.

    Args:
        out: `--out`, without a finished evaluation.
        inputs: of `inputs_of`.
        write: writes `metrics.json` and the other results into the directory that it is given.

    Raises:
        UsageError: another process finished an evaluation there meanwhile.
    """
    staging = out / STAGING
    with translating_file_errors(f"Writing into --out {out}"):
        shutil.rmtree(staging, ignore_errors=True)
        make_directory(staging)
        write_json(staging / INPUTS, inputs)
        write(staging)
        if is_finished(out):
            raise UsageError(
                f"--out {out}: another process finished an evaluation there meanwhile. It was not replaced."
            )
        for path in sorted(staging.iterdir(), key=lambda path: path.name == METRICS):
            target = out / path.name
            if target.is_dir():  # of an evaluation that was killed here
                shutil.rmtree(target)
            path.replace(target)
            sync_directory(out)
        staging.rmdir()


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs between two results of `inputs_of`."""
    optional = [option for option in options_of(EvaluateOptions) if not option.info.is_required()]
    defaults = {option.key: to_jsonable_python(option.info.default) for option in optional}
    options = {name: before["options"].get(name, defaults[name]) for name in now["options"]}
    found = changes("", options, now["options"])
    for name in ("model", "loss"):
        if before[name] != now[name]:
            found.append(f"{name}: {', '.join(before[name])} -> {', '.join(now[name])}")
    for model, digests in now["content"].items():
        known = before["content"].get(model, digests)
        found += [f"the {part} of --model {model}" for part in digests if known.get(part) != digests[part]]
    for name in ("pairs", "second_reference"):
        if not _same_pairs(before[name], now[name]):
            sources = dict.fromkeys(str(side["path"]) if side else "none" for side in (before[name], now[name]))
            changed = ", with other content" if len(sources) == 1 else ""
            found.append(f"{name.replace('_', ' ')}: {' -> '.join(sources)}{changed}")
    return found


def _same_pairs(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether pairs are the same by content; by path where the files are not there any more."""
    if before is None or now is None:
        return before is now
    compared = "digests" if now["digests"] else "path"
    return bool(before[compared] == now[compared])


def _digests_of_pairs(options: EvaluateOptions, models: Sequence[EvaluatedModel]) -> list[str]:
    if options.reference:
        return _digests_of_cache(options.reference)
    try:
        rows = open_rows(options.data)
    except UsageError:  # deleted since
        return []
    return [fingerprint_of_rows(options, model.tokenizer, rows).digest for model in models]


def _digests_of_cache(directory: Path | None) -> list[str]:
    return [PairStore.open(directory).fingerprint.digest] if directory and directory.is_dir() else []


def _place(model: str) -> str:
    """The path of a model; one directory may have several names. A name on the hub has no path."""
    expanded = os.path.expanduser(model)
    return os.path.realpath(expanded) if os.path.exists(expanded) else os.path.normpath(model)
