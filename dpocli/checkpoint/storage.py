"""Checkpoints: numbered directories of tensors and JSON, there whole or not at all.

Every process writes its own pieces of the tensors as safetensors, through torch.distributed.checkpoint, which puts them
together for any other number of processes. Nothing that is read back can run code.
"""

import errno
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dpocli.checkpoint.retention import remove_old
from dpocli.checkpoint.state import DamagedCheckpointError, State
from dpocli.distributed.processes import Processes
from dpocli.distributed.shared_filesystem import appears
from dpocli.errors import ResourceError, UsageError, brief_message, is_lost_peer, is_out_of_memory
from dpocli.run.files import STATE_NAME, sync_directory, sync_file, translated_file_error

MODEL, OPTIMIZER = "model/", "optimizer/"
"""Prefixes of the names of tensors in a checkpoint: weights, and moments of the optimizer."""

_UNREADABLE = (CheckpointException, SafetensorError, OSError, ValueError, KeyError, RuntimeError, AssertionError)
"""What the libraries raise for files that are missing, cut off, or of another model; `_no_damage` sorts out the rest."""

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors gives the number of an error of the system."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor of a checkpoint, before it is read."""

    shape: torch.Size
    dtype: torch.dtype


def save(
    directory: Path,
    tensors: Mapping[str, Tensor],
    state: State,
    write_extra: Callable[[Path], None],
    keep_last: int,
    last_finite_step: int,
    processes: Processes,
) -> None:
    """Writes `directory/step-N`, then removes old ones. Every process takes part, and all fail where one does.

    Args:
        directory: of all checkpoints of the run, which all processes see.
        tensors: weights and moments by name, possibly sharded.
        state: the rest, with the optimizer step that is done; `files` of it are filled in here.
        write_extra: writes further JSON files into the directory; called on the first process.
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
                dict(tensors),
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
                write_extra(temporary)
                for path in temporary.glob("*.json"):
                    sync_file(path)
                sync_directory(temporary)
                shutil.rmtree(final, ignore_errors=True)
                temporary.rename(final)
                sync_directory(directory)
                remove_old(directory, keep_last, last_finite_step)
    except BaseException:
        if processes.is_first:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def load(
    path: Path, state: State, allocate: Callable[[Mapping[str, StoredTensor]], dict[str, Tensor]], processes: Processes
) -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, each process its part. Every process takes part, and all fail where one does.

    Args:
        path: of the checkpoint.
        state: what it says of itself.
        allocate: gives the tensors to fill, by name, for what is stored.
        processes: each reads its pieces.

    Raises:
        DamagedCheckpointError: a file of it is missing or damaged. What was to be filled is of no use then.
    """
    with processes.agreeing(), _not_read(path):
        _check_files(path, state)
        reader = HuggingFaceStorageReader(str(path))
        tensors = allocate(_stored_tensors(reader))
    with processes.agreeing(), _not_read(path), torch.no_grad():
        state_dict_loader.load(tensors, storage_reader=reader)
    return tensors


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
        parameters = {f"{MODEL}{name}": parameter.detach() for name, parameter in model.named_parameters()}
        stored = [name for name in reader.read_metadata().state_dict_metadata if name.startswith(MODEL)]
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


def _stored_tensors(reader: HuggingFaceStorageReader) -> dict[str, StoredTensor]:
    stored: dict[str, StoredTensor] = {}
    for name, facts in reader.read_metadata().state_dict_metadata.items():
        assert isinstance(facts, TensorStorageMetadata)
        stored[name] = StoredTensor(facts.size, facts.properties.dtype)
    return stored


@contextmanager
def _not_written(path: Path) -> Iterator[None]:
    """What goes wrong in the block, as an error of writing the checkpoint `path`."""
    try:
        yield
    except (CheckpointException, SafetensorError, OSError) as error:
        cause = _cause(error)
        if isinstance(cause, OSError) and cause.errno is not None:
            raise translated_file_error(cause, f"Writing {path}") from error
        if isinstance(cause, SafetensorError):  # it wraps the errors of the file system
            raise ResourceError(
                f"Writing {path}: {brief_message(cause)}. Make room on the disk; the same command resumes from the "
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

    That is so where memory or open files ran out, another process was lost, or the disk or rights are at fault.
    """
    causes = _causes(error)
    if short := next((cause for cause in causes if is_out_of_memory(cause) or is_lost_peer(cause)), None):
        return short
    for cause in causes:
        number = _system_error(cause)
        if number == errno.ENOMEM:
            return MemoryError(str(cause))
        if number not in (None, errno.ENOENT):
            return translated_file_error(OSError(number, ""), f"Reading {path}")
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
        return brief_message(cause)
    return "a file of tensors is cut off or damaged"
