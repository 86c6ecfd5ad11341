"""A dpocli whose second process has memory for passes of `LIMIT` tokens: `python -m tests.commands.short_of_memory_worker …`."""

import os
from typing import Any

import torch

from dpocli.cli import main
from dpocli.training.trainer import Trainer
from tests.commands.test_back_off import PLACES, fail_at

step = Trainer.step


def fail(tokens: int) -> None:
    if tokens > int(os.environ["LIMIT"]):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def first_step(trainer: Trainer, number: int) -> Any:
    if number == 1 and os.environ["RANK"] == "1":
        fail_at(os.environ.get("PLACE", PLACES[1]), trainer.policy.scorer.model, fail)
    return step(trainer, number)


if __name__ == "__main__":
    Trainer.step = first_step  # type: ignore[method-assign]
    main()
