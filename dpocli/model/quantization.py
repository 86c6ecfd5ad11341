"""Quantization of linear layers through bitsandbytes, for references and bases that would not fit otherwise."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dpocli.errors import UsageError


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """The quantization settings for transformers.

    `nf4` is QLoRA's 4-bit NormalFloat with double quantization (Dettmers et al. 2023); `int8` is LLM.int8() without its
    outlier columns: they are found over all rows of a pass, so a token's value would depend on what is scored with it
    (measured: up to 0.8 nats), and no cache could hold it.

    Raises:
        UsageError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if find_spec("bitsandbytes") is None:
        raise UsageError(
            f"--quantization {quantization}: it needs bitsandbytes. Install it: pip install 'dpocli[quantization]'."
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def without_inference_kernels(model: nn.Module) -> None:
    """Use the same arithmetic in evaluation as in training.

    In evaluation mode, bitsandbytes computes 4-bit layers by a bfloat16 kernel on CPUs that have one, in any dtype.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
