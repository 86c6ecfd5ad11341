"""`--lora-targets`: which names of layers there are, and which of them can carry an adapter."""

import difflib
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpocli.errors import UsageError

ALL_LINEAR = "all-linear"
_CARRIERS = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)
_SHOWN = 20


def check_names(model: PreTrainedModel, targets: list[str]) -> None:
    """Raises UsageError where a target is the name of no layer: peft would leave it out as long as another is one.

    Args:
        model: the base, before any adapter.
        targets: ends of names, whole parts of them; or `all-linear` alone.
    """
    if targets == [ALL_LINEAR]:
        return
    for target in targets:
        if any(_is_meant(target, name) for name, _ in model.named_modules()):
            continue
        asked = f"--lora-targets {','.join(targets)}: "
        if target.lower() == ALL_LINEAR:
            raise UsageError(f"{asked}{ALL_LINEAR} stands alone. {_there_are(model)}")
        names = _names(model)
        near = difflib.get_close_matches(target, [*names, ALL_LINEAR], n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(f"{asked}the model has no layer named {target}{hint} {_there_are(model)}")


def unfit(model: PreTrainedModel, targets: list[str]) -> str | None:
    """What to say of targets that cannot carry an adapter; None where all can.

    Args:
        model: the base, before any adapter.
        targets: as for `check_names`.
    """
    for target in targets:
        for name, module in model.named_modules():
            if _is_meant(target, name) and not isinstance(module, _CARRIERS):
                kind = type(module).__name__
                return f"{name} is a {kind}, and only linear layers and embeddings can carry an adapter. {_there_are(model)}"
    return None


def _is_meant(target: str, name: str) -> bool:
    """As peft compares a list of targets with the name of a module."""
    return name == target or name.endswith(f".{target}")


def _names(model: PreTrainedModel) -> list[str]:
    """The last parts of the names of all layers that can carry an adapter, in the order of the model."""
    return _once(name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, _CARRIERS))


def _there_are(model: PreTrainedModel) -> str:
    names = _names(model)
    return f"There are {', '.join(names[:_SHOWN])}{', …' if len(names) > _SHOWN else ''}, or {ALL_LINEAR}."


def _once(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))
