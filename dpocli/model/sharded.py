"""Load a model for `fully_shard`: made without weights, and filled from the files after sharding."""

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
    """The model to give to `shard`: blank where `fill` can read its weights, else loaded whole on the host.

    Whole are adapters, which change the base's layers, and architectures saved under other names than they have in memory,
    such as mixtures of experts.

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
    """Raise UsageError for quantized models."""
    if files.quantization:
        raise UsageError(
            f"--quantization {files.quantization}: quantized weights cannot be spread over processes. Leave out --shards and "
            "--cpu-offload; each process then has the quantized model."
        )


def blank_model(files: ModelFiles, dtype: torch.dtype) -> PreTrainedModel | None:
    """The model with parameters on the meta device in `dtype`, and with real buffers.

    None where the files do not have the weights by the names and shapes that they have in memory.
    """
    try:
        config = AutoConfig.from_pretrained(files.directory, trust_remote_code=files.runs_code)
        with _parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=files.runs_code)
        stored = _stored_shapes(files)
    except (OSError, ValueError, KeyError, RuntimeError, TypeError, SafetensorError):
        return None  # loading it whole meets the same error, and reports it
    model.tie_weights()
    wanted = {name: tuple(tensor.shape) for name, tensor in _saved_tensors(model).items()}
    return model.eval() if wanted.items() <= stored.items() else None


def fill(
    root: nn.Module, model: PreTrainedModel, files: ModelFiles, device: torch.device, *, offload: bool = False
) -> None:
    """Read the weights of a sharded `blank_model`. Each process reads only its own shards from the files."""
    where = torch.device("cpu") if offload else device

    def material(tensor: Tensor) -> Tensor:
        return torch.empty_like(tensor, device=where) if tensor.is_meta else tensor

    root._apply(material)  # type: ignore[no-untyped-call]  # `to_empty` would empty the buffers too
    model.tie_weights()
    with torch.no_grad():
        load(dict(_saved_tensors(model)), storage_reader=HuggingFaceStorageReader(str(files.directory)))


def _saved_tensors(model: PreTrainedModel) -> dict[str, Tensor]:
    """The tensors of a saved model, each once."""
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
    """Make parameters in the block without memory. Buffers keep theirs: they are small, and some are not in the files."""
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
