"""Load a model in one dtype, set up to compute exactly what its configuration and `--dtype` say."""

import ctypes
import logging
import math
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from dpocli.config.options import ModelOptions
from dpocli.errors import UsageError, brief_message, is_out_of_memory
from dpocli.model import lora
from dpocli.model.hashing import weights_files
from dpocli.model.identity import ModelFiles
from dpocli.model.quantization import quantization_config, without_inference_kernels

# Silence warnings and progress bars of libraries on stderr; bitsandbytes reports missing kernels when it is imported.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
"""Numbers of glibc's malloc.h."""


def pick_dtype(given: str | None, device: torch.device, *, recorded: str | None = None) -> torch.dtype:
    """The dtype of the forward pass: the given one, else the cache's, else bfloat16 where the device has it."""
    if given or recorded:
        dtype = getattr(torch, given or recorded or "")
        assert isinstance(dtype, torch.dtype)
        return dtype
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_model(files: ModelFiles, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model in evaluation mode on `device`: parameters in `dtype`, buffers as they are, an adapter not merged.

    The weights of a checkpoint are read later, by `frozen_scorer`.

    Raises:
        UsageError: the weights do not fit the configuration, the architecture is unknown, or an adapter or a quantization
            cannot be used.
    """
    model = load_base(files, options, dtype, device)
    if files.checkpoint and (settings := files.adapter_settings):
        lora.blank(model, settings)
    elif files.adapter:
        lora.put_on(model, files.adapter)
    return model.eval()


def load_base(files: ModelFiles, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """Load a model as `load_model` does, without the adapter."""
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
            ignore_mismatched_sizes=True,  # reported below by name
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
        return model  # already on its device, and some kinds refuse to be moved
    return model.to(device)


def compute_exactly(model: PreTrainedModel, device: torch.device) -> None:
    """Set this process up to compute what the model and `--dtype` say."""
    # TF32 products would round to 10 bits of mantissa, against --dtype float32.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.set_float32_matmul_precision("highest")
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # some versions of transformers choose SDPA, which leaves the cap out
    if device.type == "cpu":
        keep_freed_memory()


def _stay_in_evaluation(module: nn.Module, _mode: bool = True) -> nn.Module:
    return nn.Module.train(module, False)


def without_dropout(model: nn.Module, *, but: str | None = None) -> Callable[[], None]:
    """Set every dropout and drop path of the model to 0, and keep modules with router jitter in evaluation mode.

    Some modules read the configuration at every call, so a saved model needs the configuration from before. Router jitter
    is no rate: PhiMoE also uses it as a threshold in evaluation.

    Args:
        model: to be changed.
        but: a part of the names of modules to leave as they are.

    Returns:
        A function that restores them.
    """
    before: list[tuple[Any, str, float]] = []
    fixed: list[nn.Module] = []
    for path, module in model.named_modules():
        if but and but in path.split("."):
            continue
        if any("jitter" in name for name in vars(module)) and "train" not in vars(module):
            module.train = partial(_stay_in_evaluation, module)
            module.eval()
            fixed.append(module)
        for holder in (module, getattr(module, "config", None)):
            for name, value in list(vars(holder).items()) if holder is not None else []:
                is_rate = "drop" in name or (name == "p" and isinstance(holder, nn.Dropout))
                if isinstance(value, float) and is_rate:
                    before.append((holder, name, value))
                    setattr(holder, name, 0.0)

    def put_back() -> None:
        for holder, name, value in reversed(before):
            setattr(holder, name, value)
        for module in fixed:
            del module.__dict__["train"]

    return put_back


_SAFETENSORS_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def source_dtype(files: ModelFiles, options: ModelOptions) -> torch.dtype:
    """The dtype in which the model was saved."""
    config = AutoConfig.from_pretrained(files.directory, trust_remote_code=options.trust_remote_code)
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else _most_common_dtype(files)


def _most_common_dtype(files: ModelFiles) -> torch.dtype:
    """The floating dtype of most weights, for configurations that name none."""
    sizes: Counter[torch.dtype] = Counter()
    for name in weights_files(files.directory):
        with safe_open(files.directory / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_slice(key)
                dtype = _SAFETENSORS_DTYPES.get(tensor.get_dtype())
                if dtype is not None:
                    sizes[dtype] += math.prod(tensor.get_shape())
    return sizes.most_common(1)[0][0] if sizes else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """As options and files spell it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for this process, which saves page faults in every pass. Elsewhere do nothing."""
    set_option = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform.startswith("linux") else None
    if set_option is not None:
        set_option(_MMAP_MAX, 0)
        set_option(_TRIM_THRESHOLD, 2**31 - 1)
        set_option(_TOP_PAD, 64 * 2**20)
