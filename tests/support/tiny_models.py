"""Tiny models of the architectures that people align, made in code: no hub, no download."""

from collections.abc import Callable, Iterable, Mapping

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTJConfig,
    GPTJForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
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
WINDOW = 12
"""Tokens that layers with a window see."""
EAGER = "eager"
"""For Gemma 2: earlier versions of transformers default to SDPA, which ignores the cap on the attention scores."""


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
    config = Gemma2Config(**SHAPE, head_dim=8, final_logit_softcapping=5.0, sliding_window=128)
    config._attn_implementation = EAGER
    return Gemma2ForCausalLM(config)


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


def mistral() -> PreTrainedModel:
    return MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=WINDOW))


def gemma2_traps() -> PreTrainedModel:
    """A window in every other layer, and a cap on the attention scores."""
    config = Gemma2Config(
        **SHAPE, head_dim=8, query_pre_attn_scalar=8, attn_logit_softcapping=2.0, final_logit_softcapping=5.0,
        sliding_window=WINDOW,
    )  # fmt: skip
    config._attn_implementation = EAGER
    return Gemma2ForCausalLM(config)


def gemma3() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"]
    config = Gemma3TextConfig(
        **SHAPE, head_dim=8, query_pre_attn_scalar=8, sliding_window=WINDOW, layer_types=layers
    )  # fmt: skip
    return Gemma3ForCausalLM(config)


def gpt_oss() -> PreTrainedModel:
    """Sinks, and a window in every other layer."""
    return GptOssForCausalLM(
        GptOssConfig(**SHAPE, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW)
    )


def qwen2() -> PreTrainedModel:
    """A window in its second layer."""
    return Qwen2ForCausalLM(Qwen2Config(**SHAPE, use_sliding_window=True, max_window_layers=1, sliding_window=WINDOW))


def falcon_h1() -> PreTrainedModel:
    """Attention and a recurrence side by side in every layer."""
    return FalconH1ForCausalLM(
        FalconH1Config(
            **SHAPE, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1, mamba_d_state=8,
            mamba_chunk_size=16,
        )
    )  # fmt: skip


def mamba() -> PreTrainedModel:
    shape = {name: SHAPE[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers")}
    special = {name: SHAPE[name] for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return MambaForCausalLM(MambaConfig(**shape, **special, state_size=4))


def length_dependent(rope_type: str) -> PreTrainedModel:
    """A row of more than 16 tokens changes the rotary frequencies of its whole batch."""
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

TRAPS: Mapping[str, Callable[[], PreTrainedModel]] = {
    "mistral-window": mistral,
    "gemma2-window-softcap": gemma2_traps,
    "gemma3-window": gemma3,
    "gpt-oss-sinks": gpt_oss,
    "qwen2-window": qwen2,
    "phi3": lambda: Phi3ForCausalLM(Phi3Config(**SHAPE)),
    "olmo2": lambda: Olmo2ForCausalLM(Olmo2Config(**SHAPE)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SHAPE)),
}
"""Rows of several pairs are easily wrong for the first five; the others are in wide use."""
RECURRENT: Mapping[str, Callable[[], PreTrainedModel]] = {"mamba": mamba, "falcon-h1-hybrid": falcon_h1}
"""Earlier tokens of a row always influence later ones."""


FAST = {
    "llama-tied", "qwen3-moe", "cohere-scaled", "gpt2", "gptj-biased", "mistral-window", "gemma2-window-softcap", "gpt-oss-sinks",
}  # fmt: skip
"""One family for each peculiarity: the others are tested by `make test-all`."""


def families(names: Iterable[str]) -> list[object]:
    """Parameters of a test over architectures, of which those outside `FAST` are marked slow."""
    return [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in names]


def build(name: str, seed: int = 0) -> PreTrainedModel:
    """A random model of the family, its weights large enough that log-probs are far from uniform."""
    torch.manual_seed(seed)
    model = {**FAMILIES, **TRAPS, **RECURRENT}[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
            elif parameter.shape == (VOCABULARY,) or parameter_name.endswith("sinks"):
                parameter.normal_(0, 0.5)
    return model.eval()
