"""Models, processes, and the training loop."""

import ctypes
import logging
import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpocli.config.options import ModelOptions
from dpocli.errors import UsageError, brief_message, is_out_of_memory
from dpocli.model import lora
from dpocli.model.identity import ModelFiles
from dpocli.model.quantization import quantization_config, without_inference_kernels

# Before any module of this floor can import it: bitsandbytes tells which kernels it has not, and of its casts at every layer.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

# One voice on stderr: the bars and the chatter of the library would stand between our own lines.
transformers_logging.disable_progress_bar()

transformers_logging.set_verbosity_error()


def pick_dtype(given: str | None, device: torch.device, *, recorded: str | None = None) -> torch.dtype:
    """The one dtype of the forward pass: as given, else the cache's, else what the device is good at."""
    if given or recorded:
        dtype = getattr(torch, given or recorded or "")
        assert isinstance(dtype, torch.dtype)
        return dtype
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_model(files: ModelFiles, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode, on `device`, its parameters in `dtype` and its buffers left alone.

    An adapter stays beside the base, so that the arithmetic is the same here as while it is trained. The weights of a
    checkpoint are read where the model has its place, by `frozen_scorer`.

    Raises:
        UsageError: the weights do not fit the configuration, the architecture is unknown, or an adapter or a quantization
            cannot be had.
    """
    model = load_base(files, options, dtype, device)
    if files.checkpoint and (settings := files.adapter_settings):
        lora.blank(model, settings)
    elif files.adapter:
        lora.put_on(model, files.adapter)
    return model.eval()


def load_base(files: ModelFiles, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """What `load_model` gives, without the adapter."""
    settings: dict[str, Any] = {}
    if files.quantization:
        settings["quantization_config"] = quantization_config(files.quantization, dtype)
        settings["device_map"] = {"": device}
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            files.directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=True,  # to say which, below
            output_loading_info=True,
            **settings,
        )
    except SafetensorError as error:
        raise UsageError(
            f"--model {options.name}: its weights cannot be read ({brief_message(error)}): a file is damaged or was copied "
            "in part. Fetch or copy the model again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"--model {options.name}: it cannot be loaded: {brief_message(error)}.") from error
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise UsageError(
            f"--model {options.name}: {len(mismatched)} weights have another shape than its config.json says (the first: "
            f"{name}, {list(found)} instead of {list(wanted)}). Bring config.json and weights of one model together."
        )
    if missing := sorted(report["missing_keys"]):
        raise UsageError(
            f"--model {options.name}: {len(missing)} weights that the model needs are not in its files "
            f"({', '.join(missing[:3])}, …). They would be random. Is it another architecture, or an adapter alone?"
        )
    compute_exactly(model, device)
    model.eval()
    if files.quantization:
        without_inference_kernels(model)
        return model  # which lies where it is already, and some kinds refuse to be told
    return model.to(device)


def compute_exactly(model: PreTrainedModel, device: torch.device) -> None:
    """Sets this process up to compute what the model and `--dtype` say."""
    # TF32 products would round to 10 bits of mantissa, which is not what --dtype float32 says.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # some versions of transformers choose SDPA, which leaves the cap out
    if device.type == "cpu":
        keep_freed_memory()


def without_dropout(model: nn.Module, *, but: str | None = None) -> Callable[[], None]:
    """Sets every dropout, drop path and router jitter of the model to 0: in its modules, and in the configuration that
    some of them read at every call (so whoever saves the model saves the configuration of before).

    Args:
        model: to be changed.
        but: what modules are left alone, by a part of their names.

    Returns:
        What puts them back.
    """
    before: list[tuple[Any, str, float]] = []
    for name_of_module, module in model.named_modules():
        if but and but in name_of_module.split("."):
            continue
        if isinstance(module, nn.Dropout):
            before.append((module, "p", module.p))
            module.p = 0.0
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else []:
                if isinstance(value, float) and any(word in name for word in ("drop", "jitter")):
                    before.append((holder, name, value))
                    setattr(holder, name, 0.0)

    def put_back() -> None:
        for holder, name, value in reversed(before):
            setattr(holder, name, value)

    return put_back


def source_dtype(files: ModelFiles, options: ModelOptions) -> torch.dtype:
    """The dtype in which the model was saved."""
    config = AutoConfig.from_pretrained(files.directory, trust_remote_code=options.trust_remote_code)
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As options and files spell it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Numbers of glibc's malloc.h."""


def keep_freed_memory() -> None:
    """For the rest of this process; does nothing where the C library is not glibc."""
    if not sys.platform.startswith("linux"):
        return
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return
    set_option(_MMAP_MAX, 0)
    set_option(_TRIM_THRESHOLD, 2**31 - 1)
    set_option(_TOP_PAD, 64 * 2**20)
