"""Tiny models of the architectures that people align, made in code: no hub, no download."""

from collections.abc import Callable, Mapping

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

VOCABULARY = 97
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def llama(*, tied: bool = False, vocab_size: int = VOCABULARY) -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**(SHAPE | {"vocab_size": vocab_size}), tie_word_embeddings=tied))


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, head_dim=8))


def qwen3_moe() -> PreTrainedModel:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1
        )
    )


def gemma2() -> PreTrainedModel:
    return Gemma2ForCausalLM(Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0, sliding_window=128))


def cohere() -> PreTrainedModel:
    return CohereForCausalLM(CohereConfig(**SHAPE, logit_scale=0.25))


def granite() -> PreTrainedModel:
    return GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0, embedding_multiplier=3.0))


def gpt2() -> PreTrainedModel:
    config = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=256)
    return GPT2LMHeadModel(config)


def gptj() -> PreTrainedModel:
    """Its head has a bias."""
    return GPTJForCausalLM(GPTJConfig(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, rotary_dim=4))


def length_dependent(rope_type: str) -> PreTrainedModel:
    """Beyond 16 tokens its rotary frequencies are others, for all rows of a batch."""
    rope: dict[str, object] = {"rope_type": rope_type, "rope_theta": 10000.0, "factor": 8.0}
    if rope_type == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [6.0] * 4, "original_max_position_embeddings": 16}
    shape = SHAPE | {"max_position_embeddings": 128 if rope_type == "longrope" else 16}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, rope_parameters=rope))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return model.eval()


FAMILIES: Mapping[str, Callable[[], PreTrainedModel]] = {
    "llama-untied": llama,
    "llama-tied": lambda: llama(tied=True),
    "qwen3": qwen3,
    "qwen3-moe": qwen3_moe,
    "gemma2-capped": gemma2,
    "cohere-scaled": cohere,
    "granite-divided": granite,
    "gpt2": gpt2,
    "gptj-biased": gptj,
}


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A model of the family with weights wide enough that its log-probs are far from uniform."""
    torch.manual_seed(seed)
    model = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif parameter.shape == (VOCABULARY,):
                parameter.normal_(0, 0.5)
    return model.eval()
