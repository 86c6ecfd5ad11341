"""`state.json` of a checkpoint: everything but the tensors, with types that are checked when it is read."""

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from dpocli.cache.view import PairView
from dpocli.errors import UsageError
from dpocli.model.identity import ModelFiles, ModelIdentity
from dpocli.run.files import STATE_NAME, translated_file_error

FORMAT_VERSION = 2


class DamagedCheckpointError(UsageError):
    """What a checkpoint holds is not what was written. An older one may be whole.

    Args:
        path: of the checkpoint.
        why: what is wrong with it.
    """

    def __init__(self, path: Path, why: str) -> None:
        super().__init__(path, why)
        self.why = f"The checkpoint {path} cannot be read ({why})."

    def __str__(self) -> str:
        return (
            f"{self.why} Remove that directory: the same command then resumes from the checkpoint before it, or from "
            "the start."
        )


class _Part(BaseModel):
    """Of types as written: a number in a string is none. What later versions add is passed over."""

    model_config = ConfigDict(frozen=True, strict=True, ser_json_inf_nan="constants")


class Content(_Part):
    """What a run is made from, identified by content: what must not change between its starts.

    Where the weights of a full run come from a checkpoint, other files of --model are refused all the same: parts that
    are not trained (an adapter's base, buffers) come from there, and one rule for all is easier to trust than three.
    """

    pairs: str
    """Digest of the fingerprint of the training pairs' cache."""
    num_pairs: int
    model_weights: str | None = None
    """Names the tensors that training starts from; None, as for all below: of a version that wrote no such thing."""
    model_settings: str | None = None
    """Names what else decides the values of the model: its configuration and code, and an adapter's dropout."""
    held_out: str | None = None
    """Digest of the held-out pairs' cache; None also where there are none."""
    num_held_out: int | None = None

    @classmethod
    def of(cls, files: ModelFiles, identity: ModelIdentity, training: PairView, held_out: PairView | None) -> "Content":
        return cls(
            pairs=training.store.fingerprint.digest,
            num_pairs=len(training),
            model_weights=identity.weights_digest,
            model_settings=identity.settings_digest(files),
            held_out=held_out.store.fingerprint.digest if held_out else None,
            num_held_out=len(held_out) if held_out else 0,
        )

    def differences(self, now: "Content") -> list[str]:
        """What is there now and differs from what the run was made from until now, as phrases; none for equals."""
        found = []
        if self.model_weights not in (None, now.model_weights):
            found.append("the weights of --model (or of its adapter)")
        if self.model_settings not in (None, now.model_settings):
            found.append("the configuration of --model (config.json, or adapter_config.json of its adapter)")
        if (self.pairs, self.num_pairs) != (now.pairs, now.num_pairs):
            found.append("the pairs of --reference (or --data)")
        if self.num_held_out is not None and (self.held_out, self.num_held_out) != (now.held_out, now.num_held_out):
            found.append("the held-out pairs of --eval-reference (or --eval-fraction)")
        return found


class Spent(_Part):
    """What `RunStats` keeps."""

    starts: int
    seconds: dict[str, float]
    peak_memory_bytes: int
    notes: dict[str, Any]


class Budget(_Part):
    """What `BackOff` keeps."""

    given: int | None
    device: str
    tokens: int


class State(Content):
    """All of `state.json`."""

    format: int = FORMAT_VERSION
    step: int
    loss_states: dict[str, dict[str, float]] = {}
    token_budget: Budget | None = None
    account: Spent | None = None
    rows: int | None = None
    """Of `metrics.jsonl`, up to this step."""
    files: dict[str, int] | None = None
    """Bytes of each file of tensors, by name."""
    base: str | None = None
    """Where the model that is trained came from, so that a checkpoint can be looked at by itself."""
    base_adapter: str | None = None

    @classmethod
    def read(cls, path: Path) -> "State":
        """Of the checkpoint at `path`.

        Raises:
            DamagedCheckpointError: the file is missing, or does not hold what it should.
            UsageError: it cannot be read now, or another version wrote it.
        """
        try:
            text = (path / STATE_NAME).read_bytes()
        except FileNotFoundError:
            raise DamagedCheckpointError(path, f"{STATE_NAME} is missing") from None
        except OSError as error:
            raise translated_file_error(error, f"Reading {path / STATE_NAME}") from error
        version = _format_of(text)
        if isinstance(version, int) and version != FORMAT_VERSION:
            raise UsageError(
                f"The checkpoint {path} has format {version}, and this dpocli reads format {FORMAT_VERSION}. Go on with the "
                "dpocli that wrote it, or give another --out."
            )
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            place = ".".join(map(str, first["loc"]))
            found = first["msg"][0].lower() + first["msg"][1:]
            raise DamagedCheckpointError(path, f"{STATE_NAME}: {f'`{place}`: ' if place else ''}{found}") from None

    def check(self, path: Path, num_steps: int, now: Content) -> None:
        """Raises UsageError where this is no checkpoint of a run of so many steps, made from what is there `now`."""
        if path.name != f"step-{self.step}":
            raise UsageError(
                f"{path}: its {STATE_NAME} says that it was written after step {self.step}. Give the directory the name "
                f"step-{self.step} again, or remove it; the same command then resumes."
            )
        if self.step > num_steps:
            raise UsageError(
                f"{path}: this checkpoint is of a longer run: this line makes {num_steps} steps (--epochs, --max-steps, "
                "--batch-size). Give another --out, or the settings that the run began with."
            )
        if found := self.differences(now):
            raise UsageError(
                f"{path}: this checkpoint was made with others than stand there now: {'; '.join(found)}. Put back what the "
                "run began with, or give another --out."
            )


def _format_of(text: bytes) -> object:
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value.get("format") if isinstance(value, dict) else None
