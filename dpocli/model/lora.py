"""LoRA adapters through peft: put on a base model, told apart from what is not one, written and merged."""

import copy
import difflib
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dpocli.config.training_options import LoraOptions
from dpocli.errors import UsageError, brief_message
from dpocli.model.identity import ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from peft import PeftModel


def put_on(model: PreTrainedModel, directory: Path, *, trainable: bool = False) -> "PeftModel":
    """The adapter of a directory on top of `model`, whose layers it changes in place.

    Args:
        model: the base.
        directory: that peft wrote.
        trainable: its weights are float32 and can be trained; else they are in the base's dtype and frozen.

    Raises:
        UsageError: it is the adapter of another model, damaged, or peft is not installed.
    """
    peft = import_peft(f"--adapter {directory}")
    try:
        with quietly():
            wrapped: PeftModel = peft.PeftModel.from_pretrained(
                model, directory, is_trainable=trainable, autocast_adapter_dtype=trainable
            )
        with safe_open(directory / ADAPTER_WEIGHTS, "pt") as file:
            found = set(file.keys())
    except SafetensorError as error:
        raise UsageError(
            f"--adapter {directory}: its weights cannot be read ({brief_message(error)}): the file is damaged or was copied in "
            "part. Copy the adapter again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        sizes = next(
            (line.strip(" \t.") for line in str(error).splitlines() if "size mismatch" in line), brief_message(error)
        )
        raise UsageError(f"--adapter {directory}: it does not fit the model: {sizes}.") from error
    wanted = set(peft.get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    strays = [name for name in found - wanted if "lora_" in name]
    if odd := sorted(wanted - found) or sorted(strays):
        what = "are not in its file" if wanted - found else "have no place in the model"
        raise UsageError(
            f"--adapter {directory}: {len(odd)} weights {what} ({odd[0]}, …). Is it the adapter of another model?"
        )
    return wrapped


def blank(model: PreTrainedModel, settings: Path) -> None:
    """An adapter on top of `model`, whose layers it changes in place; its weights are still to be read.

    Args:
        model: the base.
        settings: directory of `adapter_config.json`.
    """
    peft = import_peft(f"--model {settings}")
    with quietly():
        config = peft.LoraConfig.from_pretrained(settings)
        config.inference_mode = True
        peft.PeftModel(model, config, autocast_adapter_dtype=False)


def new(model: PreTrainedModel, options: LoraOptions, seed: int) -> "PeftModel":
    """A new adapter on top of `model`, which changes no value yet: the second of its two matrices is zero.

    LoRA (Hu et al. 2021); rsLoRA, whose scale is alpha/√rank (Kalajdzievski 2023); DoRA, which learns magnitude and
    direction apart (Liu et al. 2024). Initialisations that change the base (PiSSA, OLoRA, LoftQ) are not offered: the
    cached reference would be another model than the one that training starts from.

    Args:
        model: the base, frozen.
        options: rank, alpha, targets, dropout, variant.
        seed: draws the first matrices.

    Raises:
        UsageError: a target is the name of no layer, or of one that cannot carry an adapter; the model could not hold the
            merged weights that are asked for; or peft is not installed.
    """
    peft = import_peft("--lora-rank")
    assert options.rank
    targets = options.targets
    config = peft.LoraConfig(
        r=options.rank,
        lora_alpha=options.alpha or 2 * options.rank,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        lora_dropout=options.dropout,
        use_rslora=options.variant == "rslora",
        use_dora=options.variant == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )
    check_names(model, targets)
    problem = unfit(model, targets)
    torch.manual_seed(seed)
    try:
        with quietly():
            wrapped: PeftModel = peft.PeftModel(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        what = problem or f"{brief_message(error)}."
        raise UsageError(f"--lora-targets {','.join(targets)}: {what}") from error
    if options.merge and not can_be_merged(model):
        raise UsageError(
            f"--merge: {','.join(targets)} names an embedding, and in this architecture input and output embeddings are always one "
            "weight, which cannot hold what the adapter changes on one side. Leave out --merge, or that target."
        )
    return wrapped


@contextmanager
def quietly() -> Iterator[None]:
    """Without the warnings of libraries: what they warn of, we look for ourselves, or it is between them."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_peft(asked: str) -> Any:
    """The peft library, or a UsageError that says how to get it."""
    try:
        import peft
    except ImportError:
        raise UsageError(f"{asked}: adapters need peft. Install it: pip install 'dpocli[lora]'.") from None
    return peft


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


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one weight."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(end, "weight", None) for end in ends)
    return first is not None and first is last


def shared_under_adapters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Layers under an adapter whose weight belongs to other layers too: layer, name of the weight, weight."""
    layers = list(model.modules())
    owners = Counter(id(weight) for layer in layers for weight in layer._parameters.values() if weight is not None)
    for layer in layers:
        base = getattr(layer, "base_layer", None)  # as peft calls what it has wrapped
        if isinstance(base, nn.Module):
            for name, weight in list(base._parameters.items()):
                if weight is not None and owners[id(weight)] > 1:
                    yield base, name, weight


def say_untied(model: PreTrainedModel) -> None:
    """Writes into the configuration that input and output embeddings are two weights."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def can_be_merged(model: PreTrainedModel) -> bool:
    """Whether the architecture has room for the weights of the base with its adapter added.

    Where the adapter lies on one of several layers that share a weight, each needs one of its own afterwards.

    Args:
        model: with its adapter.
    """
    if not has_tied_embeddings(model) or not any(True for _ in shared_under_adapters(model)):
        return True
    try:
        with torch.device("meta"):
            apart = type(model)._from_config(copy.deepcopy(model.config))
            say_untied(apart)
            other = type(model)._from_config(apart.config)
            other.tie_weights()
    except Exception:  # code of any model: what this cannot tell, the check after merging can
        return True
    return not has_tied_embeddings(other)
