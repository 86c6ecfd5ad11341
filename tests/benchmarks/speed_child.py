"""One task of `speed.py`, in its own process: prints a JSON object as the last line of stdout.

It imports dpocli or TRL, never both, so that it runs in either environment. The only argument is a `Task`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measuring import Outcome, Pair, Sides, load_pairs, save_pairs
from speed_task import Task
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel


def main(task: Task) -> None:
    tasks: dict[str, Callable[[Task], Outcome | None]] = {
        "precompute": precompute,
        "train": train,
        "data": make_data,
        "reference": add_reference,
        "oracle": ask_oracle,
        "plain": ask_plainly,
    }
    outcome = tasks[task.what](task)
    if outcome:
        outcome.print()
    else:
        print(json.dumps({}))


def precompute(task: Task) -> Outcome:
    if task.tool == "trl":
        import with_trl

        return with_trl.scored(Path(task.model), _pairs(task), batch=task.batch, restricted=task.restricted)
    import with_dpocli

    return with_dpocli.scored(Path(task.model), _pairs(task), without=task.without)


def train(task: Task) -> Outcome:
    if task.tool == "trl":
        import with_trl

        return with_trl.trained(Path(task.model), _pairs(task), batch=task.batch, restricted=task.restricted)
    import with_dpocli

    cache = Path(task.cache) if task.cache else None
    return with_dpocli.trained(Path(task.model), _pairs(task), without=task.without, live=task.live, cache=cache)


def make_data(task: Task) -> None:
    import speed_data

    speed_data.make(Path(task.rows), Path(task.model), task.count, Path(task.out))


def add_reference(task: Task) -> None:
    """The pairs with log-probs of the model that is to be trained on them: what training starts from."""
    import with_dpocli

    pairs = _pairs(task)
    logps = with_dpocli.scored(Path(task.model), pairs).logps
    save_pairs((replace(pair, reference=sides) for pair, sides in zip(pairs, logps, strict=True)), Path(task.out))


def ask_oracle(task: Task) -> Outcome:
    """Log-probs in float64, each side alone in its row."""
    model = _model(task).double()
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module)  # transformers' own goes through float32
    return Outcome(0, 0, logps=[_plain_logps(model, pair) for pair in _pairs(task)])


def ask_plainly(task: Task) -> Outcome:
    """Log-probs as transformers makes them in float32, each side alone in its row: what the oracle can ask of anyone."""
    model = _model(task)
    return Outcome(0, 0, logps=[_plain_logps(model, pair) for pair in _pairs(task)])


def _norm(module: Any, hidden: Tensor) -> Tensor:
    variance = hidden.square().mean(-1, keepdim=True)
    normed: Tensor = module.weight * hidden * torch.rsqrt(variance + module.variance_epsilon)
    return normed


def _plain_logps(model: PreTrainedModel, pair: Pair) -> Sides:
    def logps(side: list[int]) -> list[float]:
        ids = torch.tensor([pair.prompt_ids + side])
        with torch.no_grad():
            logits = model(ids, use_cache=False).logits[0, len(pair.prompt_ids) - 1 : -1]
        assert logits.dtype == model.dtype
        found: list[float] = torch.log_softmax(logits, dim=-1).gather(-1, torch.tensor(side)[:, None])[:, 0].tolist()
        return found

    return logps(pair.chosen_ids), logps(pair.rejected_ids)


def _model(task: Task) -> PreTrainedModel:
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(task.model, dtype=torch.float32)
    return model.eval()


def _pairs(task: Task) -> list[Pair]:
    return load_pairs(Path(task.pairs))[: task.count]


if __name__ == "__main__":
    main(Task.from_argument(sys.argv[1]))
