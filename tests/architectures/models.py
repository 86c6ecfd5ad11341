"""Tiny random models of the architectures in `configurations`, with log-probs far from uniform."""

import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

from tests.architectures.configurations import ARCHITECTURES, BASE

SAMPLE_MODEL = Path(__file__).parents[2] / "sample_data" / "tiny-model"
WITHOUT_HEAD_DIM = ("mamba2", "mamba", "falcon_mamba", "falcon", "gemma4_text")
OWN_NAMES = (
    "bloom",
    "mpt",
    "gpt2",
    "gptj",
    "codegen",
    "dbrx",
    "jetmoe",
    "xlstm",
    "rwkv",
    "opt",
    "biogpt",
    "xglm",
    "gpt_neo",
)
"""Model types whose configurations name heads and feed-forward sizes in their own way."""
OWN_SIZES = ("gpt2", "gptj", "codegen", "bloom", "mpt", "dbrx", "xglm", "gpt_neo")
"""Model types whose configurations name layers and heads in their own way."""


def build(name: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model of that name, the same weights each time.

    Raises:
        KeyError: this version of transformers has no such model type.
    """
    model_type, settings = ARCHITECTURES[name]
    model = AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**_settings(model_type, settings)), dtype=torch.float32
    )
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim >= 2 and "A_log" not in key and "norm" not in key:
                scale = 0.5 if "embed" in key or "wte" in key else 0.12
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif parameter.ndim == 1 and "A_log" not in key and "dt_bias" not in key and not key.endswith(".D"):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model.to(dtype).eval()


def save(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> None:
    """Save the model beside the tokenizer of the sample data."""
    torch.manual_seed(0)
    build(name, dtype).save_pretrained(directory)
    for file in SAMPLE_MODEL.iterdir():
        if file.name.startswith("tokenizer") or file.name == "chat_template.jinja":
            shutil.copy(file, directory)


def _settings(model_type: str, own: dict[str, Any]) -> dict[str, Any]:
    left_out: set[str] = set()
    if "qk_rope_head_dim" in own or model_type in WITHOUT_HEAD_DIM:
        left_out |= {"head_dim"}
    if model_type in OWN_NAMES:
        left_out |= {"head_dim", "num_key_value_heads", "intermediate_size"}
    if model_type in OWN_SIZES:
        left_out |= {"num_hidden_layers", "num_attention_heads", "max_position_embeddings"}
        if model_type not in ("bloom", "gpt_neo"):
            left_out |= {"hidden_size"}
    settings = {key: value for key, value in BASE.items() if key not in left_out} | own
    return settings | ({"max_position_embeddings": 1024} if model_type == "gpt_neo" else {})
