"""What a model directory holds, by content: hashes of the weights files, remembered, and `config.json`."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dpocli.data.row_file import ContentPart
from dpocli.errors import DpoError, UsageError
from dpocli.run.files import read_json, translating_file_errors, write_json

MAX_THREADS = 8

HASH_MEMORY_NAME = ".hashes.json"
"""Name of the file of a `HashMemory` in an output directory."""

_SHA256 = re.compile(r"[0-9a-f]{64}")

_SETTLED_SECONDS = 2.0
"""A file written so recently can change again without its modification time showing it."""

_CONFIG_WITHOUT_MEANING = {
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_name_or_path",
    "attn_implementation",
    "dtype",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}
"""Where a model came from, how it was saved and how it is run: none of it decides what it computes in a given dtype."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)


def digest_json(value: Any) -> str:
    """sha256 of a value's canonical JSON, 64 hexadecimal digits."""
    return hashlib.sha256(canonical_json(value).encode("utf-8", "surrogatepass")).hexdigest()


@dataclass
class HashMemory:
    """sha256 of files, remembered by path and by what the file system says of it, in a small JSON file.

    Workers write it without a lock: the last one wins, and what is lost that way, or by damage, is hashed again.
    """

    path: Path | None = None
    """Where it is kept; None: nowhere."""
    is_kept: bool = True
    """Whether `save` writes; else what is known is only used."""
    _known: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._known = self._read()

    def recall(self, file: Path) -> str | None:
        """The hash of a file that is as it was; None where it is not known."""
        entry = self._known.get(str(file))
        if not isinstance(entry, dict) or entry.get("state") != _state(file):
            return None
        sha256 = str(entry.get("sha256"))
        return sha256 if entry.get("check") == _check(file, sha256) else None

    def sha256(self, file: Path) -> str:
        """The hash of a file: recalled, else computed and noted (`save` keeps it)."""
        if (recalled := self.recall(file)) is not None:
            return recalled
        before = _state(file)
        sha256 = sha256_of_file(file)
        if before == _state(file) and time.time() - before[1] / 1e9 > _SETTLED_SECONDS:
            self._known[str(file)] = {
                "state": before,
                "sha256": sha256,
                "check": _check(file, sha256),
            }
        return sha256

    def save(self) -> None:
        """Keep what is known, beside what other workers kept meanwhile. A failure costs time later, nothing else."""
        if self.path is None or not self.is_kept or not self._known:
            return
        kept = self._read()
        if kept | self._known == kept:
            return
        try:
            write_json(self.path, kept | self._known)
        except DpoError:
            return

    def _read(self) -> dict[str, Any]:
        content = read_json(self.path) if self.path else None
        return content if isinstance(content, dict) else {}


def _check(file: Path, sha256: str) -> str:
    """What shows that an entry was damaged: a wrong hash that is believed would refuse a good cache for ever."""
    return digest_json([str(file), sha256])[:16]


def sha256_of_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hashes(model_dir: Path, hash_memory: HashMemory | None = None) -> dict[str, str]:
    """sha256 of every safetensors file that `from_pretrained` would load, by file name.

    Raises:
        UsageError: there are no weights, or a file is missing or cannot be read.
    """
    memory = hash_memory or HashMemory()
    names = weights_files(model_dir)
    threads = ThreadPoolExecutor(max_workers=min(len(names), MAX_THREADS))
    with translating_file_errors(f"Hashing the weights in {model_dir}"), threads:
        hashes = list(threads.map(lambda name: _hub_hash(model_dir / name) or _hash(model_dir / name, memory), names))
    memory.save()
    return dict(zip(names, hashes, strict=True))


def file_hash(path: Path, memory: HashMemory) -> str:
    """sha256 of one file of weights.

    Raises:
        UsageError: it cannot be read.
    """
    with translating_file_errors(f"Hashing {path}"):
        sha256 = _hub_hash(path) or _hash(path, memory)
    memory.save()
    return sha256


def code_hashes(model_dir: Path) -> dict[str, str]:
    """sha256 of every Python file beside a model, by file name: what `--trust-remote-code` would run."""
    with translating_file_errors(f"Hashing the code in {model_dir}"):
        return {path.name: sha256_of_file(path) for path in sorted(model_dir.glob("*.py"))}


def json_object(path: Path, mend: str) -> dict[str, Any]:
    """A file that has to hold a JSON object; else UsageError, which ends with what mends it."""
    with translating_file_errors(f"Reading {path}"):
        content = path.read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}). {mend}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object. {mend}")
    return value


def meaningful_config(model_dir: Path) -> dict[str, Any]:
    """`config.json` less the fields that say where the model came from and how it was saved, at every depth.

    Raises:
        UsageError: there is no such file, or it is no JSON object.
    """
    config = json_object(model_dir / "config.json", "Fetch or save the model again.")
    return {name: _without(value) for name, value in config.items() if name not in _CONFIG_WITHOUT_MEANING}


def weights_files(model_dir: Path) -> list[str]:
    """Names, sorted; the choice between a single file and an index as transformers makes it."""
    if (model_dir / "model.safetensors").exists():
        return ["model.safetensors"]
    index = read_json(model_dir / "model.safetensors.index.json")
    listed = index.get("weight_map") if isinstance(index, dict) else None
    names: Iterable[str] = (
        map(str, listed.values())
        if isinstance(listed, Mapping)
        else (path.name for path in model_dir.glob("*.safetensors"))
    )
    found = sorted(set(names))
    if not found:
        raise UsageError(
            f"{model_dir}: there are no weights (*.safetensors) in it. Give the directory of a saved model."
        )
    if missing := [name for name in found if not (model_dir / name).is_file()]:
        raise UsageError(
            f"{model_dir}: the weights are incomplete: {missing[0]} is missing ({len(missing)} of {len(found)} files). "
            "Fetch or copy the model again."
        )
    return found


def _hub_hash(path: Path) -> str | None:
    """The hash in the name of a hub snapshot's blob (`snapshots/…/model.safetensors` → `blobs/<sha256>`)."""
    target = Path(os.path.realpath(path))
    is_blob = path.is_symlink() and target.parent.name == "blobs" and _SHA256.fullmatch(target.name)
    return target.name if is_blob else None


def _hash(path: Path, memory: HashMemory) -> str:
    return memory.sha256(path.resolve())


def _state(path: Path) -> list[int]:
    """Size, time of the last write, time of the last change of any kind, number on the disk.

    The first two alone can be put back, as archives and copies do; the third cannot.
    """
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def _without(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _without(item) for name, item in value.items() if name not in _CONFIG_WITHOUT_MEANING}
    return [_without(item) for item in value] if isinstance(value, list) else value


def content_differences(old: Sequence[ContentPart], new: Sequence[ContentPart]) -> list[str]:
    """Of the data files: by content and order, never by name."""
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


def file_differences(label: str, old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    """Of files known by name and hash."""
    words = {(True, True): "differs", (True, False): "is gone", (False, True): "is new"}
    names = sorted(old.keys() | new.keys())
    return [f"{label}: {name} {words[name in old, name in new]}" for name in names if old.get(name) != new.get(name)]


def changes(name: str, old: Any, new: Any) -> list[str]:
    """`name: old -> new` for every leaf that differs."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        prefix = f"{name}: " if name else ""
        keys = list(dict.fromkeys([*old, *new]))
        return [prefix + line for key in keys for line in changes(str(key), old.get(key), new.get(key))]
    return [] if old == new else [f"{name}: {brief(old)} -> {brief(new)}"]


def brief(value: Any) -> str:
    """A value short enough for a line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
