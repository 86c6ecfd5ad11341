"""Where the model and the tokenizer of a command line lie: directories, adapters on top of them, snapshots of the hub."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from dpocli.config.options import ModelOptions
from dpocli.errors import UsageError, brief_message
from dpocli.model.hashing import json_object, meaningful_config
from dpocli.model.identity import ADAPTER_CONFIG, ADAPTER_WEIGHTS, ModelFiles, adapter_config
from dpocli.run.files import STATE_NAME

_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")

_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab.*", "tekken.json", "tokenization_*.py")
"""One of them stands beside every model. Without any, transformers makes an empty tokenizer for some architectures."""

_NOT_SHARDED = ("ensure_weight_tying",)
"""Settings of peft: torch's `fully_shard` refuses the transposed weights that it makes."""

_NOT_TRAINED = ("trainable_token_indices", *_NOT_SHARDED)
"""All training goes through `fully_shard`, whose weights peft cannot copy the rows of single tokens into."""


def resolve_model(options: ModelOptions, *, checkpoints: bool = False, trains: bool = False) -> ModelFiles:
    """What `--model` and `--adapter` name: a directory as given, or the hub's snapshot (from the local cache when offline).

    An adapter's directory given as `--model` stands for its base with the adapter on top.

    Args:
        options: what was given.
        checkpoints: whether a checkpoint of a training is taken for the model as it was then.
        trains: whether the model is to be trained, which some adapters do not allow.

    Raises:
        UsageError: it is no model directory, or cannot be found, or its weights are not safetensors.
    """
    if options.revision and Path(options.name).expanduser().exists():
        raise UsageError(
            f"--model {options.name}: it is a directory here, and --revision {options.revision} is of the hub. Leave --revision out."
        )
    directory = _directory(options.name, options.revision, f"--model {options.name}")
    adapter, checkpoint = options.adapter, None
    if (directory / STATE_NAME).is_file():
        if not checkpoints:
            raise UsageError(
                f"--model {options.name}: this is a checkpoint of a training, which evaluate takes. Give the directory of a "
                "saved model, such as that run's OUT/model."
            )
        checkpoint = directory
        directory, adapter = _trained_from(checkpoint, options)
    elif adapter:
        _check_adapter(adapter, f"--adapter {adapter}", options, trains=trains)
    elif (directory / ADAPTER_CONFIG).is_file():
        adapter, directory = directory, _base_of(directory, options, trains=trains)
    _check_model(directory, f"--model {options.name}")
    return ModelFiles(directory, adapter, options.quantization, options.trust_remote_code, checkpoint)


def _directory(name: str, revision: str | None, asked: str) -> Path:
    given = Path(name).expanduser()
    directory = given if given.exists() else _snapshot(name, revision, asked)
    if not directory.is_dir():
        raise UsageError(f"{asked}: this is a file; give the directory that holds config.json.")
    return directory


def _trained_from(checkpoint: Path, options: ModelOptions) -> tuple[Path, Path | None]:
    """The model that a checkpoint's weights belong into, and the adapter that its training began with."""
    asked = f"--model {checkpoint}: this is a checkpoint of a training"
    if options.adapter:
        raise UsageError(f"{asked}, so --adapter {options.adapter} has no place on it.")
    state = json_object(checkpoint / STATE_NAME, "Give another checkpoint.")
    if not (base := state.get("base")):
        raise UsageError(
            f"{asked} that does not say of which model; an earlier dpocli wrote it. Give OUT/model of its run."
        )
    if not Path(str(base)).is_dir():
        raise UsageError(f"{asked} of {base}, which is not there. Put that model back in its place.")
    adapter = state.get("base_adapter")
    return Path(str(base)), Path(str(adapter)) if adapter else None


def _base_of(adapter: Path, options: ModelOptions, *, trains: bool = False) -> Path:
    """The model that an adapter was made for, as the adapter remembers it."""
    config = adapter_config(adapter)
    asked = f"--model {adapter}: this is an adapter"
    _check_adapter(adapter, asked, options, trains=trains)
    if not (base := config.get("base_model_name_or_path")):
        raise UsageError(f"{asked} that does not say of which model. Give --model BASE --adapter {adapter}.")
    try:
        return _directory(str(base), config.get("revision"), f"{asked} of {base}")
    except UsageError as error:
        raise UsageError(f"{error} Or give --model BASE --adapter {adapter}.") from None


def _check_adapter(directory: Path, asked: str, options: ModelOptions, *, trains: bool = False) -> None:
    if not (directory / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{asked}: there is no {ADAPTER_CONFIG} in it. Give the directory of an adapter that peft saved."
        )
    config = adapter_config(directory)
    if (kind := config.get("peft_type")) != "LORA":
        raise UsageError(f"{asked}: it is of the type {kind}; LoRA adapters (DoRA and rsLoRA among them) can be used.")
    if config.get("alora_invocation_tokens"):
        raise UsageError(f"{asked}: it acts only after certain tokens (aLoRA), which is not supported.")
    refused = _NOT_TRAINED if trains else _NOT_SHARDED if options.shards > 1 else ()
    if made_with := [name for name in refused if config.get(name)]:
        does = "train on such an adapter" if trains else "spread it over --shards"
        raise UsageError(
            f"{asked}: it was made with {made_with[0]}, and dpocli cannot {does}. precompute and evaluate take it, unsharded. Or merge "
            "it into its model (peft's merge_and_unload), and give that as --model."
        )
    if not (directory / ADAPTER_WEIGHTS).is_file():
        raise UsageError(f"{asked}: there is no {ADAPTER_WEIGHTS} in it. Save the adapter again, as safetensors.")


def _check_model(directory: Path, asked: str) -> None:
    if (directory / ADAPTER_CONFIG).is_file():  # transformers would load the adapter with it, unasked
        raise UsageError(
            f"{asked}: {directory} holds an adapter ({ADAPTER_CONFIG}) where its base is looked for. Put the adapter into a "
            "directory of its own."
        )
    if not (directory / "config.json").is_file():
        if any(directory.glob("rows-*.parquet")):
            raise UsageError(
                f"{asked}: this is a reference cache, not a model. Give it as --reference, and as "
                "--model the directory with config.json and the weights."
            )
        mend = (
            f"Did you mean {directory / 'model'}?"
            if (directory / "model").is_dir()
            else "Give the directory of a saved model."
        )
        raise UsageError(f"{asked}: there is no config.json in it, so it is no model directory. {mend}")
    meaningful_config(directory)
    if not any(directory.glob("*.safetensors")):
        if pickled := sorted(path.name for pattern in _PICKLED for path in directory.glob(pattern)):
            raise UsageError(
                f"{asked}: its weights are pickled ({pickled[0]}), which can run code when read. Load "
                "the model once where you trust it and save it with save_pretrained(…), which writes safetensors."
            )
        raise UsageError(f"{asked}: there are no weights (*.safetensors) in it. Fetch or copy the model again.")


def _snapshot(name: str, revision: str | None, asked: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    patterns = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja", "*.py"]
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=patterns))
    except HFValidationError:
        raise UsageError(f"{asked}: there is no such directory.") from None
    except Exception as error:  # the hub raises a different class for each of: no network, no such name, no access
        raise UsageError(
            f"{asked}: there is no such directory, and the model hub did not give it either "
            f"({type(error).__name__}). Check the path, or fetch the model where there is a network."
        ) from None


def load_tokenizer(model: ModelFiles, options: ModelOptions) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside the adapter, where there is one, else beside the base."""
    mend = "Copy the tokenizer's files (tokenizer.json, tokenizer_config.json, …) of the model beside its weights."
    directory = model.adapter if model.adapter and _has_tokenizer(model.adapter) else model.directory
    if not _has_tokenizer(directory):
        raise UsageError(f"--model {options.name}: there is no tokenizer in it. {mend}")
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # the libraries raise errors of many kinds for damaged files
        raise UsageError(
            f"--model {options.name}: its tokenizer cannot be loaded ({brief_message(error)}). {mend}"
        ) from error


def _has_tokenizer(directory: Path) -> bool:
    return any(path for pattern in _VOCABULARIES for path in directory.glob(pattern))
