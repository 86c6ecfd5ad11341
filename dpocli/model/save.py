"""The model that a training leaves behind, as a directory that `from_pretrained` loads."""

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
from dpocli.model.load import source_dtype
from dpocli.model.lora import quietly
from dpocli.model.merge import check_saved, merged_model
from dpocli.run.files import sync_directory, sync_file, translating_file_errors

if TYPE_CHECKING:
    from peft import PeftModel


class Provenance(BaseModel):
    """`dpocli.json` beside a trained model: how it came about, and what `evaluate` takes as defaults."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    loss: LossChoice | None = None
    loss_states: dict[str, dict[str, float]] = {}
    """What losses with a memory knew at the end of the training."""
    trained_from: str | None = None
    quantization: str | None = None
    """Of the base that an adapter was trained on."""
    reference_digest: str | None = None
    """Of the reference that it was trained against; None without one."""
    step: int | None = None
    """Of its training, after which it was saved."""
    run: str | None = None
    """Names the training: the same for all checkpoints of one, and for no other settings or pairs."""

    @classmethod
    def of(cls, model_directory: Path) -> "Provenance":
        """Empty for models that dpocli did not train, or whose file it cannot read."""
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
) -> None:
    """Writes a model directory: weights in `dtype`, configuration, tokenizer with template, and `dpocli.json`.

    Args:
        directory: to write; it is there whole or not at all.
        model: gives the names; its own parameters are not looked at.
        config: to be saved with it.
        weights: name → full tensor.
        buffers: name → tensor, saved in the dtype that they have.
        tokenizer: saved beside.
        dtype: of the saved weights.
        provenance: of the model.
    """
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items()} | {
        name: buffer.detach().cpu().clone() for name, buffer in buffers.items()
    }
    model.config = config
    model.config.dtype = dtype
    with _replacing(directory) as temporary:
        model.save_pretrained(temporary, state_dict=tensors)
        tokenizer.save_pretrained(temporary)
        provenance.write(temporary)


def save_adapter(
    directory: Path,
    adapter: "PeftModel",
    files: ModelFiles,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    provenance: Provenance,
) -> None:
    """Writes a directory that peft loads: the adapter's weights in `dtype`, its configuration, and what stands beside it.

    Args:
        directory: to write; it is there whole or not at all.
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
        (temporary / "README.md").unlink(missing_ok=True)  # a form of peft's, with nothing filled in
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
    """Writes the base with the adapter added to its weights, in the base's dtype: a model like any other.

    A base that was quantized while it was trained is merged as it was before, as is the custom: the merged model is not
    what was trained, to the error of the quantization.

    Args:
        directory: to write; it is there whole or not at all.
        files: of the base.
        adapter_directory: of the trained adapter.
        options: how models are loaded.
        tokenizer: saved beside.
        provenance: of the adapter.

    Raises:
        NumericsError: the merged model is not what the base with the adapter is; it is not there then.
    """
    whole = ModelFiles(files.directory, runs_code=files.runs_code)
    merged = merged_model(whole, adapter_directory, options)
    dtype = merged.config.dtype = source_dtype(whole, options)
    saved = merged.state_dict().keys()
    weights = {name: weight.detach().to(dtype) for name, weight in merged.named_parameters()}
    buffers = {name: buffer for name, buffer in merged.named_buffers() if name in saved}
    with _replacing(directory) as temporary:
        merged.save_pretrained(temporary, state_dict=weights | buffers)
        del merged  # two of them need not fit
        check_saved(temporary, weights, adapter_directory, options)
        tokenizer.save_pretrained(temporary)
        provenance.write(temporary)


@contextmanager
def _replacing(directory: Path) -> Iterator[Path]:
    """A temporary directory that takes the place of `directory` at the end, synced; gone where that fails.

    Raises:
        ResourceError: there is no room. What was written is removed, so that there is for smaller files.
    """
    temporary = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        with translating_file_errors(f"Writing {directory}"):
            yield temporary
            for path in temporary.iterdir():
                sync_file(path)
            # Only the same run can have left one there: it was killed between its last two files.
            shutil.rmtree(directory, ignore_errors=True)
            temporary.rename(directory)
            sync_directory(directory.parent)
    except SafetensorError as error:  # it wraps the errors of the file system
        shutil.rmtree(temporary, ignore_errors=True)
        raise ResourceError(
            f"Writing {directory}: {brief_message(error)}. Make room on the disk; the same command line goes on from the last "
            "checkpoint."
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
