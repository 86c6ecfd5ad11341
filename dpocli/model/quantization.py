"""Linear layers in few bits, through bitsandbytes: for references and bases that would not fit otherwise."""

from importlib.util import find_spec
from typing import Any

import torch
from torch import nn

from dpocli.errors import UsageError


def quantization_config(quantization: str, dtype: torch.dtype) -> Any:
    """What transformers is told to quantize with.

    `nf4` is QLoRA's 4-bit NormalFloat with double quantization (Dettmers et al. 2023); `int8` is LLM.int8() without its
    outlier columns: those are found in all rows of a pass at once, so that the value of a token would depend on what is
    scored beside it (measured: up to 0.8 nats), and no cache could hold it.

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
    """One arithmetic for a frozen model and for one with an adapter in training.

    In evaluation mode alone, bitsandbytes would compute 4-bit layers by a bfloat16 kernel on CPUs that have one, whatever
    the dtype of the forward pass.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]
