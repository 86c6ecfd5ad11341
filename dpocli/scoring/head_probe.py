"""Find the map between a model's output embeddings and its logits by measuring it, not by the model's name.

Cohere scales the logits, Granite divides them, Gemma caps them by tanh; ignoring that would shift log-probs by whole nats.
The probe replaces the head's output with known values and reads the logits that the model makes of them.
"""

from enum import Enum

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpocli.errors import UsageError, brief_message, is_out_of_memory
from dpocli.scoring.head import LogitMap


class HeadKind(Enum):
    """How log-probs are computed if no `LogitMap` describes the model."""

    OWN = "the model's own head"


def probe_head(model: PreTrainedModel) -> LogitMap | HeadKind:
    """Find the map from `get_output_embeddings()(hidden)` to the model's logits; `OWN` if none of the known ones fits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return HeadKind.OWN
    measured = _measure(model, head)
    if measured is None:
        return HeadKind.OWN
    raw, logits = measured
    tolerance = 1e-5 if raw.dtype == torch.float32 else 2e-2
    for candidate in _candidates(model):
        if torch.allclose(candidate(raw.float()), logits.float(), rtol=tolerance, atol=tolerance):
            return candidate
    return HeadKind.OWN


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """The model without its head. Some architectures return themselves as their decoder."""
    head = model.get_output_embeddings()
    decoder: nn.Module = model.get_decoder()
    if decoder is not model:
        return decoder
    parts: list[nn.Module] = [part for part in model.children() if part is not head]
    return max(parts, key=lambda part: sum(parameter.numel() for parameter in part.parameters()), default=model)


def _candidates(model: PreTrainedModel) -> list[LogitMap]:
    config = model.config.get_text_config()

    def number(name: str) -> float | None:
        value = getattr(config, name, None)
        return float(value) if isinstance(value, int | float) and value else None

    scales = [1.0]
    scales += [factor for name in ("logit_scale", "lm_head_multiplier") if (factor := number(name)) is not None]
    if (divisor := number("logits_scaling")) is not None:
        scales += [1 / divisor, divisor]
    caps = [None, *(number(name) for name in ("final_logit_softcapping", "logits_soft_cap"))]
    return [LogitMap(scale, cap) for cap in dict.fromkeys(caps) for scale in dict.fromkeys(scales)]


def _measure(model: PreTrainedModel, head: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """Known head outputs and the model's logits for them, shape (vocabulary,).

    None if the head's input is not the decoder's output.
    """
    seen: dict[str, Tensor] = {}
    # Wide enough that a cap and a scale show, whatever the model's logits would be.
    known = torch.linspace(-60, 60, head.out_features, device=head.weight.device).to(head.weight.dtype)

    def replace(_module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        seen["input"] = inputs[0].detach()
        return known.expand_as(output).clone()

    input_ids = torch.zeros(1, 2, dtype=torch.long, device=head.weight.device)
    training = model.training
    model.eval()
    hook = head.register_forward_hook(replace)
    try:
        with torch.no_grad():
            logits = model(input_ids=input_ids, use_cache=False).logits
            hidden = getattr(decoder_of(model)(input_ids=input_ids, use_cache=False), "last_hidden_state", None)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"--model: the forward pass of {model.config.model_type} fails in transformers, in {model.dtype} "
            f"({brief_message(error)}). Try another --dtype or another version of transformers."
        ) from error
    finally:
        hook.remove()
        model.train(training)
    if hidden is None or "input" not in seen or seen["input"].shape != hidden.shape:
        return None
    if not torch.allclose(seen["input"].float(), hidden.float(), rtol=1e-3, atol=1e-3):
        return None
    return known, logits[0, -1]
