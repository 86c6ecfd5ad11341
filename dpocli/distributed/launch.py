"""The processes of a run, as the launcher's environment describes them, and what they say to each other.

One engine: replicas × shards, gloo on CPU and NCCL on GPUs, so that what the tests run is what clusters run.
"""

import os
import re
from typing import Literal

import torch

from dpocli.errors import UsageError

Launcher = Literal["torchrun", "slurm"]


def launched(launcher: Launcher = "torchrun") -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) from the environment of torchrun and its kin, or of srun."""
    if launcher == "slurm":
        return _launched_by_slurm()
    rank, count, local_rank = (_number(*entry) for entry in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))
    if rank >= count or (count > 1 and not os.environ.get("MASTER_ADDR")):
        raise UsageError(
            f"RANK={rank}, WORLD_SIZE={count} and MASTER_ADDR={os.environ.get('MASTER_ADDR', '')} in the environment do not fit "
            "together. Start with a launcher (torchrun), or unset them."
        )
    return rank, count, local_rank


def _launched_by_slurm() -> tuple[int, int, int]:
    """As srun counts its tasks; they need not know of each other."""
    # SLURM_PROCID and SLURM_NTASKS stand in a batch script too, which is no task of a step.
    if "SLURM_STEP_NUM_TASKS" not in os.environ:
        raise UsageError(
            "--launcher slurm: SLURM_STEP_NUM_TASKS is not in the environment, so srun did not start this. Begin the line with srun."
        )
    names = (("SLURM_PROCID", 0), ("SLURM_STEP_NUM_TASKS", 1), ("SLURM_LOCALID", 0))
    rank, count, local_rank = (_number(*entry) for entry in names)
    if rank >= count:
        raise UsageError(
            f"SLURM_PROCID={rank} and SLURM_STEP_NUM_TASKS={count} in the environment do not fit together."
        )
    return rank, count, local_rank


def slurm_address() -> str:
    """Where the tasks of a step meet: MASTER_ADDR and MASTER_PORT, else the step's first node and a port of the job's."""
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
    """Of a list as SLURM writes it: `gpu[007-012,020],login1` → `gpu007`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", nodes)
    return match[1] + (match[2] or "") if match else ""


def _number(name: str, default: int) -> int:
    value = os.environ.get(name) or str(default)
    if not value.isdigit():
        raise UsageError(
            f"{name}={value} in the environment is no number. Start with a launcher (torchrun), or unset it."
        )
    return int(value)


def pick_device(choice: Literal["auto", "cpu", "cuda"], launcher: Launcher = "torchrun") -> torch.device:
    """The device that this process computes on."""
    available = torch.cuda.is_available()
    if choice == "cuda" and not available:
        raise UsageError("--device cuda: torch sees no CUDA device here. Use --device cpu, or check the driver.")
    if choice == "cpu" or not available:
        return torch.device("cpu")
    _, _, local_rank = launched(launcher)
    return torch.device("cuda", local_rank % torch.cuda.device_count())
