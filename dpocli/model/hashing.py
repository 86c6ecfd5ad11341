"""Hashes of a model's files, remembered between starts, and differences between two recorded values."""

import hashlib
import json
import re
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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

_NO_MEANING = {
    *("_name_or_path", "_commit_hash", "transformers_version", "dtype", "torch_dtype", "use_cache"),
    *("attn_implementation", "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
}
"""Fields of `config.json` that say where a model came from, how it was saved and how it is run, and change no value."""


def digest_json(value: Any) -> str:
    """sha256 of a value's JSON with sorted keys and no spaces: equal for equal values, 64 hexadecimal digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


class HashMemory:
    """sha256 of weights files, remembered by path, size, times and inode.

    `save` keeps them in a small JSON file. Workers write it without a lock: the last one wins, and what is lost that way,
    or by damage, is hashed again.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._path = path
        self._known = self._read()

    def sha256(self, path: Path) -> str:
        """The hash of a file: from the name of a hub blob, else remembered, else computed.

        Raises:
            UsageError: the file cannot be read.
        """
        file = path.resolve()
        if path.is_symlink() and file.parent.name == "blobs" and _SHA256.fullmatch(file.name):
            return file.name  # the hub names the blobs of large files by their hashes
        with translating_file_errors(f"Hashing {path}"):
            before, entry = _state(file), self._known.get(str(file))
            if isinstance(entry, dict) and entry.get("check") == _check(file, before, entry.get("sha256")):
                return str(entry["sha256"])
            sha256 = sha256_of_file(file)
            if before == _state(file) and time.time() - before[1] / 1e9 > _SETTLED_SECONDS:
                self._known[str(file)] = {"sha256": sha256, "check": _check(file, before, sha256)}
        return sha256

    def save(self) -> None:
        """Write the hashes, beside those that other workers wrote meanwhile. A failure costs only time."""
        kept = self._read()
        if self._path is None or kept | self._known == kept:
            return
        with suppress(DpoError):
            write_json(self._path, kept | self._known)

    def _read(self) -> dict[str, Any]:
        content = read_json(self._path) if self._path else None
        return content if isinstance(content, dict) else {}


def _check(file: Path, state: list[int], sha256: Any) -> str:
    """Digest of an entry: it shows a changed file, and a damaged hash, which would refuse a good cache for ever."""
    return digest_json([str(file), state, sha256])[:16]


def _state(path: Path) -> list[int]:
    """Size, time of the last write, time of the last change, inode. Archives and copies restore all but the third."""
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def sha256_of_file(path: Path) -> str:
    """sha256 of a file's bytes, 64 hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_hashes(model_dir: Path, hash_memory: HashMemory | None = None) -> dict[str, str]:
    """sha256 of every safetensors file that `from_pretrained` would load, by file name.

    Raises:
        UsageError: there are no weights, or a file is missing or cannot be read.
    """
    memory, names = hash_memory or HashMemory(), weights_files(model_dir)
    with ThreadPoolExecutor(max_workers=min(len(names), MAX_THREADS)) as threads:
        return dict(zip(names, threads.map(memory.sha256, [model_dir / name for name in names]), strict=True))


def code_hashes(model_dir: Path) -> dict[str, str]:
    """sha256 of every Python file beside a model, by file name: what `--trust-remote-code` would run."""
    with translating_file_errors(f"Hashing the code in {model_dir}"):
        return {path.name: sha256_of_file(path) for path in sorted(model_dir.glob("*.py"))}


def json_object(path: Path, fix: str) -> dict[str, Any]:
    """The JSON object of a file. Raise UsageError, which ends with `fix`, where the file has none."""
    with translating_file_errors(f"Reading {path}"):
        content = path.read_bytes()
    try:
        value = json.loads(content)
    except ValueError as error:
        raise UsageError(f"{path} is not JSON ({error}). {fix}") from None
    if not isinstance(value, dict):
        raise UsageError(f"{path} holds no JSON object. {fix}")
    return value


def meaningful_config(model_dir: Path) -> dict[str, Any]:
    """`config.json` without the fields that change no value, at every depth.

    Raises:
        UsageError: there is no such file, or it is no JSON object.
    """
    config: dict[str, Any] = _meaning(json_object(model_dir / "config.json", "Fetch or save the model again."))
    return config


def _meaning(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _meaning(item) for name, item in value.items() if name not in _NO_MEANING}
    return [_meaning(item) for item in value] if isinstance(value, list) else value


def weights_files(model_dir: Path) -> list[str]:
    """Names of the weights files, sorted. A single file goes before an index, as in transformers.

    Raises:
        UsageError: there are none, or one of them is missing.
    """
    if (model_dir / "model.safetensors").exists():
        return ["model.safetensors"]
    index = read_json(model_dir / "model.safetensors.index.json")
    listed = index.get("weight_map") if isinstance(index, dict) else None
    names = (
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


def content_differences(old: Sequence[ContentPart], new: Sequence[ContentPart]) -> list[str]:
    """Differences between lists of data files, by content and order, never by name."""
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


def changes(name: str, old: Any, new: Any) -> list[str]:
    """One line for every leaf that differs: `name: old -> new`, and for digests `name differs`, `is new` or `is missing`."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        prefix = f"{name}: " if name else ""
        keys = dict.fromkeys([*old, *new])
        return [prefix + line for key in keys for line in changes(str(key), old.get(key), new.get(key))]
    if old == new:
        return []
    if any(isinstance(value, str) and _SHA256.fullmatch(value) for value in (old, new)):
        return [f"{name} {'is new' if old is None else 'is missing' if new is None else 'differs'}"]
    return [f"{name}: {brief(old)} -> {brief(new)}"]


def brief(value: Any) -> str:
    """A value short enough for a line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
