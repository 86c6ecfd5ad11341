"""Models and tokenizers from a directory or the hub, and back into a directory that `from_pretrained` loads."""

import platform
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

import dpocli
from dpocli.artifacts.files import sync_directory, sync_file
from dpocli.artifacts.hashing import meaningful_config
from dpocli.artifacts.status import is_out_of_memory
from dpocli.config.loss_choice import LossChoice
from dpocli.config.models import ModelOptions
from dpocli.engine.allocator import keep_freed_memory
from dpocli.errors import UsageError
from dpocli.objective.scoring import PairScorer

# One voice on stderr: the bars and the chatter of the library would stand between our own lines.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

DtypeName = Literal["float32", "bfloat16", "float16"]
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json", "tokenization_*.py")
"""One of them stands beside every model. Without any, transformers makes an empty tokenizer for some architectures."""


def locate_model(options: ModelOptions) -> Path:
    """The local directory of `--model`: as given, or the hub's snapshot of it (from the local cache when offline).

    Raises:
        UsageError: it is no model directory, or cannot be found, or its weights are not safetensors.
    """
    given = Path(options.model).expanduser()
    directory = given if given.exists() else _snapshot(options)
    if not directory.is_dir():
        raise UsageError(f"--model {options.model}: this is a file; give the directory that holds config.json.")
    if not (directory / "config.json").is_file():
        if any(directory.glob("rows-*.parquet")):
            raise UsageError(
                f"--model {options.model}: this is a reference cache, not a model. Give it as --reference, and as "
                "--model the directory with config.json and the weights."
            )
        mend = (
            f"Did you mean {given / 'model'}?" if (given / "model").is_dir() else "Give the directory of a saved model."
        )
        raise UsageError(f"--model {options.model}: there is no config.json in it, so it is no model directory. {mend}")
    meaningful_config(directory)
    if not any(directory.glob("*.safetensors")):
        if pickled := sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern)):
            raise UsageError(
                f"--model {options.model}: its weights are pickled ({pickled[0]}), which can run code when read. Load "
                "the model once where you trust it and save it with save_pretrained(…), which writes safetensors."
            )
        raise UsageError(
            f"--model {options.model}: there are no weights (*.safetensors) in it. Fetch or copy the model again."
        )
    return directory


def _snapshot(options: ModelOptions) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(options.model, revision=options.revision, allow_patterns=patterns))
    except HFValidationError:
        raise UsageError(f"--model {options.model}: there is no such directory.") from None
    except Exception as error:  # the hub raises a different class for each of: no network, no such name, no access
        raise UsageError(
            f"--model {options.model}: there is no such directory, and the model hub did not give it either "
            f"({type(error).__name__}). Check the path, or fetch the model where there is a network."
        ) from None


def load_tokenizer(directory: Path, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the model."""
    mend = "Copy the tokenizer's files (tokenizer.json, tokenizer_config.json, …) of the model beside its weights."
    if not any(path for pattern in _VOCABULARIES for path in directory.glob(pattern)):
        raise UsageError(f"--model {options.model}: there is no tokenizer in it. {mend}")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # the libraries raise errors of many kinds for damaged files
        raise UsageError(
            f"--model {options.model}: its tokenizer cannot be loaded ({_in_words(error)}). {mend}"
        ) from error


def pick_dtype(given: str | None, device: torch.device, *, recorded: str | None = None) -> torch.dtype:
    """The one dtype of the forward pass: as given, else the cache's, else what the device is good at."""
    if given or recorded:
        dtype = getattr(torch, given or recorded or "")
        assert isinstance(dtype, torch.dtype)
        return dtype
    has_bfloat16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float32


def load_model(directory: Path, options: ModelOptions, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The model in evaluation mode, on `device`, its parameters in `dtype` and its buffers left alone.

    Raises:
        UsageError: the weights do not fit the configuration, or the architecture is unknown.
    """
    # Its matrix products would round to 10 bits of mantissa, which is not what --dtype float32 says.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=dtype,
            use_safetensors=True,
            trust_remote_code=options.trust_remote_code,
            ignore_mismatched_sizes=True,  # to say which, below
            output_loading_info=True,
        )
    except SafetensorError as error:
        raise UsageError(
            f"--model {options.model}: its weights cannot be read ({_in_words(error)}): a file is damaged or was copied "
            "in part. Fetch or copy the model again."
        ) from error
    except (OSError, ValueError, KeyError, RuntimeError, TypeError) as error:
        if is_out_of_memory(error):
            raise
        raise UsageError(f"--model {options.model}: it cannot be loaded: {_in_words(error)}.") from error
    if mismatched := sorted(report["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        raise UsageError(
            f"--model {options.model}: {len(mismatched)} weights have another shape than its config.json says (the first: "
            f"{name}, {list(found)} instead of {list(wanted)}). Bring config.json and weights of one model together."
        )
    if missing := sorted(report["missing_keys"]):
        raise UsageError(
            f"--model {options.model}: {len(missing)} weights that the model needs are not in its files "
            f"({', '.join(missing[:3])}, …). They would be random. Is it another architecture, or an adapter alone?"
        )
    if getattr(model.config.get_text_config(), "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # some versions of transformers choose SDPA, which leaves the cap out
    torch.set_float32_matmul_precision("highest")
    if device.type == "cpu":
        keep_freed_memory()
    model.eval()
    return model.to(device)


def without_dropout(model: nn.Module) -> Callable[[], None]:
    """Sets every dropout, drop path and router jitter of the model to 0: in its modules, and in the configuration that
    some of them read at every call (so whoever saves the model saves the configuration of before).

    Returns:
        What puts them back.
    """
    before: list[tuple[Any, str, float]] = []
    for module in model.modules():
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


def source_dtype(directory: Path, options: ModelOptions) -> torch.dtype:
    """The dtype in which the model was saved."""
    config = AutoConfig.from_pretrained(directory, trust_remote_code=options.trust_remote_code)
    dtype = config.get_text_config().dtype or config.dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


class Provenance(BaseModel):
    """`dpocli.json` beside a trained model: how it came about, and what `evaluate` takes as defaults."""

    model_config = ConfigDict(frozen=True)

    format: int = 1
    loss: LossChoice | None = None
    loss_states: dict[str, dict[str, float]] = {}
    """What losses with a memory knew at the end of the training."""
    trained_from: str | None = None
    reference_digest: str | None = None
    """Of the reference that it was trained against; None without one."""

    @classmethod
    def of(cls, model_directory: Path) -> "Provenance":
        """Empty for models that dpocli did not train, or whose file it cannot read."""
        try:
            return cls.model_validate_json((model_directory / "dpocli.json").read_bytes())
        except (OSError, ValueError):
            return cls()


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
    temporary = directory.with_name(f".{directory.name}.unfinished")
    shutil.rmtree(temporary, ignore_errors=True)
    tensors = {name: tensor.to(dtype) for name, tensor in weights.items()} | {
        name: buffer.detach().cpu().clone() for name, buffer in buffers.items()
    }
    model.config = config
    model.config.dtype = dtype
    model.save_pretrained(temporary, state_dict=tensors)
    tokenizer.save_pretrained(temporary)
    (temporary / "dpocli.json").write_text(provenance.model_dump_json(indent=2) + "\n")
    for path in temporary.iterdir():
        sync_file(path)
    # Only the same run can have left one there: it was killed between its last two files.
    shutil.rmtree(directory, ignore_errors=True)
    temporary.rename(directory)
    sync_directory(directory.parent)


def dtype_name(dtype: torch.dtype) -> str:
    """As options and files spell it: `bfloat16`."""
    return str(dtype).removeprefix("torch.")


def environment(device: torch.device, scorer: PairScorer | None = None) -> dict[str, str]:
    """Versions, hardware and way of scoring: information beside values, never a reason to refuse them."""
    import transformers

    return {
        "dpocli": dpocli.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    } | (scorer.way if scorer else {})


def _in_words(error: Exception) -> str:
    """The first line of what a library says, with the kind of error where that is a mere name or nothing."""
    line = (str(error).strip().splitlines() or [""])[0].rstrip(" .:")
    return line if " " in line else f"{type(error).__name__} {line}".rstrip()
