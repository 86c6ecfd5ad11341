"""Save a trained model or adapter as a directory that `from_pretrained` loads, with its provenance."""

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dpocli.config.loss_expression import LossChoice
from dpocli.config.options import ModelOptions
from dpocli.errors import ResourceError, brief_message
from dpocli.model.identity import ModelFiles
from dpocli.model.load import dtype_name, source_dtype
from dpocli.model.lora import quietly
from dpocli.model.merge import merged_model
from dpocli.model.saved_check import check_saved
from dpocli.run.files import sync_directory, sync_file, translating_file_errors

if TYPE_CHECKING:
    from peft import PeftModel


class Provenance(BaseModel):
    """`dpocli.json` of a trained model: how it was trained, and the defaults of `evaluate`."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    loss: LossChoice | None = None
    loss_states: dict[str, dict[str, float]] = {}
    """States of losses that have one, at the end of the training."""
    trained_from: str | None = None
    quantization: str | None = None
    """Quantization of the base that an adapter was trained on."""
    reference_digest: str | None = None
    """Digest of the reference of the training; None without one."""
    step: int | None = None
    """The training step after which it was saved."""
    run: str | None = None
    """Digest of the training's settings and pairs, the same for all its checkpoints."""

    @classmethod
    def of(cls, model_directory: Path) -> "Provenance":
        """The provenance of a model; empty where dpocli did not train it, or the file cannot be read."""
        try:
            return cls.model_validate_json((model_directory / "dpocli.json").read_bytes())
        except (OSError, ValueError):
            return cls()

    def write(self, model_directory: Path) -> None:
        """Write `dpocli.json`."""
        (model_directory / "dpocli.json").write_text(self.model_dump_json(indent=2) + "\n")


def save_model(
    directory: Path,
    model: PreTrainedModel,
    config: PretrainedConfig,
    weights: Mapping[str, Tensor],
    buffers: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    provenance: Provenance,
    *,
    runs_code: bool = False,
) -> None:
    """Write a model directory: weights in `dtype`, configuration, tokenizer with template, and `dpocli.json`.

    Args:
        directory: to write, whole or not at all.
        model: gives the names; its own parameters are not read.
        config: to be saved with it.
        weights: name → full tensor.
        buffers: name → tensor, saved in the dtype that they have.
        tokenizer: saved beside.
        dtype: of the saved weights.
        provenance: of the model.
        runs_code: whether the model comes with code of its own.

    Raises:
        NumericsError: the saved model does not load with these weights; nothing is left then.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items()} | {
        name: buffer.detach().cpu().clone() for name, buffer in buffers.items()
    }
    model.config = config
    model.config.dtype = dtype
    with _replacing(directory) as temporary:
        model.save_pretrained(temporary, state_dict=tensors)
        _write_dtype(temporary, dtype)
        check_saved(
            temporary,
            tensors,
            dtype,
            "The trained model was not saved. The last checkpoint of the run holds it.",
            runs_code=runs_code,
        )
        tokenizer.save_pretrained(temporary)
        provenance.write(temporary)


def _write_dtype(directory: Path, dtype: torch.dtype) -> None:
    """Make `config.json` name the dtype of the saved weights: transformers writes that of the live model."""
    path = directory / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if "dtype" in part or part is config:
            part["dtype"] = dtype_name(dtype)
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_adapter(
    directory: Path,
    adapter: "PeftModel",
    files: ModelFiles,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    provenance: Provenance,
) -> None:
    """Write a directory that peft loads: weights in `dtype`, configuration, tokenizer, and `dpocli.json`.

    Args:
        directory: to write, whole or not at all.
        adapter: gives the names and the configuration.
        files: of the base.
        weights: name in the base model → full tensor, of the adapter alone.
        tokenizer: saved beside.
        dtype: of the saved weights.
        provenance: of the adapter.
    """
    tensors = {f"base_model.model.{name}": tensor.to(dtype) for name, tensor in weights.items()}
    for config in adapter.peft_config.values():
        config.base_model_name_or_path = str(files.directory.resolve())
    with _replacing(directory) as temporary:
        with quietly():
            adapter.save_pretrained(temporary, state_dict=tensors, save_embedding_layers=False)
        (temporary / "README.md").unlink(missing_ok=True)  # peft's empty template
        tokenizer.save_pretrained(temporary)
        provenance.write(temporary)


def merge(
    directory: Path,
    files: ModelFiles,
    adapter_directory: Path,
    options: ModelOptions,
    tokenizer: PreTrainedTokenizerBase,
    provenance: Provenance,
) -> None:
    """Write the base with the adapter added to its weights, in the base's dtype.

    A base that was quantized for the training is merged unquantized, as is the custom: the merged model differs from the
    trained one by the error of the quantization.

    Args:
        directory: to write, whole or not at all.
        files: of the base.
        adapter_directory: of the trained adapter.
        options: how models are loaded.
        tokenizer: saved beside.
        provenance: of the adapter.

    Raises:
        NumericsError: the merged model computes other values than the base with the adapter; nothing is written then.
    """
    whole = ModelFiles(files.directory, runs_code=files.runs_code)
    merged = merged_model(whole, adapter_directory, options)
    dtype = merged.config.dtype = source_dtype(whole, options)
    saved = merged.state_dict().keys()
    weights = {name: weight.detach().to(dtype) for name, weight in merged.named_parameters()}
    buffers = {name: buffer for name, buffer in merged.named_buffers() if name in saved}
    with _replacing(directory) as temporary:
        merged.save_pretrained(temporary, state_dict=weights | buffers)
        _write_dtype(temporary, dtype)
        del merged  # memory for two models is not needed
        kept = f"No merged model was left. The adapter, {adapter_directory}, is as trained; all commands take it as --model."
        check_saved(temporary, weights, dtype, kept, runs_code=options.trust_remote_code)
        tokenizer.save_pretrained(temporary)
        provenance.write(temporary)


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A temporary directory that replaces `directory` at the end, synced; removed on an error.

    Raises:
        ResourceError: there is no room.
    """
    temporary = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with translating_file_errors(f"Writing {directory}"):
            yield temporary
            for path in temporary.iterdir():
                sync_file(path)
            # Only the same run can have left one: it was killed between its last two files.
            shutil.rmtree(directory, ignore_errors=True)
            temporary.rename(directory)
            sync_directory(directory.parent)
    except SafetensorError as error:  # it wraps the errors of the file system
        raise ResourceError(
            f"Writing {directory}: {brief_message(error)}. Make room on the disk, and rerun the same command to resume from "
            "the last checkpoint."
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
