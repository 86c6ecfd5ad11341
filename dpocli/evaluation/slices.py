"""Accuracy by slice: by label, by length, by the margin of the reference."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpocli.evaluation.bootstrap import Clusters, share_interval

MIN_PROMPTS = 30

MAX_WIDTH = 0.3

MOST_TIES = 0.5

NUM_PARTS = 4
"""Slices of a number, cut at its quantiles."""

MAX_LABELS = 20
"""Slices of a column of labels: the largest; all others are one slice."""

MISSING, EMPTY = "(none)", "(empty)"

_OURS = re.compile(r"\((none|empty|\d+ others?)\)")

KEPT = "kept/"
"""Prefix of kept columns in `pairs.parquet`, since they may have any name."""


def slices(
    columns: Mapping[str, NDArray[Any]], right: NDArray[np.bool_], margins: NDArray[np.float64], clusters: Clusters
) -> dict[str, list[dict[str, Any]]]:
    """The slices of each kind; a kind with one slice only is left out.

    A slice is too small where it has fewer than 30 prompts, since the interval itself is rough then, where its interval is
    wider than 0.3, or where most of its pairs tie, since a tie is not right.

    Args:
        columns: of `pairs.parquet`, shapes (pairs,).
        right: whether the chosen side has the higher reward, shape (pairs,).
        margins: shape (pairs,).
        clusters: of the pairs.
    """
    found = {}
    for kind, values in _kinds(columns):
        names, codes = parted(values)
        if len(names) > 1:
            free = kind if kind not in found else KEPT + kind  # a kept column may have any name
            found[free] = [_slice(name, codes == code, right, margins, clusters) for code, name in enumerate(names)]
    return found


def parted(values: NDArray[Any]) -> tuple[list[str], NDArray[np.int64]]:
    """Names of the slices, and which one each pair is in. Numbers are cut at quantiles. Shapes (pairs,)."""
    if values.dtype != object:
        return _by_quantile(values)
    items = values.tolist()
    there = np.array([item is not None and item == item for item in items])  # None and NaN are missing
    if not there.any() or {type(item) for item in values[there].tolist()} - {int, float}:
        return _by_label(_labels(items))
    codes = np.zeros(len(items), dtype=np.int64)
    names, codes[there] = _by_quantile(np.array(values[there].tolist()))
    codes[~there] = len(names)
    return names if there.all() else [*names, MISSING], codes


def _kinds(columns: Mapping[str, NDArray[Any]]) -> Iterator[tuple[str, NDArray[Any]]]:
    chosen, rejected = columns["chosen_tokens"], columns["rejected_tokens"]
    sources = columns["source"].copy()
    sources[sources == ""] = None  # pairs without a source
    yield "source", sources
    yield "prompt_tokens", columns["prompt_tokens"]
    yield "completion_tokens", np.maximum(chosen, rejected)
    yield "length_difference", chosen - rejected
    if "ref_chosen_logps" in columns:
        yield "reference_margin", columns["ref_chosen_logps"] - columns["ref_rejected_logps"]
    yield "num_turns", columns["num_turns"]
    yield from ((name.removeprefix(KEPT), values) for name, values in columns.items() if name.startswith(KEPT))


def _slice(
    name: str, members: NDArray[np.bool_], right: NDArray[np.bool_], margins: NDArray[np.float64], clusters: Clusters
) -> dict[str, Any]:
    own = clusters.where(members)
    low, high = share_interval(right[members], own)
    return {
        "name": name,
        "pairs": int(members.sum()),
        "accuracy": float(right[members].mean()),
        "interval": [low, high],
        "margin": float(margins[members].mean()),
        "too_small": own.count < MIN_PROMPTS
        or high - low > MAX_WIDTH
        or bool((margins[members] == 0).mean() > MOST_TIES),
    }


def _by_quantile(numbers: NDArray[Any]) -> tuple[list[str], NDArray[np.int64]]:
    distinct = np.unique(numbers)
    if len(distinct) <= NUM_PARTS:
        edges = distinct[:-1]
    else:
        edges = np.unique(np.quantile(numbers, np.arange(1, NUM_PARTS) / NUM_PARTS, method="lower"))
        edges = edges[edges < distinct[-1]]
    codes = np.searchsorted(edges, numbers, side="left")
    ends = [(numbers[codes == code].min(), numbers[codes == code].max()) for code in range(len(edges) + 1)]
    return _spans(ends), codes


def _spans(ends: Sequence[tuple[Any, Any]]) -> list[str]:
    """`3 to 12`, with the fewest digits that make the names differ."""
    for digits in range(3, 18):
        texts = [(_number(low, digits), _number(high, digits)) for low, high in ends]
        names = [low if low == high else f"{low} to {high}" for low, high in texts]
        merged = any(a == b and low != high for (a, b), (low, high) in zip(texts, ends, strict=True))
        if len({*names}) == len(names) and not merged:
            break
    return names


def _number(value: Any, digits: int) -> str:
    return str(value) if isinstance(value, int | np.integer) else f"{value:.{digits}g}"


def _by_label(labels: list[str]) -> tuple[list[str], NDArray[np.int64]]:
    largest = [label for label, _ in sorted(Counter(labels).items(), key=lambda item: (-item[1], item[0]))]
    names = sorted(largest if len(largest) <= MAX_LABELS else largest[: MAX_LABELS - 1])
    places = {label: place for place, label in enumerate(names)}
    codes = np.array([places.get(label, len(names)) for label in labels], dtype=np.int64)
    if len(names) < len(largest):
        names.append(f"({len(largest) - len(names)} others)")
    return names, codes


def _labels(values: Sequence[Any]) -> list[str]:
    """Texts as they are, other values as JSON. A text is quoted where it looks like another value, or is blank."""
    texts = {value for value in values if isinstance(value, str)}
    others = {_spelled(value) for value in values if not isinstance(value, str)}
    quoted = {text for text in texts if text in others or _OURS.fullmatch(text) or not text.strip()}
    if quoted:  # then a text that begins with a quote is ambiguous too
        quoted |= {text for text in texts if text.startswith('"')}
    known = {text: _spelled(text) if text in quoted else text for text in texts} | {"": EMPTY}
    return [known[value] if isinstance(value, str) else _spelled(value) for value in values]


def _spelled(value: Any) -> str:
    return MISSING if value is None else json.dumps(value, ensure_ascii=False, sort_keys=True)
