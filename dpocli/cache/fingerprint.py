"""The fingerprint of a reference cache: what decides its values, by content, so that copies and re-saved files agree.

Reference, dtype, tokenizer, data and settings must match to continue a cache. Train and evaluate compare the tokenizer
too. Information (versions, device) is never compared.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any

from dpocli.config.options import DataOptions
from dpocli.data.row_file import ContentPart
from dpocli.model.hashing import HashMemory, changes, content_differences, digest_json
from dpocli.model.identity import ModelFiles, ModelIdentity
from dpocli.model.tokenizer_identity import TokenizerIdentity

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
"""Options in the fingerprint: those that can change a value. The others either cannot (`on_bad_row` and `max_skipped`
decide whether a run stops) or are recorded by content (`data`, `model`).

An option added later must be left out while it has the value that older caches were made with.
"""

_NO_REFERENCE: dict[str, Any] = {name.name: None for name in fields(ModelIdentity)} | {"code": {}}


@dataclass(frozen=True)
class Fingerprint:
    """What the values of a cache depend on. `reference` and `dtype` are None for an unscored store."""

    tokenizer: TokenizerIdentity
    content: tuple[ContentPart, ...]
    settings: Mapping[str, Any]
    reference: ModelIdentity | None = None
    dtype: str | None = None
    information: Mapping[str, Any] = field(default_factory=dict)
    """Attention implementation, versions, device, …; never compared."""

    @property
    def is_scored(self) -> bool:
        return self.reference is not None

    @property
    def total_rows(self) -> int:
        """Source rows of the cache."""
        return int(self.settings["total_rows"])

    @property
    def rows_per_part(self) -> int:
        return int(self.settings["rows_per_part"])

    @cached_property
    def digest(self) -> str:
        """Equal where all that must match to continue a cache does."""
        parts = [(part.sha256, part.num_rows) for part in self.content]
        return digest_json(_by_value([self._reference(), self.dtype, asdict(self.tokenizer), parts, self.settings]))

    @cached_property
    def reference_digest(self) -> str:
        """Identifies the reference: weights, config, code, adapter, quantization."""
        return digest_json(_by_value(self._reference()))

    def _reference(self) -> dict[str, Any]:
        return asdict(self.reference) if self.reference else _NO_REFERENCE

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
        """The inverse of `to_json`. Raises KeyError, TypeError or ValueError for other values."""
        reference = value["reference"]
        return cls(
            reference=None if reference["weights"] is None else ModelIdentity(**reference),
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
    model: ModelFiles | None = None,
    dtype: str | None = None,
    information: Mapping[str, Any] | None = None,
    hash_memory: HashMemory | None = None,
) -> Fingerprint:
    """The fingerprint of a new cache.

    Args:
        options: how rows become tokens.
        tokenizer: makes the tokens.
        content: the data files, in order.
        total_rows: rows of all files, `--limit` applied.
        rows_per_part: rows in each tile.
        model: the reference; None for pairs that no reference scores.
        dtype: of the reference's forward pass ("bfloat16").
        information: recorded, never compared.
        hash_memory: remembers hashes of weights.

    Raises:
        UsageError: the model directory has no weights or no configuration.
    """
    settings = json.loads(options.model_dump_json(include=set(SETTINGS)))
    return Fingerprint(
        tokenizer=TokenizerIdentity.of(tokenizer),
        content=tuple(content),
        settings={**settings, "total_rows": total_rows, "rows_per_part": rows_per_part},
        reference=model.identity(hash_memory) if model else None,
        dtype=dtype if model else None,
        information=information or {},
    )


def compare(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """Differences that forbid to continue a cache, one sentence each; empty if they match."""
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
    """Differences of the reference model: weights, config, code, adapter, quantization."""
    before, after = stored.reference, wanted.reference
    if before is None or after is None:
        return [] if before is after else [f"reference: {_model_or_none(before)} -> {_model_or_none(after)}"]
    return [
        *changes("weights", before.weights, after.weights),
        *changes("config.json", before.config, after.config),
        *changes("code", before.code, after.code),
        *changes("adapter", before.adapter, after.adapter),
        *changes("quantization", before.quantization, after.quantization),
    ]


def config_differences(fingerprint: Fingerprint, model: ModelIdentity) -> list[str]:
    """Differences between the config.json of the reference and of a model."""
    assert fingerprint.reference
    return changes("config.json", fingerprint.reference.config, model.config)


def information_differences(fingerprint: Fingerprint, now: Mapping[str, Any]) -> list[str]:
    """Differences between the recorded information (versions, device) and the present one."""
    return changes("", fingerprint.information, now)


def _model_or_none(reference: ModelIdentity | None) -> str:
    return "a model" if reference else "none"


def _by_value(value: Any) -> Any:
    """One form for values that `changes` calls equal: null entries are removed; 0.0 and false become 0."""
    if isinstance(value, Mapping):
        return {key: _by_value(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [_by_value(entry) for entry in value]
    if isinstance(value, bool) or (isinstance(value, float) and value.is_integer()):
        return int(value)
    return value
