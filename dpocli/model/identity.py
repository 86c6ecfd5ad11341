"""Identity of a model by content: base, adapter, quantization."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpocli.model.hashing import (
    HashMemory,
    code_hashes,
    digest_json,
    json_object,
    meaningful_config,
    weights_hashes,
)

ADAPTER_CONFIG = "adapter_config.json"

ADAPTER_WEIGHTS = "adapter_model.safetensors"

_NO_MEANING = {
    *("auto_mapping", "base_model_name_or_path", "inference_mode", "peft_version", "revision", "runtime_config"),
    *("corda_config", "eva_config", "init_lora_weights", "loftq_config", "lora_dropout", "lora_ga_config", "task_type"),
}
"""Fields of `adapter_config.json` that say where an adapter came from and how it was trained, and change no value."""


@dataclass(frozen=True, slots=True)
class ModelFiles:
    """A model on this machine's disks."""

    directory: Path
    """Directory of the base: `config.json` and the weights."""
    adapter: Path | None = None
    """Directory that peft wrote."""
    quantization: str | None = None
    runs_code: bool = False
    """Whether `--trust-remote-code` runs Python files beside the model."""
    checkpoint: Path | None = None
    """Checkpoint of a training run, whose weights replace the trained ones of the base or adapter."""

    @property
    def adapter_settings(self) -> Path | None:
        """Directory of the adapter's `adapter_config.json`; None for a model without an adapter."""
        if self.checkpoint:
            return self.checkpoint if (self.checkpoint / ADAPTER_CONFIG).is_file() else None
        return self.adapter

    def identity(self, hash_memory: HashMemory | None = None) -> "ModelIdentity":
        """The identity of a saved model. Raise UsageError where weights or configurations cannot be read."""
        assert self.checkpoint is None
        memory = hash_memory or HashMemory()
        adapter = None
        if self.adapter:
            adapter = {
                "weights": memory.sha256(self.adapter / ADAPTER_WEIGHTS),
                "config": _meaning(adapter_config(self.adapter)),
            }
        return ModelIdentity(
            weights=weights_hashes(self.directory, memory),
            config=meaningful_config(self.directory),
            code=code_hashes(self.directory) if self.runs_code else {},
            adapter=adapter,
            quantization=self.quantization,
        )


@dataclass(frozen=True, slots=True)
class ModelIdentity:
    """Everything that decides the values that a model computes in a given dtype."""

    weights: Mapping[str, str]
    """sha256 of each weights file, by name."""
    config: Mapping[str, Any]
    code: Mapping[str, str]
    """sha256 of each Python file of the model, where --trust-remote-code runs them."""
    adapter: Mapping[str, Any] | None
    quantization: str | None

    def has_weights_of(self, other: "ModelIdentity") -> bool:
        """Whether both load the same tensors; their configurations may differ."""
        return (self.weights, self.adapter, self.quantization) == (other.weights, other.adapter, other.quantization)

    @property
    def weights_digest(self) -> str:
        """Digest of the tensors that are loaded."""
        if self.adapter is None and self.quantization is None:
            return digest_json(self.weights)
        return digest_json([self.weights, self.adapter, self.quantization])

    def settings_digest(self, files: ModelFiles) -> str:
        """Digest of what else decides how the model of these files computes and is trained."""
        # The dropout of an adapter changes no value that it computes, but every step that trains it.
        dropout = adapter_config(files.adapter).get("lora_dropout") if files.adapter else None
        return digest_json([self.config, self.code, dropout])


def adapter_config(directory: Path) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Raises:
        UsageError: there is none, or it is no JSON object.
    """
    return json_object(directory / ADAPTER_CONFIG, "Copy or save the adapter again.")


def _meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that matter and are on: later versions of peft write more fields, all of them off."""
    return {
        name: sorted(value) if isinstance(value, list) and all(isinstance(entry, str) for entry in value) else value
        for name, value in sorted(config.items())
        if name not in _NO_MEANING and not (value is None or value is False or value in ([], {}, "none"))
    }
