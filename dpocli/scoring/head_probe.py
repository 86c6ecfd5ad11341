"""Finds out what a model does between its last hidden state and its logits, by asking it rather than its name.

Cohere multiplies the logits, Granite divides them, Gemma caps them by tanh; scoring them as if they stood plain is
silently wrong by whole nats. The probe feeds the model known values through its own head and looks at what comes out.
"""

from enum import Enum

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpocli.scoring.head import LogitMap


class HeadKind(Enum):
    """How log-probs are made where no `LogitMap` explains the model."""

    OWN = "the model's own head"


def probe_head(model: PreTrainedModel) -> LogitMap | HeadKind:
    """The map that turns `get_output_embeddings()(hidden)` into the model's logits, or `OWN` where none is known."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return HeadKind.OWN
    observed = _observe(model, head)
    if observed is None:
        return HeadKind.OWN
    before, after = observed
    tolerance = 1e-5 if before.dtype == torch.float32 else 2e-2
    for candidate in _candidates(model):
        if torch.allclose(candidate(before.float()), after.float(), rtol=tolerance, atol=tolerance):
            return candidate
    return HeadKind.OWN


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


def _observe(model: PreTrainedModel, head: nn.Linear) -> tuple[Tensor, Tensor] | None:
    """Known values put in place of the head's output, and the logits that the model makes of them.

    None where the head does not read the decoder's output as it stands.
    """
    seen: dict[str, Tensor] = {}
    # Wide enough that a cap bends them and a scale moves them, whatever the model's own logits would be.
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
            hidden = model.get_decoder()(input_ids=input_ids, use_cache=False).last_hidden_state
    finally:
        hook.remove()
        model.train(training)
    if not torch.allclose(seen["input"].float(), hidden.float(), rtol=1e-3, atol=1e-3):
        return None
    return known, logits[0, -1]
