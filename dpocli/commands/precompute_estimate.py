"""`precompute --dry-run`: estimate pairs, bytes and time. Writes nothing."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpocli.cache.writer import CacheWriter
from dpocli.commands.encoding import problem_of_skips
from dpocli.commands.reference import Reference
from dpocli.config.options import DataOptions
from dpocli.console.console import Printer
from dpocli.console.progress import Progress, format_duration
from dpocli.data.encoder import Encoder
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.data.sources import SourceRows

SAMPLED_ROWS = 2048
"""Rows that are encoded, if there are more."""

NEIGHBOURS = 64
"""Consecutive rows in a sample."""

PROBED_TOKENS = 10_000
"""Distinct tokens that are scored to measure the speed."""


def estimate(
    rows: SourceRows,
    encoder: Encoder,
    options: DataOptions,
    writer: CacheWriter,
    reference: Reference,
    missing_rows: int,
    progress: Progress,
) -> dict[str, Any]:
    """The figures of a dry run.

    Args:
        rows: all rows.
        encoder: of the rows.
        options: for `--max-skipped`.
        writer: of the cache, which may not exist.
        reference: scores a few pairs.
        missing_rows: rows of the tiles that this worker would have to write.
        progress: of the scoring.
    """
    starts = _starts(rows.num_rows)
    results = [
        result
        for start in starts
        for result in encoder.encode_rows(rows, start, min(start + NEIGHBOURS, rows.num_rows))
    ]
    pairs = [result for result in results if isinstance(result, EncodedPair)]
    skipped = Counter(str(result.reason) for result in results if isinstance(result, Skipped))
    scale = rows.num_rows / len(results)
    tokens = sum(_num_tokens(pair) for pair in pairs)
    known = reference.reusable.fill_in(pairs)
    to_score = [pair for pair in known if pair.reference is None]
    figures: dict[str, Any] = {
        "rows": rows.num_rows,
        "is_exact": len(results) == rows.num_rows,
        "rows_sampled": len(results),
        "pairs": round(len(pairs) * scale),
        "tokens": round(tokens * scale),
        "skipped": {reason: round(count * scale) for reason, count in skipped.items()},
        "reused_pairs": round((len(pairs) - len(to_score)) * scale),
        "tiles": len(writer.tiles),
        "rows_to_do": missing_rows,
        "bytes": None,
        "seconds": None,
        "stops": _stop(results, rows.num_rows, options.max_skipped),
    }
    if pairs:
        probe = _some(to_score) or known[:NEIGHBOURS]
        scored = reference.complete(probe, progress, lambda: None)
        bytes_per_token = writer.size_of(scored) / sum(_num_tokens(pair) for pair in scored)
        figures["bytes"] = round(bytes_per_token * tokens * scale)
    if to_score:
        scoring = reference.figures()["scoring"]
        share = missing_rows / rows.num_rows
        left = sum(_num_tokens(pair) for pair in to_score) * scale * share
        figures |= {"seconds": round(left / scoring["unique_tokens_per_second"], 1), "scoring": scoring}
    elif pairs:
        figures["seconds"] = 0.0
    return figures


def render(printer: Printer, figures: Mapping[str, Any]) -> None:
    """Print the figures."""
    basis = "all rows encoded" if figures["is_exact"] else f"from {figures['rows_sampled']:,} rows encoded"
    printer.say(
        f"Dry run ({basis}): {figures['pairs']:,} pairs of {figures['rows']:,} rows, {figures['tokens']:,} tokens, "
        f"{figures['tiles']:,} parts."
    )
    for reason, count in figures["skipped"].items():
        printer.say(f"  {count:,} rows would be skipped: {reason}")
    if figures["reused_pairs"]:
        printer.say(f"  {figures['reused_pairs']:,} pairs would be taken over from --reuse")
    if figures["bytes"] is not None:
        printer.say(f"  about {figures['bytes'] / 1e6:,.1f} MB on disk")
    if figures["seconds"] is not None:
        printer.say(
            f"  {figures['rows_to_do']:,} rows are this worker's to do: about {format_duration(figures['seconds'])} of scoring"
        )


def _stop(results: Sequence[EncodedPair | Skipped], num_rows: int, max_skipped: float) -> str | None:
    """Why the run would stop, judged by the encoded rows; None if it would not."""
    skipped = [result for result in results if isinstance(result, Skipped)]
    fault = problem_of_skips(Counter(str(row.reason) for row in skipped), len(results), max_skipped, skipped)
    if fault is None:
        return None
    seen = "would stop" if len(results) == num_rows else f"would probably stop, going by {len(results):,} rows encoded"
    return f"--dry-run: the run {seen}: {fault}"


def _starts(num_rows: int) -> Sequence[int]:
    """First rows of the samples, spread evenly over the data."""
    every = range(0, num_rows, NEIGHBOURS)
    most = SAMPLED_ROWS // NEIGHBOURS
    if len(every) <= most:
        return every
    return [every[int(place)] for place in np.linspace(0, len(every) - 1, most)]


def _some(pairs: Sequence[EncodedPair]) -> list[EncodedPair]:
    """Random pairs for the measurement, within PROBED_TOKENS but at least one."""
    order = np.random.default_rng(0).permutation(len(pairs))
    ends = np.cumsum([_num_tokens(pairs[place]) for place in order])
    return [pairs[place] for place in order[: max(1, int(np.searchsorted(ends, PROBED_TOKENS)))]] if len(pairs) else []


def _num_tokens(pair: EncodedPair) -> int:
    return sum(map(len, pair.all_ids))
