"""What differs between two fingerprints, field by field, in words."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from dpocli.data.rows import ContentPart


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
