"""Checkpoints: numbered directories of tensors and JSON, there whole or not at all.

Every process writes its own pieces of the tensors as safetensors, through torch.distributed.checkpoint, which puts them
together for any other number of processes. Nothing that is read back can run code.
"""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dpocli.checkpoint.retention import remove_old
from dpocli.checkpoint.state import STATE_NAME, DamagedCheckpointError, State
from dpocli.distributed.processes import Processes
from dpocli.distributed.shared_filesystem import appears
from dpocli.errors import ResourceError, UsageError, in_words, is_lost_peer, is_out_of_memory
from dpocli.model.save import Provenance
from dpocli.run.files import file_error_in_words, sync_directory, sync_file

if TYPE_CHECKING:
    from dpocli.training.policy import Policy

_MODEL = "model/"
"""With this begin the names of weights; those of moments with `optimizer/`."""

_UNREADABLE = (CheckpointException, SafetensorError, OSError, ValueError, KeyError, RuntimeError, AssertionError)
"""What the libraries raise for files that are missing, cut off, or of another model; `_no_damage` sorts out the rest."""

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors gives the number of an error of the system."""


def save(
    directory: Path,
    policy: "Policy",
    optimizer: torch.optim.Optimizer,
    state: State,
    provenance: Provenance,
    keep_last: int,
    sound_step: int,
    processes: Processes,
) -> None:
    """Writes `directory/step-N`, then removes old ones. Every process takes part, and all fail where one does.

    Args:
        directory: of all checkpoints of the run, which all processes see.
        policy: its float32 master weights are saved.
        optimizer: its moments are saved.
        state: the rest, with the optimizer step that is done; `files` of it are filled in here.
        provenance: of the weights.
        keep_last: how many checkpoints stay, as `remove_old` counts them.
        sound_step: the last step whose weights are known to be good.
        processes: each writes its pieces.

    Raises:
        ResourceError: there is no room. Nothing of the checkpoint is left, so that there is for smaller files.
        UsageError: the first process does not see what another one has written.
    """
    final, temporary = directory / f"step-{state.step}", directory / f".step-{state.step}"
    try:
        with processes.agreeing(), _not_written(final):
            if processes.is_first:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
        pieces: list[tuple[int, str, int]] = []
        with processes.agreeing(), _not_written(final):
            state_dict_saver.save(
                _weights(policy) | _moments(policy, optimizer),
                storage_writer=HuggingFaceStorageWriter(str(temporary), save_distributed=True),
                process_group=processes.group,
            )
            for path in temporary.glob(f"shard-{processes.rank + 1:05d}-*"):
                sync_file(path)
                pieces.append((processes.rank, path.name, path.stat().st_size))
        pieces = processes.gather(pieces)
        with processes.agreeing(), _not_written(final):
            if processes.is_first:
                _check_all_there(temporary, pieces)
                files = {name: size for _, name, size in pieces}
                text = state.model_copy(update={"files": files}).model_dump_json(indent=2)
                (temporary / STATE_NAME).write_text(text)
                provenance.write(temporary)
                if policy.adapter:
                    policy.adapter.peft_config["default"].save_pretrained(str(temporary))
                for path in temporary.glob("*.json"):
                    sync_file(path)
                sync_directory(temporary)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                sync_directory(directory)
                remove_old(directory, keep_last, sound_step)
    except BaseException:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(path: Path, state: State, policy: "Policy", optimizer: torch.optim.Optimizer, processes: Processes) -> None:
    """Puts weights and moments back, each process taking its part. Every process takes part, and all fail where one does.

    Raises:
        DamagedCheckpointError: a file of it is missing or damaged. The policy's weights are of no use then.
    """
    with processes.agreeing(), _not_read(path):
        _check_files(path, state)
        reader = HuggingFaceStorageReader(str(path))
        moments = _room_for_moments(policy, reader)
    tensors = {f"optimizer/{name}/{key}": room for name, found in moments.items() for key, room in found.items()}
    with processes.agreeing(), _not_read(path), torch.no_grad():
        state_dict_loader.load(_weights(policy) | tensors, storage_reader=reader)
        for name, parameter in policy.masters:
            for key, value in moments[name].items():
                optimizer.state[parameter][key] = value


def load_weights(path: Path, model: nn.Module) -> None:
    """Puts the weights of a checkpoint, and nothing else of it, into a model that may be spread over processes.

    Args:
        path: of the checkpoint.
        model: as it was before its training, in any dtype; with an adapter on it where one was trained.

    Raises:
        UsageError: a file of the checkpoint is damaged, or it is that of another model.
    """
    with another_checkpoint_wanted():
        _check_files(path, State.read(path))
    try:
        reader = HuggingFaceStorageReader(str(path))
        parameters = {f"{_MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()}
        stored = [name for name in reader.read_metadata().state_dict_metadata if name.startswith(_MODEL)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that a process reads for itself is what is wanted
            state_dict_loader.load({name: parameters[name] for name in stored}, storage_reader=reader, no_dist=True)
    except _UNREADABLE as error:
        if other := _no_damage(error, path):
            raise other from error
        raise UsageError(
            f"The checkpoint {path} cannot be read ({_in_words(error)}): a file of it is damaged, or the model that it was "
            "trained from has changed."
        ) from error


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


@contextmanager
def _not_written(path: Path) -> Iterator[None]:
    """What goes wrong in the block, as an error of writing the checkpoint `path`."""
    try:
        yield
    except (CheckpointException, SafetensorError, OSError) as error:
        cause = _cause(error)
        if isinstance(cause, OSError) and cause.errno is not None:
            raise file_error_in_words(cause, f"Writing {path}") from error
        if isinstance(cause, SafetensorError):  # it wraps the errors of the file system
            raise ResourceError(
                f"Writing {path}: {in_words(cause)}. Make room on the disk; the same command line goes on from the "
                "checkpoint before."
            ) from error
        raise


@contextmanager
def another_checkpoint_wanted() -> Iterator[None]:
    """Damage in the block, as an error of somebody who only looks at a checkpoint."""
    try:
        yield
    except DamagedCheckpointError as error:
        raise UsageError(f"{error.why} Give another checkpoint.") from error


@contextmanager
def _not_read(path: Path) -> Iterator[None]:
    """What goes wrong in the block, as an error of reading the checkpoint `path`."""
    try:
        yield
    except _UNREADABLE as error:
        if other := _no_damage(error, path):
            raise other from error
        raise DamagedCheckpointError(path, _in_words(error)) from error


def _check_all_there(temporary: Path, pieces: Iterable[tuple[int, str, int]]) -> None:
    """Raises UsageError where the first process does not see all pieces, (rank, file name, bytes), that were written."""
    for rank, name, size in pieces:
        if not appears(temporary / name) or (temporary / name).stat().st_size != size:
            raise UsageError(
                f"{temporary.parent}: process {rank} has written its piece {name} of a checkpoint, and the first process "
                "does not see it. Give an --out on a file system that all machines of the run share."
            )


def _check_files(path: Path, state: State) -> None:
    """Raises DamagedCheckpointError where a file of tensors is missing or cut off: some of it might go unnoticed."""
    for name, size in (state.files or {}).items():
        try:
            found = (path / name).stat().st_size
        except FileNotFoundError:
            raise DamagedCheckpointError(path, f"{name} is missing") from None
        if found != size:
            raise DamagedCheckpointError(path, f"{name} has {found:,} bytes, and {size:,} were written")


def _no_damage(error: BaseException, path: Path) -> BaseException | None:
    """What is to be raised where reading the checkpoint `path` failed and it may be whole all the same; else None.

    That is so where memory or open files ran out, another process is gone, or the disk or rights are at fault.
    """
    causes = _causes(error)
    if short := next((cause for cause in causes if is_out_of_memory(cause) or is_lost_peer(cause)), None):
        return short
    for cause in causes:
        number = _system_error(cause)
        if number == errno.ENOMEM:
            return MemoryError(str(cause))
        if number not in (None, errno.ENOENT):
            return file_error_in_words(OSError(number, ""), f"Reading {path}")
        # safetensors says of every file that it cannot open that it is not there.
        named = str(cause).partition("No such file or directory: ")[2].strip()
        if number is None and isinstance(cause, FileNotFoundError) and os.path.isfile(named):
            return ResourceError(
                f"Reading {named} failed: it is there and cannot be opened, as where too many files are open (ulimit -n). See to "
                "it, and run the same line again."
            )
    return None


def _system_error(error: BaseException) -> int | None:
    """The number of an error of the system, or of one that safetensors wraps."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    match = _SYSTEM_ERROR.search(str(error)) if isinstance(error, OSError | SafetensorError) else None
    return int(match[1]) if match else None


def _causes(error: BaseException) -> list[BaseException]:
    """What the processes met, where several exchanged what they met."""
    found = [cause for cause, _ in error.failures.values()] if isinstance(error, CheckpointException) else []
    return found or [error]


def _cause(error: BaseException) -> BaseException:
    return _causes(error)[0]


def _in_words(error: BaseException) -> str:
    cause = _cause(error)
    if isinstance(cause, OSError) and cause.errno is not None:
        return f"{Path(str(cause.filename)).name}: {os.strerror(cause.errno).lower()}"
    if isinstance(cause, RuntimeError | ValueError) and " " in str(cause):
        return in_words(cause)
    return "a file of tensors is cut off or damaged"
