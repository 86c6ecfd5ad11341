"""Add an adapter to the weights of its base, and check that the result computes the same."""

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpocli.config.options import ModelOptions
from dpocli.errors import NumericsError
from dpocli.model.identity import ModelFiles
from dpocli.model.load import load_base
from dpocli.model.lora import has_tied_embeddings, put_on, quietly, say_untied, shared_under_adapters

_ROUNDING = 1e-4
"""Nats per token by which two ways through float32 may differ, as in the step-0 check."""

_SHARE = 0.05
"""Tolerated share of the adapter's effect. A wrong merge is off by about the whole effect."""


def merged_model(files: ModelFiles, adapter: Path, options: ModelOptions) -> PreTrainedModel:
    """The base with the adapter added to its weights, in float32 on the CPU.

    Where the adapter's layer shares its weight with another one, they are untied: the other layer must not change.

    Args:
        files: of the base.
        adapter: directory of the adapter.
        options: how models are loaded.

    Raises:
        NumericsError: the result computes other log-probs than base and adapter.
    """
    model = load_base(files, options, torch.float32, torch.device("cpu"))
    alone = _logps(model)
    wrapped = put_on(model, adapter).eval()
    adapted = _logps(model)
    for layer, name, weight in list(shared_under_adapters(model)):
        setattr(layer, name, nn.Parameter(weight.detach().clone(), requires_grad=False))
    with quietly():
        merged: PreTrainedModel = wrapped.merge_and_unload()
    if not has_tied_embeddings(merged):
        say_untied(merged)
    _check_merged(alone, adapted, _logps(merged), adapter)
    return merged


def _check_merged(alone: Tensor | None, adapted: Tensor | None, merged: Tensor | None, adapter: Path) -> None:
    """Raise NumericsError where the merged model's log-probs differ from the base's with the adapter."""
    if alone is None or adapted is None or merged is None:
        return
    effect, difference = _distance(adapted, alone), _distance(adapted, merged)
    if not difference <= _ROUNDING + _SHARE * effect:
        raise NumericsError(
            f"--merge: the log-probs of the merged model are {difference:.2g} nats off the log-probs of the model with its adapter, and the "
            f"adapter changes them by {effect:.2g}. {_use(adapter)}"
        )


def _logps(model: PreTrainedModel) -> Tensor | None:
    """Log-probs after each of a few tokens, shape (tokens, vocabulary); None where the model cannot run here."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = torch.arange(0, vocabulary, max(1, vocabulary // 24))[:24]
    try:
        with torch.no_grad():
            logits: Tensor = model(input_ids=tokens[None], use_cache=False).logits
    except Exception:  # remote code may fail, or need CUDA
        return None
    return logits[0].float().log_softmax(-1)


def _distance(one: Tensor, other: Tensor) -> float:
    """Nats at the median token: rounding may route a token to another expert, which is then far off."""
    return float((one - other).abs().mean(-1).median())


def _use(adapter: Path) -> str:
    return f"No merged model was left. The adapter, {adapter}, is as trained; all commands take it as --model."
