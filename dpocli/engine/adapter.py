"""LoRA adapters through peft: put on a base model, told apart from what is not one, written and merged."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from dpocli.artifacts.model_files import ADAPTER_WEIGHTS
from dpocli.config.models import TrainOptions
from dpocli.engine.lora_targets import ALL_LINEAR, check_names, unfit
from dpocli.engine.ties import can_be_merged
from dpocli.errors import UsageError, in_words

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
            f"--adapter {directory}: its weights cannot be read ({in_words(error)}): the file is damaged or was copied in "
            "part. Copy the adapter again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        sizes = next(
            (line.strip(" \t.") for line in str(error).splitlines() if "size mismatch" in line), in_words(error)
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


def new(model: PreTrainedModel, options: TrainOptions) -> "PeftModel":
    """A new adapter on top of `model`, which changes no value yet: the second of its two matrices is zero.

    LoRA (Hu et al. 2021); rsLoRA, whose scale is alpha/√rank (Kalajdzievski 2023); DoRA, which learns magnitude and
    direction apart (Liu et al. 2024). Initialisations that change the base (PiSSA, OLoRA, LoftQ) are not offered: the
    cached reference would be another model than the one that training starts from.

    Args:
        model: the base, frozen.
        options: rank, alpha, targets, dropout, variant; `seed` draws the first matrices.

    Raises:
        UsageError: a target is the name of no layer, or of one that cannot carry an adapter; the model could not hold the
            merged weights that are asked for; or peft is not installed.
    """
    peft = import_peft("--lora-rank")
    assert options.lora_rank
    targets = options.lora_targets
    config = peft.LoraConfig(
        r=options.lora_rank,
        lora_alpha=options.lora_alpha or 2 * options.lora_rank,
        target_modules=ALL_LINEAR if targets == [ALL_LINEAR] else targets,
        lora_dropout=options.lora_dropout,
        use_rslora=options.lora_variant == "rslora",
        use_dora=options.lora_variant == "dora",
        bias="none",
        task_type="CAUSAL_LM",
    )
    check_names(model, targets)
    problem = unfit(model, targets)
    torch.manual_seed(options.seed)
    try:
        with quietly():
            wrapped: PeftModel = peft.PeftModel(model, config, autocast_adapter_dtype=True)
    except ValueError as error:
        what = problem or f"{in_words(error)}."
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
