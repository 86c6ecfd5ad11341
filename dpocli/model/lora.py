"""LoRA adapters through peft: load, make, and check them; weights that an adapter's layer shares with others."""

import copy
import difflib
import warnings
from collections import Counter
from collections.abc import Iterator
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


ALL_LINEAR = "all-linear"

_CARRIERS = (nn.Linear, nn.Embedding, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)

_MAX_LISTED = 20


def put_on(model: PreTrainedModel, directory: Path, *, trainable: bool = False) -> "PeftModel":
    """Load an adapter on top of `model`, whose layers it changes in place.

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
    """Put an adapter without weights on top of `model`, whose layers it changes in place.

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
    """Put a new adapter on top of `model`. It changes no value yet, since the second of its two matrices is zero.

    LoRA (Hu et al. 2021); rsLoRA, whose scale is alpha/√rank (Kalajdzievski 2023); DoRA, which learns magnitude and
    direction apart (Liu et al. 2024). Initialisations that change the base (PiSSA, OLoRA, LoftQ) are not offered: training
    would start from another model than the cached reference.

    Args:
        model: the base, frozen.
        options: rank, alpha, targets, dropout, variant.
        seed: draws the first matrices.

    Raises:
        UsageError: a target names no layer, or one that cannot carry an adapter; --merge is given and the model could not
            hold the merged weights; or peft is not installed.
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
    _check_names(model, targets)
    misfit = _misfit(model, targets)
    torch.manual_seed(seed)
    try:
        with quietly():
            wrapped: PeftModel = peft.PeftModel(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        what = misfit or f"{brief_message(error)}."
        raise UsageError(f"--lora-targets {','.join(targets)}: {what}") from error
    if options.merge and not can_be_merged(model):
        raise UsageError(
            f"--merge: {','.join(targets)} names an embedding, and in this architecture input and output embeddings are always one "
            "weight, which cannot hold what the adapter changes on one side. Leave out --merge, or that target."
        )
    return wrapped


@contextmanager
def quietly() -> Iterator[None]:
    """Silence the warnings of libraries; what matters of them is checked here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_peft(asked: str) -> Any:
    """Import peft, or raise UsageError with how to install it."""
    try:
        import peft
    except ImportError:
        raise UsageError(f"{asked}: adapters need peft. Install it: pip install 'dpocli[lora]'.") from None
    return peft


def _check_names(model: PreTrainedModel, targets: list[str]) -> None:
    """Raise UsageError where a target names no layer: peft ignores it as long as another target is found."""
    if targets == [ALL_LINEAR]:
        return
    for target in targets:
        if any(_is_meant(target, name) for name, _ in model.named_modules()):
            continue
        asked = f"--lora-targets {','.join(targets)}: "
        if target.lower() == ALL_LINEAR:
            raise UsageError(f"{asked}{ALL_LINEAR} must be the only target. {_there_are(model)}")
        near = difflib.get_close_matches(target, [*_names(model), ALL_LINEAR], n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UsageError(f"{asked}the model has no layer named {target}{hint} {_there_are(model)}")


def _misfit(model: PreTrainedModel, targets: list[str]) -> str | None:
    """The message for a target that cannot carry an adapter; None where all can."""
    for target in targets:
        for name, module in model.named_modules():
            if _is_meant(target, name) and not isinstance(module, _CARRIERS):
                kind = type(module).__name__
                return f"{name} is a {kind}, and only linear layers and embeddings can carry an adapter. {_there_are(model)}"
    return None


def _is_meant(target: str, name: str) -> bool:
    """Whether a target names a module, as peft compares them."""
    return name == target or name.endswith(f".{target}")


def _names(model: PreTrainedModel) -> list[str]:
    """Last parts of the names of all layers that can carry an adapter, in the order of the model."""
    layers = (name for name, module in model.named_modules() if isinstance(module, _CARRIERS))
    return list(dict.fromkeys(name.rpartition(".")[2] for name in layers))


def _there_are(model: PreTrainedModel) -> str:
    names = _names(model)
    return f"There are {', '.join(names[:_MAX_LISTED])}{', …' if len(names) > _MAX_LISTED else ''}, or {ALL_LINEAR}."


def has_tied_embeddings(model: PreTrainedModel) -> bool:
    """Whether input and output embeddings are one weight."""
    ends = model.get_input_embeddings(), model.get_output_embeddings()
    first, last = (getattr(end, "weight", None) for end in ends)
    return first is not None and first is last


def shared_under_adapters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    """Layer, name and weight of every layer under an adapter whose weight other layers share."""
    layers = list(model.modules())
    owners = Counter(id(weight) for layer in layers for weight in layer._parameters.values() if weight is not None)
    for layer in layers:
        base = getattr(layer, "base_layer", None)  # as peft calls what it has wrapped
        if isinstance(base, nn.Module):
            for name, weight in list(base._parameters.items()):
                if weight is not None and owners[id(weight)] > 1:
                    yield base, name, weight


def say_untied(model: PreTrainedModel) -> None:
    """Set the configuration to untied input and output embeddings."""
    for config in (model.config, model.config.get_text_config()):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False


def can_be_merged(model: PreTrainedModel) -> bool:
    """Whether the architecture can hold the merged weights of `model`, which has its adapter.

    Layers that shared a weight need separate ones where the adapter is on one of them.
    """
    if not has_tied_embeddings(model) or not any(True for _ in shared_under_adapters(model)):
        return True
    try:
        with torch.device("meta"):
            apart = type(model)._from_config(copy.deepcopy(model.config))
            say_untied(apart)
            other = type(model)._from_config(apart.config)
            other.tie_weights()
    except Exception:  # remote code may fail; the check after merging decides then
        return True
    return not has_tied_embeddings(other)
