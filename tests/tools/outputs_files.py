"""A file that dpocli wrote, as plain JSON or text in which nothing depends on the machine, the moment or the versions."""

import hashlib
import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors import safe_open

VARYING = {
    *("host", "boot", "pid", "pid_started", "started", "heartbeat", "launch", "cpus", "device_name"),
    *("seconds", "unique_tokens_per_second", "fraction_of_flop_floor", "pairs_per_second", "tokens_per_second"),
    *("model_flop_utilisation", "peak_memory_bytes", "environment", "information"),
    "run",  # a digest of absolute paths among others
}
"""Names in JSON whose values say nothing of what was computed. Of objects the names within are kept."""

_VARYING_LINE = re.compile(
    rf"^({'|'.join(sorted(VARYING | {'dpocli', 'torch', 'transformers', 'python'}))})\n\d[\w.+]*$", re.MULTILINE
)
"""In the text of a page: such a name, and the number or version in the line below."""

SHOWN_VALUES = 200
"""Columns of single values are kept in full up to so many rows, others as a digest."""

PATTERNS = [
    (r"^[\w /.-]+: [\d,]+(/[\d,]+)? (pairs|rows|steps)( \(\d+%\)|, ).*left.*\n", ""),  # progress, every ten seconds
    (r"^[^:\n]+: [\d,]+ (pairs|rows|steps), [\d.]+[kMG]? pairs/s.*\n", ""),  # the same where no total is known
    (r"^probe: .*\n", ""),
    (r"(?<= )(pairs|rows|steps) in \d+:\d\d(:\d\d)?", r"\1 in *"),
    (r"[\d.]+[kMG]? (pairs|tokens)/s", r"* \1/s"),
    (r"MFU [\d.]+%", "MFU *"),
    (r"memory [\d.]+ [KMG]iB", "memory *"),
    (r"(zipped\.jsonl:1: column )\d+: byte 0x\w\w", r"\1*: byte *"),  # a zip archive begins with the time
    (r"took [\d.]+ s\b", "took * s"),
    (r"about \d+:\d\d(:\d\d)? of", "about * of"),
    (r"(dpocli|torch|transformers|version|Python|python):? v?\d+\.\d+[\w.+]*", r"\1 *"),
]


def plain_text(text: str, places: dict[str, str]) -> str:
    """Text without times, rates, versions and absolute paths; `places` maps paths to names for them."""
    for path, name in places.items():
        text = text.replace(path, name)
    for pattern, replacement in PATTERNS:
        text = re.sub(pattern, replacement, text, flags=re.MULTILINE)
    return text


def plain_json(value: Any, places: dict[str, str], name: str = "") -> Any:
    """The same of what was JSON; a varying value is an asterisk."""
    if isinstance(value, dict):
        return {key: plain_json(item, places, name if name in VARYING else key) for key, item in value.items()}
    if isinstance(value, list):
        return [plain_json(item, places, name) for item in value]
    if name in VARYING and value is not None:
        return "*"
    return plain_text(value, places) if isinstance(value, str) else value


def recorded(path: Path, places: dict[str, str]) -> Iterator[tuple[str, Any]]:
    """What is kept of a file: suffixes for its name, and text or what JSON can hold."""
    kind = path.suffix
    if path.name.startswith("."):
        yield ".json", {"exists": True}
    elif kind == ".png":
        yield ".json", {"digest": digest(path.read_bytes())}
    elif kind == ".json":
        yield "", plain_json(json.loads(path.read_bytes()), places)
    elif kind == ".jsonl":
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        yield ".json", {f"line {number}": plain_json(row, places) for number, row in enumerate(rows, 1)}
    elif kind == ".parquet":
        yield ".json", _parquet(path, places)
    elif kind == ".safetensors":
        yield ".json", _tensors(path)
    elif kind == ".html":
        yield ".txt", plain_text(_VARYING_LINE.sub(r"\1\n*", _visible(path.read_text())), places)
    else:
        yield ".txt", plain_text(path.read_text(), places)


def _parquet(path: Path, places: dict[str, str]) -> dict[str, Any]:
    table = pq.read_table(path)
    metadata = table.schema.metadata or {}
    footer = {key.decode(): "*" for key in metadata if key != b"dpocli"}
    if b"dpocli" in metadata:
        footer["dpocli"] = plain_json(json.loads(metadata[b"dpocli"]), places)
    columns = {name: _column(table.column(name)) for name in table.column_names}
    return {"rows": table.num_rows, "columns": columns, "order": table.column_names, "footer": footer}


def _column(column: pa.ChunkedArray) -> dict[str, Any]:
    values = column.to_pylist()
    content = repr(values).encode()
    is_short = len(values) <= SHOWN_VALUES and len(content) < 20_000 and not pa.types.is_nested(column.type)
    kept = [value.hex() if isinstance(value, bytes) else value for value in values] if is_short else digest(content)
    return {"type": str(column.type), "values": kept}


def _tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in sorted(file.keys())}
        metadata = dict(sorted((file.metadata() or {}).items()))
    shown = {
        name: f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} sum {tensor.double().sum().item()!r} "
        + digest(tensor.contiguous().flatten().view(dtype=torch.uint8).numpy().tobytes())
        for name, tensor in tensors.items()
    }
    return {"metadata": metadata, "tensors": shown}


def _visible(page: str) -> str:
    """The text of a page, a line for each element."""
    page = re.sub(r"<(script|style|svg)\b.*?</\1>", "", page, flags=re.DOTALL | re.IGNORECASE)
    text = html.unescape(re.sub(r"<[^>]*>", "\n", page))
    return "".join(f"{line.strip()}\n" for line in text.splitlines() if line.strip())


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
