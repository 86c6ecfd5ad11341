"""A dpocli whose second process runs out of memory in its first step: `python -m tests.commands.short_of_memory_worker …`."""

import os
from typing import Any

import torch

from dpocli.cli import main
from dpocli.engine.gradients import Gradients, Step

score = Gradients._score


def short(gradients: Gradients, step: Step, index: int) -> Any:
    if os.environ["RANK"] == "1":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
    return score(gradients, step, index)


if __name__ == "__main__":
    Gradients._score = short  # type: ignore[method-assign]
    main()
