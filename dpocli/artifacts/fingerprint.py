"""What decides the values in a reference cache, recorded by content so that copies and re-saved files agree.

Three groups of fields: those that must match to continue a cache, the tokenizer (which must match, by meaning, for
train and evaluate too), and information.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpocli.artifacts.hashing import HashMemory, code_hashes, digest_json, meaningful_config, weights_hashes
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

_TOKEN_FLAGS = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")


@dataclass(frozen=True)
class TokenizerIdentity:
    """What a tokenizer does to text, whatever bytes its files consist of. Digests are sha256."""

    num_ids: int
    """Largest token id + 1. The digests of the vocabulary and of the added tokens cover the ids below it."""
    vocabulary: str
    model: str
    """Kind of model and its parameters."""
    merges: str
    normalizer: str
    pre_tokenizer: str
    added_tokens: str
    affixes: tuple[tuple[int, ...], tuple[int, ...]]
    """Ids that it puts before and after a text by itself."""
    bos_token_id: int | None
    eos_token_id: int | None
    chat_template: Mapping[str, str]
    """Template by name; a tokenizer's only template is called `default`."""

    @classmethod
    def of(cls, tokenizer: "PreTrainedTokenizerBase", num_ids: int | None = None) -> "TokenizerIdentity":
        """The identity of a tokenizer, or of its first `num_ids` ids."""
        pairs = sorted((token_id, token) for token, token_id in tokenizer.get_vocab().items())
        num_ids = num_ids if num_ids is not None else (pairs[-1][0] + 1 if pairs else 0)
        backend = _backend(tokenizer)
        model = backend["model"]
        scores = [score for _, score in model["vocab"][:num_ids]] if isinstance(model.get("vocab"), list) else None
        parameters = {name: value for name, value in model.items() if name not in ("vocab", "merges")}
        added = sorted(
            (token for token in backend["added_tokens"] if token["id"] < num_ids), key=lambda token: token["id"]
        )
        merges = [merge.split(" ") if isinstance(merge, str) else list(merge) for merge in model.get("merges") or []]
        return cls(
            num_ids=num_ids,
            vocabulary=digest_json([pair for pair in pairs if pair[0] < num_ids]),
            model=digest_json([_meaning(parameters), scores]),
            merges=digest_json(merges),
            normalizer=digest_json(_meaning(backend.get("normalizer"))),
            pre_tokenizer=digest_json(_meaning(backend.get("pre_tokenizer"))),
            added_tokens=digest_json(added),
            affixes=_affixes(tokenizer),
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            chat_template=_templates(tokenizer),
        )

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> "TokenizerIdentity":
        before, after = value["affixes"]
        return cls(**{**value, "affixes": (tuple(before), tuple(after))})

    def id_differences(self, other: "TokenizerIdentity") -> list[str]:
        """Where the two give different ids for the same text, or different text for the same ids."""
        names = {
            "vocabulary": "vocabulary",
            "model": "model",
            "merges": "merges",
            "normalizer": "normalizer",
            "pre_tokenizer": "pre-tokenizer",
            "added_tokens": "added tokens",
        }
        differ = [
            f"tokenizer: {name} differs" for key, name in names.items() if getattr(self, key) != getattr(other, key)
        ]
        return [f"tokenizer: {line}" for line in _changes("ids", self.num_ids, other.num_ids)] + differ

    def use_differences(self, other: "TokenizerIdentity") -> list[str]:
        """Where texts or conversations become different input although the ids mean the same."""
        keys = ("affixes", "bos_token_id", "eos_token_id")
        differ = [
            f"tokenizer: {line}" for key in keys for line in _changes(key, getattr(self, key), getattr(other, key))
        ]
        return differ + _template_differences(self.chat_template, other.chat_template)


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
    hash_memory_path: Path | None = None,
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
        hash_memory_path: file in which hashes of weights are remembered.

    Raises:
        UsageError: the model directory has no weights or no configuration.
    """
    settings = json.loads(options.model_dump_json(include=set(SETTINGS)))
    return Fingerprint(
        tokenizer=TokenizerIdentity.of(tokenizer),
        content=tuple(content),
        settings={**settings, "total_rows": total_rows, "rows_per_part": rows_per_part},
        weights=weights_hashes(model_dir, HashMemory(hash_memory_path)) if model_dir else None,
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
        *_changes("dtype", stored.dtype, wanted.dtype),
        *stored.tokenizer.id_differences(wanted.tokenizer),
        *stored.tokenizer.use_differences(wanted.tokenizer),
        *_content_differences(stored.content, wanted.content),
        *_changes("", stored.settings, wanted.settings),
    ]


def compare_references(stored: Fingerprint, wanted: Fingerprint) -> list[str]:
    """What differs of the reference model: weights, config, code, adapter, quantization."""
    if stored.is_scored != wanted.is_scored:
        return ["reference: none -> a model" if wanted.is_scored else "reference: a model -> none"]
    return [
        *_file_differences("weights", stored.weights or {}, wanted.weights or {}),
        *_changes("config.json", stored.config, wanted.config),
        *_file_differences("code", stored.code, wanted.code),
        *_changes("adapter", stored.adapter, wanted.adapter),
        *_changes("quantization", stored.quantization, wanted.quantization),
    ]


def is_reference(fingerprint: Fingerprint, model_dir: Path, hash_memory_path: Path | None = None) -> bool:
    """Whether a model directory holds, by content, the reference that a cache was made with."""
    if fingerprint.adapter is not None or fingerprint.quantization is not None:
        return False
    return fingerprint.weights == weights_hashes(model_dir, HashMemory(hash_memory_path))


def information_differences(fingerprint: Fingerprint, now: Mapping[str, Any]) -> list[str]:
    """What of the information (versions, device) is other now than when a cache was made, in words."""
    return _changes("", fingerprint.information, now)


def compare_tokenizer(stored: TokenizerIdentity, tokenizer: "PreTrainedTokenizerBase") -> tuple[list[str], list[str]]:
    """What forbids to use a tokenizer with cached pairs, and what is only worth saying. Further ids are fine."""
    live = TokenizerIdentity.of(tokenizer, num_ids=stored.num_ids)
    if (size := max(tokenizer.get_vocab().values(), default=-1) + 1) < stored.num_ids:
        return [f"tokenizer: ids: {stored.num_ids} -> {size}"], []
    return stored.id_differences(live), stored.use_differences(live)


def _backend(tokenizer: "PreTrainedTokenizerBase") -> dict[str, Any]:
    """The parts of a tokenizer as the `tokenizers` library writes them; for others as much as they tell."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        fast: dict[str, Any] = json.loads(backend.to_str())
        return fast
    pieces = getattr(getattr(tokenizer, "sp_model", None), "serialized_model_proto", bytes)()
    added = [
        {"id": number, **{flag: getattr(token, flag) for flag in _TOKEN_FLAGS}}
        for number, token in tokenizer.added_tokens_decoder.items()
    ]
    model = {"type": type(tokenizer).__name__, "pieces": hashlib.sha256(pieces).hexdigest()}
    return {"model": model, "added_tokens": added}


def _meaning(component: Any) -> Any:
    """A part of a tokenizer less what has no meaning: unset parameters, offsets, sequences of one."""
    if isinstance(component, list):
        return [_meaning(item) for item in component]
    if not isinstance(component, dict):
        return component
    members = component.get("normalizers") or component.get("pretokenizers")
    if component.get("type") == "Sequence" and members and len(members) == 1:
        return _meaning(members[0])
    is_unset = {name for name, value in component.items() if value is None or value is False or value == ""}
    return {name: _meaning(value) for name, value in component.items() if name not in is_unset | {"trim_offsets"}}


def _affixes(tokenizer: "PreTrainedTokenizerBase") -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Found by what it does, since one effect has many representations (post-processors, flags, Python code)."""
    plain = list(tokenizer("a", add_special_tokens=False)["input_ids"])
    full = list(tokenizer("a")["input_ids"])
    for start in range(len(full) - len(plain) + 1):
        if full[start : start + len(plain)] == plain:
            return tuple(full[:start]), tuple(full[start + len(plain) :])
    return tuple(full), ()


def _templates(tokenizer: "PreTrainedTokenizerBase") -> dict[str, str]:
    template = tokenizer.chat_template
    return dict(template) if isinstance(template, dict) else {"default": template} if template else {}


def _template_differences(old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    differences = []
    for name in sorted(old.keys() | new.keys()):
        label = "chat template" if name == "default" else f"chat template {name}"
        if name not in old or name not in new:
            differences.append(f"{label}: none before, one now" if name in new else f"{label}: one before, none now")
        elif old[name] != new[name]:
            before, after = old[name].split("\n"), new[name].split("\n")
            same = next((at for at, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
            differences.append(
                f"{label}: differs from line {(min(len(before), len(after)) if same is None else same) + 1}"
            )
    return differences


def _content_differences(old: Sequence[ContentPart], new: Sequence[ContentPart]) -> list[str]:
    before, after = [(part.sha256, part.num_rows) for part in old], [(part.sha256, part.num_rows) for part in new]
    if before == after:
        return []
    if sorted(before) == sorted(after):
        return ["data: the same files in another order"]
    if len(before) != len(after):
        return [f"data: {len(old)} files ({_num_rows(old)} rows) -> {len(new)} files ({_num_rows(new)} rows)"]
    changed = [(a, b) for a, b in zip(old, new, strict=True) if a.sha256 != b.sha256]
    return [f"data: {b.name} differs ({a.num_rows:,} -> {b.num_rows:,} rows)" for a, b in changed]


def _num_rows(parts: Sequence[ContentPart]) -> str:
    return f"{sum(part.num_rows for part in parts):,}"


def _file_differences(label: str, old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    words = {(True, True): "differs", (True, False): "is gone", (False, True): "is new"}
    names = sorted(old.keys() | new.keys())
    return [f"{label}: {name} {words[name in old, name in new]}" for name in names if old.get(name) != new.get(name)]


def _changes(name: str, old: Any, new: Any) -> list[str]:
    """`name: old -> new` for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        prefix = f"{name}: " if name else ""
        keys = list(dict.fromkeys([*old, *new]))
        return [prefix + line for key in keys for line in _changes(str(key), old.get(key), new.get(key))]
    return [] if old == new else [f"{name}: {_brief(old)} -> {_brief(new)}"]


def _brief(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
