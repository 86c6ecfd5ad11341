"""Whether a run directory holds the same run: to go on with, finished already, or another one."""

import json
from dataclasses import dataclass
from typing import Any

import yaml
from pydantic import ValidationError

from dpocli.artifacts.cache_reader import PairStore
from dpocli.config.models import TrainOptions
from dpocli.errors import UsageError

NEUTRAL = frozenset(
    [
        "out",
        "as_json",
        "device",
        "token_budget",
        "scratch",
        "data",
        "reference",
        "eval_reference",
        "model",
        "gradient_checkpointing",
        "step0_tolerance",
        "log_every",
        "save_every",
        "keep_last",
        "track",
        "eval_every",
    ]
)
"""Options that cannot change a value of the run, and paths, whose contents are compared instead."""


@dataclass(frozen=True, slots=True)
class Resumable:
    """What an earlier start of the same line left behind."""

    finished: bool
    summary: dict[str, Any]

    @classmethod
    def of(cls, options: TrainOptions) -> "Resumable":
        """Raises UsageError where the directory holds a run with other settings."""
        config, summary = options.out / "config.yaml", options.out / "summary.json"
        if not config.is_file():
            return cls(False, {})
        try:
            earlier = TrainOptions.model_validate(yaml.safe_load(config.read_text()))
        except (ValidationError, yaml.YAMLError, TypeError):
            raise UsageError(
                f"--out {options.out}: it holds a config.yaml that is not a training run's. Give another directory."
            ) from None
        differing = [
            f"{name}: {getattr(earlier, name)} -> {getattr(options, name)}"
            for name in TrainOptions.model_fields
            if name not in NEUTRAL and getattr(earlier, name) != getattr(options, name)
        ]
        if differing:
            raise UsageError(
                f"--out {options.out}: it holds a run with other settings ({'; '.join(differing)}). Give another "
                "directory, or the settings of that run to go on with it."
            )
        if summary.is_file() and (options.out / "model").is_dir():
            return cls(True, json.loads(summary.read_text()))
        return cls(False, {})

    @staticmethod
    def state(store: PairStore) -> dict[str, Any]:
        """What a checkpoint remembers of the pairs that it was trained on."""
        return {"pairs": store.fingerprint.digest, "num_pairs": len(store)}

    def check_pairs(self, state: dict[str, Any], store: PairStore) -> None:
        """Raises UsageError where a checkpoint was trained on other pairs than these."""
        if state.get("pairs") != store.fingerprint.digest:
            raise UsageError(
                "The checkpoint was trained on another reference cache than --reference now holds (the path is the same "
                "or the cache was written anew). Give another --out."
            )
