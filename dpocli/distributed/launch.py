"""Rank, number of processes and device of this process, from the environment of torchrun or of srun."""

import os
import re
from typing import Literal

import torch

from dpocli.errors import UsageError

Launcher = Literal["torchrun", "slurm"]

_VARIABLES = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "slurm": ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
}


def launched(launcher: Launcher = "torchrun") -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine), by the variables of torchrun and its kin, or of srun.

    Raises:
        UsageError: the variables do not fit together.
    """
    # A batch script has SLURM_PROCID and SLURM_NTASKS too, and is no task of a step.
    if launcher == "slurm" and "SLURM_STEP_NUM_TASKS" not in os.environ:
        raise UsageError(
            "--launcher slurm: SLURM_STEP_NUM_TASKS is not in the environment, so srun did not start this. Begin the line with srun."
        )
    names = _VARIABLES[launcher]
    rank, count, local_rank = (_number(name, default) for name, default in zip(names, (0, 1, 0), strict=True))
    needs_address = launcher == "torchrun" and count > 1  # tasks of srun find each other by other variables
    if rank >= count or (needs_address and not os.environ.get("MASTER_ADDR")):
        address = f", MASTER_ADDR={os.environ.get('MASTER_ADDR', '')}" if launcher == "torchrun" else ""
        raise UsageError(
            f"{names[0]}={rank} and {names[1]}={count}{address} in the environment do not fit together. Start with a launcher "
            "(torchrun, or srun and --launcher slurm), or unset them."
        )
    return rank, count, local_rank


def slurm_address() -> str:
    """Address and port where the tasks of a step meet: MASTER_ADDR and MASTER_PORT, else its first node and a port by job."""
    nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
    host = os.environ.get("MASTER_ADDR") or first_host(nodes)
    if not host:
        raise UsageError(
            "--launcher slurm: neither MASTER_ADDR nor SLURM_STEP_NODELIST is in the environment, so the tasks cannot find each "
            "other. Begin the line with srun."
        )
    steps = _number("SLURM_JOB_ID", 0) * 7 + _number("SLURM_STEP_ID", 0)
    return f"{host}:{os.environ.get('MASTER_PORT') or 20000 + steps % 10000}"


def first_host(nodes: str) -> str:
    """First host of a list as SLURM writes it: `gpu[007-012,020],login1` → `gpu007`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return match[1] + (match[2] or "") if match else ""


def pick_device(choice: Literal["auto", "cpu", "cuda"], launcher: Launcher = "torchrun") -> torch.device:
    """The device that this process computes on, made torch's current one.

    Raises:
        UsageError: there is no CUDA device, or the variables of the launcher do not fit together.
    """
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no CUDA device here. Use --device cpu, or check the driver.")
    if choice == "cpu" or not available:
        return torch.device("cpu")
    _, _, local_rank = launched(launcher)
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)  # else what libraries allocate without a device goes to the first one
    return device


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        raise UsageError(
            f"{name}={value} in the environment is no number. Start with a launcher (torchrun), or unset it."
        )
    return int(value)
