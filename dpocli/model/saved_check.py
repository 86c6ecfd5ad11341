"""Check of a saved model: plain transformers loads what was saved, before the run is called done."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from dpocli.errors import NumericsError, brief_message, is_out_of_memory
from dpocli.model.hashing import weights_files

LOADED_BYTES = 20e9
"""Larger models are checked by the headers of their files, since a second copy may not fit into host memory."""


def check_saved(
    directory: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype, consequence: str, *, runs_code: bool
) -> None:
    """Raise NumericsError if a saved model does not load with the values that it was saved with.

    Args:
        directory: of the saved model.
        tensors: weights and buffers by their names in memory, as saved.
        dtype: of the weights.
        consequence: last sentence of the error: what is left, and where.
        runs_code: whether the model comes with code of its own.
    """
    found = AutoConfig.from_pretrained(directory, trust_remote_code=runs_code).dtype
    if found != dtype:
        raise NumericsError(f"The saved model has weights in {dtype}, and its config.json says {found}. {consequence}")
    if sum(tensor.nbytes for tensor in tensors.values()) > LOADED_BYTES:
        _check_headers(directory, dtype, consequence)
        return
    try:
        model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto", trust_remote_code=runs_code)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise NumericsError(f"The saved model cannot be loaded: {brief_message(error)}. {consequence}") from error
    loaded = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    differing = [
        name
        for name, tensor in tensors.items()
        if name not in loaded or not torch.equal(loaded[name].detach().to(tensor.dtype), tensor)
    ]
    if differing:
        raise NumericsError(
            f"{len(differing)} tensors of the saved model have other values once it is loaded ({differing[0]}, …). {consequence}"
        )


def _check_headers(directory: Path, dtype: torch.dtype, consequence: str) -> None:
    names = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
    kinds: set[str] = set()
    for name in weights_files(directory):
        with safe_open(directory / name, "pt") as file:
            kinds |= {file.get_slice(key).get_dtype() for key in file.keys()}  # noqa: SIM118
    if names[dtype] not in kinds:
        raise NumericsError(
            f"The saved model's files hold {', '.join(sorted(kinds))} instead of {dtype}. {consequence}"
        )
