"""Checkpoints: numbered directories of tensors and JSON, there whole or not at all."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dpocli.artifacts.files import sync_directory, sync_file
from dpocli.engine.best import best_step
from dpocli.engine.mesh import Processes
from dpocli.engine.policy import Policy, place
from dpocli.errors import ResourceError, UsageError

FORMAT_VERSION = 1
_NAME = re.compile(r"step-(\d+)")


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
    policy: Policy,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    keep_last: int,
    processes: Processes,
) -> None:
    """Writes `directory/step-N`, then removes the oldest beyond `keep_last`. Every process takes part.

    Args:
        directory: of all checkpoints of the run.
        step: the optimizer step that is done.
        policy: its float32 master weights are saved.
        optimizer: its moments are saved.
        state: anything else that JSON can hold.
        keep_last: how many checkpoints stay.
        processes: rank 0 writes.
    """
    weights = policy.weights()
    moments = policy.collect(
        (f"{name}/{key}", value)
        for name, parameter in policy.masters
        for key, value in sorted(optimizer.state[parameter].items())
    )
    if processes.is_first:
        final = directory / f"step-{step}"
        temporary = directory / f".step-{step}.{os.getpid()}"
        temporary.mkdir(parents=True)
        _write(temporary / "model.safetensors", weights)
        _write(temporary / "optimizer.safetensors", moments)
        (temporary / "state.json").write_text(json.dumps({"format": FORMAT_VERSION, "step": step} | state, indent=2))
        sync_file(temporary / "state.json")
        sync_directory(temporary)
        temporary.rename(final)
        sync_directory(directory)
        remove_old(directory, keep_last)
    processes.wait()


def load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Puts weights and moments back, each process taking its part, and returns the rest of the state.

    Raises:
        UsageError: a file of it is damaged.
    """
    try:
        return _load(path, policy, optimizer)
    except (SafetensorError, OSError, ValueError, KeyError) as error:
        raise UsageError(
            f"The checkpoint {path} cannot be read ({type(error).__name__}: {error}). Remove that directory: the same command "
            "line then goes on from the checkpoint before it, or from the start."
        ) from error


def _load(path: Path, policy: Policy, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    with safe_open(path / "model.safetensors", "pt") as weights, torch.no_grad():
        for name, parameter in policy.masters:
            place(weights.get_tensor(name), parameter)
    with safe_open(path / "optimizer.safetensors", "pt") as moments, torch.no_grad():
        keys = list(moments.keys())
        for name, parameter in policy.masters:
            saved = {key.rpartition("/")[2]: key for key in keys if key.rpartition("/")[0] == name}
            for short, key in saved.items():
                value = moments.get_tensor(key)
                # AdamW counts its steps in a scalar; everything else is shaped and sharded like the parameter.
                optimizer.state[parameter][short] = value if value.dim() == 0 else _like(value, parameter)
    state: dict[str, Any] = json.loads((path / "state.json").read_text())
    if state["format"] > FORMAT_VERSION:
        raise ValueError(f"it has format {state['format']}, and this dpocli reads up to {FORMAT_VERSION}")
    return state


def remove_unfinished(directory: Path) -> None:
    """Clears what a killed writer left behind."""
    for path in _entries(directory):
        if path.name.startswith(".step-"):
            shutil.rmtree(path, ignore_errors=True)


def _like(value: Tensor, parameter: Tensor) -> Tensor:
    moment = torch.zeros_like(parameter)
    place(value, moment)
    return moment


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:  # it wraps the errors of the file system
        raise ResourceError(
            f"Writing {path}: {error}. Make room on the disk; the same command line goes on from the checkpoint before."
        ) from error
    sync_file(path)


def remove_old(directory: Path, keep_last: int) -> None:
    """Removes all but the newest `keep_last`, and the best one, which does not count."""
    steps = sorted(int(match[1]) for path in _entries(directory) if (match := _NAME.fullmatch(path.name)))
    best = best_step(directory)
    for step in [step for step in steps if step != best][:-keep_last]:
        shutil.rmtree(directory / f"step-{step}", ignore_errors=True)


def _entries(directory: Path) -> list[Path]:
    return list(directory.iterdir()) if directory.is_dir() else []
