"""Checkpoints: numbered directories of tensors and JSON, there whole or not at all.

Every process writes its own pieces of the tensors as safetensors, through torch.distributed.checkpoint, which puts them
together for any other number of processes. Nothing that is read back can run code.
"""

import json
import re
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dpocli.artifacts.files import file_error_in_words, sync_directory, sync_file
from dpocli.engine.best import best_step
from dpocli.engine.mesh import Processes
from dpocli.engine.saved_model import Provenance
from dpocli.errors import ResourceError, UsageError

if TYPE_CHECKING:
    from dpocli.engine.policy import Policy

FORMAT_VERSION = 2
STATE_NAME = "state.json"
_NAME = re.compile(r"step-(\d+)")
_MODEL = "model/"
"""With this begin the names of weights; those of moments with `optimizer/`."""


def latest(directory: Path, up_to: int | None = None) -> tuple[int, Path] | None:
    """Step and path of the newest checkpoint, or None. A half-written one has another name and is never seen.

    Args:
        directory: of all checkpoints of the run.
        up_to: the last step to be looked at, where not all count.
    """
    found = [(int(match[1]), path) for path in _entries(directory) if (match := _NAME.fullmatch(path.name))]
    return max((entry for entry in found if up_to is None or entry[0] <= up_to), default=None)


def save(
    directory: Path,
    step: int,
    policy: "Policy",
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    provenance: Provenance,
    keep_last: int,
    processes: Processes,
) -> None:
    """Writes `directory/step-N`, then removes the oldest beyond `keep_last`. Every process takes part.

    Args:
        directory: of all checkpoints of the run, which all processes see.
        step: the optimizer step that is done.
        policy: its float32 master weights are saved.
        optimizer: its moments are saved.
        state: anything else that JSON can hold.
        provenance: of the weights.
        keep_last: how many checkpoints stay.
        processes: each writes its pieces.

    Raises:
        ResourceError: there is no room.
    """
    final, temporary = directory / f"step-{step}", directory / f".step-{step}"
    if processes.is_first:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    processes.wait()
    tensors = _weights(policy) | _moments(policy, optimizer)
    try:
        state_dict_saver.save(
            tensors,
            storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
            process_group=processes.group,
        )
        for path in temporary.glob(f"shard-{processes.rank + 1:05d}-*"):
            sync_file(path)
    except (CheckpointException, SafetensorError, OSError) as error:
        raise _not_written(error, final) from error
    processes.wait()
    if processes.is_first:
        facts = {"format": FORMAT_VERSION, "step": step} | state
        (temporary / STATE_NAME).write_text(json.dumps(facts, indent=2))
        provenance.write(temporary)
        if policy.adapter:
            policy.adapter.peft_config["default"].save_pretrained(str(temporary))
        for path in temporary.glob("*.json"):
            sync_file(path)
        sync_directory(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        sync_directory(directory)
        remove_old(directory, keep_last)
    processes.wait()


def load(path: Path, policy: "Policy", optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts weights and moments back, each process taking its part, and returns the rest of the state.

    Raises:
        UsageError: a file of it is damaged.
    """
    try:
        state: dict[str, Any] = json.loads((path / STATE_NAME).read_text())
        if state["format"] != FORMAT_VERSION:
            raise ValueError(f"it has format {state['format']}, and this dpocli reads format {FORMAT_VERSION}")
        reader = HuggingFaceStorageReader(str(path))
        moments = _room_for_moments(policy, reader)
        tensors = {f"optimizer/{name}/{key}": room for name, found in moments.items() for key, room in found.items()}
        with torch.no_grad():
            state_dict_loader.load(_weights(policy) | tensors, storage_reader=reader)
            for name, parameter in policy.masters:
                for key, value in moments[name].items():
                    optimizer.state[parameter][key] = value
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"The checkpoint {path} cannot be read ({_first_line(error)}). Remove that directory: the same command "
            "line then goes on from the checkpoint before it, or from the start."
        ) from error
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts the weights of a checkpoint, and nothing else of it, into a model that may be spread over processes.

    Args:
        path: of the checkpoint.
        model: as it was before its training, in any dtype; with an adapter on it where one was trained.

    Raises:
        UsageError: a file of the checkpoint is damaged, or it is that of another model.
    """
    try:
        reader = HuggingFaceStorageReader(str(path))
        parameters = {f"{_MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()}
        stored = [name for name in reader.read_metadata().state_dict_metadata if name.startswith(_MODEL)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a process reads for itself is what is wanted
            state_dict_loader.load({name: parameters[name] for name in stored}, storage_reader=reader, no_dist=True)
    except (CheckpointException, SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise UsageError(
            f"The checkpoint {path} cannot be read ({_first_line(error)}): a file of it is damaged, or the model that it was "
            "trained from has changed."
        ) from error


def remove_unfinished(directory: Path) -> None:
    """Clears what a killed writer left behind."""
    for path in _entries(directory):
        if path.name.startswith(".step-"):
            shutil.rmtree(path, ignore_errors=True)


def _weights(policy: "Policy") -> dict[str, Tensor]:
    return {f"{_MODEL}{name}": parameter.detach() for name, parameter in policy.masters}


def _moments(policy: "Policy", optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in policy.masters
        for key, value in sorted(optimizer.state[parameter].items())
    }


def _room_for_moments(policy: "Policy", reader: HuggingFaceStorageReader) -> dict[str, dict[str, Tensor]]:
    """What a checkpoint holds of the optimizer, by parameter, as empty tensors: spread like the parameter, or whole."""
    parameters = dict(policy.masters)
    room: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for entry, facts in reader.read_metadata().state_dict_metadata.items():
        kind, _, rest = entry.partition("/")
        name, _, key = rest.rpartition("/")
        if kind != "optimizer":
            continue
        assert isinstance(facts, TensorStorageMetadata)
        parameter, dtype = parameters[name], facts.properties.dtype
        if facts.size == parameter.shape:
            room[name][key] = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        else:
            room[name][key] = torch.zeros(facts.size, dtype=dtype)
    return room


def _not_written(error: BaseException, path: Path) -> BaseException:
    causes: Iterator[BaseException] = iter([error])
    if isinstance(error, CheckpointException):
        causes = iter([cause for cause, *_ in error.failures.values()])
    for cause in causes:
        if isinstance(cause, OSError) and cause.errno is not None:
            return file_error_in_words(cause, f"Writing {path}")
        if isinstance(cause, SafetensorError):  # it wraps the errors of the file system
            return ResourceError(
                f"Writing {path}: {cause}. Make room on the disk; the same command line goes on from the checkpoint before."
            )
    return error


def _first_line(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return f"{type(error).__name__}: {error}".splitlines()[0]


def remove_old(directory: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last`, and the best one, which does not count."""
    steps = sorted(int(match[1]) for path in _entries(directory) if (match := _NAME.fullmatch(path.name)))
    best = best_step(directory)
    for step in [step for step in steps if step != best][:-keep_last]:
        shutil.rmtree(directory / f"step-{step}", ignore_errors=True)


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
