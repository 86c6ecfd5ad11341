"""A scorer spread over processes with torch's `fully_shard`, and its weights read piece by piece where they are needed.

The scoring module is the root and the decoder layers are its only units: the head's weight is then read inside the root's
forward, where it is a plain tensor. (The head in a group of its own gives silently wrong gradients.)
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from dpocli.config.options import ModelOptions
from dpocli.errors import UsageError
from dpocli.model.hashing import weights_files
from dpocli.model.identity import ModelFiles
from dpocli.model.load import compute_exactly, load_model


def load_spread(files: ModelFiles, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model to be given to `shard`: blank where `fill` can read its weights, else whole in the memory of the host.

    Some architectures are saved under other names than they have in memory (mixtures of experts, for one), and adapters
    change the base's layers.

    Raises:
        UsageError: the model cannot be loaded.
    """
    check_spreadable(files)
    blank = None if files.adapter_settings else blank_model(files, dtype)
    if blank is None:
        return load_model(files, options, dtype, torch.device("cpu"))
    compute_exactly(blank, device)
    return blank


def check_spreadable(files: ModelFiles) -> None:
    """Raises UsageError for quantized models."""
    if files.quantization:
        raise UsageError(
            f"--quantization {files.quantization}: quantized weights cannot be spread over processes. Leave out --shards and "
            "--cpu-offload; each process then has the quantized model."
        )


def blank_model(files: ModelFiles, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model without its weights, which are on the meta device in `dtype`; its buffers are real.

    None where the weights do not stand in the files by the names and shapes that they have in memory.
    """
    try:
        config = AutoConfig.from_pretrained(files.directory, trust_remote_code=files.runs_code)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=files.runs_code)
        stored = _stored_shapes(files)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError):
        return None  # loading it whole finds the same, and words for it
    model.tie_weights()
    wanted = {name: tuple(tensor.shape) for name, tensor in _saved_tensors(model).items()}
    return model.eval() if wanted.items() <= stored.items() else None


def fill(
    root: nn.Module, model: PreTrainedModel, files: ModelFiles, device: torch.device, *, offload: bool = False
) -> None:
    """Gives a sharded `blank_model` its weights. Each process reads its own pieces of the files and no more."""
    where = torch.device("cpu") if offload else device

    def material(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor

    root._apply(material)  # type: ignore[no-untyped-call]  # `to_empty` would empty the buffers too
    model.tie_weights()
    with torch.no_grad():
        load(dict(_saved_tensors(model)), storage_reader=HuggingFaceStorageReader(str(files.directory)))


def _saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """What a saved model holds, each tensor once."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def _stored_shapes(files: ModelFiles) -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for name in weights_files(files.directory):
        with safe_open(files.directory / name, "pt") as file:
            shapes |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return shapes


@contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Parameters made in the block have no memory. Buffers have: they are small, and not all of them are in the files."""
    plain = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        plain(module, name, parameter)
        if parameter is not None:
            kind, kept = type(parameter), parameter.requires_grad
            module._parameters[name] = kind(parameter.to("meta"), requires_grad=kept)

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = plain  # type: ignore[method-assign]
