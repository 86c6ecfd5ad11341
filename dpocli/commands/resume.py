"""Whether a run directory holds the same run: unfinished, finished, or another one."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dpocli.cache.reader import PairStore
from dpocli.commands.pairs import fingerprint_of_rows
from dpocli.config.commands import TrainOptions
from dpocli.config.flags import options_of
from dpocli.config.options import NUMBERS_OF_LOSSES
from dpocli.config.parsing import load_options
from dpocli.data.sources import open_rows
from dpocli.errors import UsageError
from dpocli.model.hashing import HASH_MEMORY_NAME, HashMemory, digest_json
from dpocli.model.identity import ModelFiles
from dpocli.model.resolve import load_tokenizer
from dpocli.run.files import read_json

NEUTRAL = frozenset(
    {
        *("out", "json", "device", "launcher", "shards", "cpu_offload", "scratch", "track", "dry_run"),
        *("scoring", "token_budget", "gradient_checkpointing", "step0_tolerance"),
        *("data", "reference", "eval_reference"),
        *("max_minutes", "grace_seconds", "log_every", "save_every", "keep_last", "eval_every"),
    }
)
"""Options that cannot change a value of the run; and paths of pairs, whose contents the checkpoints remember."""


def finished_summary(options: TrainOptions) -> dict[str, Any] | None:
    """The summary of the same run where it is finished, else None.

    Raises:
        UsageError: the directory holds a run with other settings.
    """
    config = options.out / "config.yaml"
    if not config.is_file():
        return None
    try:
        earlier = load_options(TrainOptions, {"config": str(config)})
    except UsageError as error:
        raise UsageError(
            f"--out {options.out}: its config.yaml is not that of a training run ({error}) Give another directory."
        ) from None
    before, now = _values(earlier), _values(options)
    if options.held_out.keep_best or options.held_out.early_stopping:  # then it matters when the policy is evaluated
        before, now = before | {"eval_every": earlier.held_out.every}, now | {"eval_every": options.held_out.every}
    differing = [f"{name}: {before[name]} -> {now[name]}" for name in now if before[name] != now[name]]
    if differing:
        raise UsageError(
            f"--out {options.out}: it holds a run with other settings ({'; '.join(differing)}). Give another directory, or "
            "the settings of that run to resume it."
        )
    summary = read_json(options.out / "summary.json")
    if not isinstance(summary, dict) or not (options.out / "model").is_dir():
        return None
    return summary


def check_same_content(options: TrainOptions, summary: Mapping[str, Any], model: ModelFiles) -> None:
    """Raises UsageError where a finished run was made with other pairs or another model than stand there now.

    What was removed since is not compared: a cache may be deleted when all is done.
    """
    found = []
    memory = HashMemory(options.out / HASH_MEMORY_NAME)
    identity = model.identity(memory)
    if identity.weights_digest != summary.get("policy_weights"):
        found.append(f"the weights of --model {options.model.name}")
    settings = identity.settings_digest(model)
    if summary.get("policy_settings", settings) != settings:  # an earlier version wrote no such thing
        found.append(f"the configuration of --model {options.model.name}")
    digest = _pairs_digest(options, model)
    if summary.get("pairs_digest") != digest if digest else summary.get("inputs") != inputs_of(options):
        found.append(f"the pairs of {', '.join(inputs_of(options))}")
    if options.held_out.reference and not _has_same_held_out(options.held_out.reference, summary):
        found.append(f"the held-out pairs of {options.held_out.reference}")
    if found:
        raise UsageError(
            f"--out {options.out}: it holds a finished run, and {' and '.join(found)} are others than it was made with. Give "
            "another directory."
        )


def _has_same_held_out(directory: Path, summary: Mapping[str, Any]) -> bool:
    """Whether a finished run was made with the held-out cache at `directory`; by its path where its content is not known."""
    remembered = summary.get("held_out_digest")  # an earlier version wrote no such thing
    if remembered and directory.is_dir():
        return bool(remembered == PairStore.open(directory).fingerprint.digest)
    resolved = summary.get("options")
    return not isinstance(resolved, Mapping) or resolved.get("eval_reference") in (None, str(directory))


def _pairs_digest(options: TrainOptions, model: ModelFiles) -> str | None:
    """Names the training pairs that stand there now; None where they were removed."""
    if options.reference:
        return PairStore.open(options.reference).fingerprint.digest if options.reference.is_dir() else None
    try:
        rows = open_rows(options.data)
    except UsageError:
        return None
    return fingerprint_of_rows(options, load_tokenizer(model, options.model), rows).digest


def inputs_of(options: TrainOptions) -> list[str]:
    """Where the training pairs come from, as the summary remembers it."""
    return [str(options.reference)] if options.reference else list(options.data.files)


def run_digest(options: TrainOptions, store: PairStore) -> str:
    """Names a run by what decides it, wherever it lies."""
    return digest_json([store.fingerprint.digest, {name: str(value) for name, value in _values(options).items()}])


def _values(options: TrainOptions) -> dict[str, Any]:
    """What decides the run, with defaults filled in, so that saying a default is not another setting."""
    values = {option.key: option.value_of(options) for option in options_of(TrainOptions) if option.key not in NEUTRAL}
    model = os.path.expanduser(options.model.name)
    # One place may have several names, and a name on the hub has no place.
    values |= {"model": os.path.realpath(model) if os.path.exists(model) else os.path.normpath(options.model.name)}
    values |= {"loss": str(options.loss_choice())}
    # Whether there is one; its content is compared where it is known.
    values |= {"eval_reference": "a cache" if options.held_out.reference else None}
    return {name: value for name, value in values.items() if name not in NUMBERS_OF_LOSSES}
