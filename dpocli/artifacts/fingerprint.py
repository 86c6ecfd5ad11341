"""What decides the values in a reference cache, recorded by content so that copies and re-saved files agree.

Three groups of fields: those that must match to continue a cache, the tokenizer (which must match, by meaning, for
train and evaluate too), and information.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpocli.artifacts.differences import changes, content_differences, file_differences
from dpocli.artifacts.hashing import HashMemory, code_hashes, digest_json, meaningful_config, weights_hashes
from dpocli.artifacts.tokenizer_identity import TokenizerIdentity
from dpocli.config.models import DataOptions
from dpocli.data.rows import ContentPart

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTINGS = (
    "limit",
    "prompt_field",
    "chosen_field",
    "rejected_field",
    "keep_columns",
    "text_as",
    "max_length",
    "truncation",
    "scored_turns",
    "template_date",
)
"""Options that can change a value, so they are in the fingerprint. The others either cannot (`on_bad_row` and
`max_skipped` decide whether a run stops, never what a row becomes) or stand there by content (`data`, `model`).

An option added later must be left out of the fingerprint while it has the value that older caches were made with.
"""


@dataclass(frozen=True)
class Fingerprint:
    """What the values of a cache depend on. `weights`, `config` and `dtype` are None where no reference scored it."""

    tokenizer: TokenizerIdentity
    content: tuple[ContentPart, ...]
    settings: Mapping[str, Any]
    weights: Mapping[str, str] | None = None
    """sha256 of each weights file, by name."""
    config: Mapping[str, Any] | None = None
    code: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each Python file of the model, where --trust-remote-code runs them."""
    adapter: Mapping[str, Any] | None = None
    quantization: str | None = None
    dtype: str | None = None
    information: Mapping[str, Any] = field(default_factory=dict)
    """Never compared: attention implementation, versions, device, …"""

    @property
    def is_scored(self) -> bool:
        return self.weights is not None

    @cached_property
    def digest(self) -> str:
        """Equal for fingerprints that match to continue."""
        parts = [(part.sha256, part.num_rows) for part in self.content]
        return digest_json([self._reference(), self.dtype, asdict(self.tokenizer), parts, self.settings])

    @cached_property
    def reference_digest(self) -> str:
        """Names the reference: weights, config, adapter, quantization."""
        return digest_json(self._reference())

    def _reference(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("weights", "config", "code", "adapter", "quantization")}

    def to_json(self) -> dict[str, Any]:
        return {
            "reference": self._reference(),
            "dtype": self.dtype,
            "tokenizer": asdict(self.tokenizer),
            "content": [asdict(part) for part in self.content],
            "settings": dict(self.settings),
            "information": dict(self.information),
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "Fingerprint":
        """What `to_json` wrote. Raises KeyError, TypeError or ValueError for anything else."""
        return cls(
            **value["reference"],
            dtype=value["dtype"],
            tokenizer=TokenizerIdentity.from_json(value["tokenizer"]),
            content=tuple(ContentPart(**part) for part in value["content"]),
            settings=value["settings"],
            information=value["information"],
        )


def build_fingerprint(
    options: DataOptions,
    *,
    tokenizer: "PreTrainedTokenizerBase",
    content: Sequence[ContentPart],
    total_rows: int,
    rows_per_part: int,
    model_dir: Path | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
    information: Mapping[str, Any] | None = None,
    hash_memory: HashMemory | None = None,
) -> Fingerprint:
    """The fingerprint of a cache to be made.

    Args:
        options: how rows become tokens.
        tokenizer: which makes the tokens.
        content: the data files, in order.
        total_rows: rows used of them all.
        rows_per_part: rows in each tile.
        model_dir: the reference; None for pairs that no reference scores.
        dtype: of the reference's forward pass ("bfloat16").
        trust_remote_code: whether Python files beside the model are run.
        information: anything worth knowing that decides no value.
        hash_memory: of hashes of weights.

    Raises:
        UsageError: the model directory has no weights or no configuration.
    """
    settings = json.loads(options.model_dump_json(include=set(SETTINGS)))
    return Fingerprint(
        tokenizer=TokenizerIdentity.of(tokenizer),
        content=tuple(content),
        settings={**settings, "total_rows": total_rows, "rows_per_part": rows_per_part},
        weights=weights_hashes(model_dir, hash_memory) if model_dir else None,
        config=meaningful_config(model_dir) if model_dir else None,
        code=code_hashes(model_dir) if model_dir and trust_remote_code else {},
        dtype=dtype if model_dir else None,
        information=information or {},
    )


def compare(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """What differs of all that must match to continue a cache, field by field, in words; empty where nothing does."""
    if stored.digest == wanted.digest:
        return []
    return [
        *compare_references(stored, wanted),
        *changes("dtype", stored.dtype, wanted.dtype),
        *stored.tokenizer.id_differences(wanted.tokenizer),
        *stored.tokenizer.use_differences(wanted.tokenizer),
        *content_differences(stored.content, wanted.content),
        *changes("", stored.settings, wanted.settings),
    ]


def compare_references(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """What differs of the reference model: weights, config, code, adapter, quantization."""
    if stored.is_scored != wanted.is_scored:
        return ["reference: none -> a model" if wanted.is_scored else "reference: a model -> none"]
    return [
        *file_differences("weights", stored.weights or {}, wanted.weights or {}),
        *changes("config.json", stored.config, wanted.config),
        *file_differences("code", stored.code, wanted.code),
        *changes("adapter", stored.adapter, wanted.adapter),
        *changes("quantization", stored.quantization, wanted.quantization),
    ]


def is_reference(fingerprint: Fingerprint, model_dir: Path, hash_memory_path: Path | None = None) -> bool:
    """Whether a model directory holds, by content, the reference that a cache was made with."""
    if fingerprint.adapter is not None or fingerprint.quantization is not None:
        return False
    return fingerprint.weights == weights_hashes(model_dir, HashMemory(hash_memory_path))


def config_differences(fingerprint: Fingerprint, model_dir: Path) -> list[str]:
    """What of the reference's config.json is other in a model directory, in words."""
    return changes("config.json", fingerprint.config, meaningful_config(model_dir))


def information_differences(fingerprint: Fingerprint, now: Mapping[str, Any]) -> list[str]:
    """What of the information (versions, device) is other now than when a cache was made, in words."""
    return changes("", fingerprint.information, now)
