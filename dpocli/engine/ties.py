"""Weights that several layers share (input and output embeddings, as a rule), and adapters that lie on one of them."""

import copy
from collections import Counter
from collections.abc import Iterator

import torch
from torch import nn
from transformers import PreTrainedModel


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
