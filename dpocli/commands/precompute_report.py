"""What precompute reports: the summary of a cache, and the estimate of a dry run."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dpocli.cache.data_report import DataReport
from dpocli.cache.reader import PairStore
from dpocli.cache.schema import MAX_LISTED_SKIPS
from dpocli.cache.writer import CacheWriter
from dpocli.commands.encoding import problem_of_skips
from dpocli.commands.reference import Reference
from dpocli.config.options import DataOptions
from dpocli.console.console import Printer
from dpocli.console.progress import Progress, format_duration
from dpocli.data.encoder import Encoder
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.data.sources import SourceRows


def summarize(out: Path, writer: CacheWriter, notices: Mapping[str, int], figures: Mapping[str, Any]) -> dict[str, Any]:
    """What the whole cache holds by now, including the parts of other workers.

    Args:
        out: its directory.
        writer: of the cache.
        notices: of the encoder.
        figures: of the reference.
    """
    footers = list(writer.footers())
    counts = sum((Counter(footer.counts) for footer in footers), Counter())
    return {
        "out": str(out),
        "complete": len(footers) == len(writer.tiles),
        "parts": len(footers),
        "parts_total": len(writer.tiles),
        "rows": writer.total_rows,
        "pairs": sum(footer.num_pairs for footer in footers),
        "truncated": counts["truncated"],
        "tokens": counts["prompt_tokens"] + counts["chosen_tokens"] + counts["rejected_tokens"],
        "skipped": dict(sum((Counter(footer.skipped) for footer in footers), Counter())),
        "skipped_rows": [asdict(row) for footer in footers for row in footer.skipped_rows][:MAX_LISTED_SKIPS],
        "notices": dict(notices),
        **figures,
    }


def add_data_report(summary: dict[str, Any], writer: CacheWriter) -> None:
    """Add the entry `triage` for a complete cache that has pairs."""
    if summary["complete"] and summary["pairs"]:
        # By its name, since directory listings lag on some file systems.
        store = PairStore.open(writer.directory, first=writer.tiles[0].file_name)
        summary["triage"] = DataReport.of(store).to_json()


def render(printer: Printer, summary: Mapping[str, Any]) -> None:
    """Print the summary."""
    missing = summary["parts_total"] - summary["parts"]
    state = "complete" if not missing else f"{missing} of {summary['parts_total']} parts are missing (other workers')"
    printer.say(
        f"{summary['out']}: {summary['pairs']:,} pairs of {summary['rows']:,} rows, {summary['tokens']:,} tokens, "
        f"{summary['truncated']:,} pairs truncated; {state}."
    )
    if summary["reused"]:
        printer.say(f"  {summary['reused']:,} pairs taken over from --reuse")
    for reason, count in summary["skipped"].items():
        printer.say(f"  {count:,} rows skipped: {reason}")
    for row in summary["skipped_rows"][:5]:
        detail = f" ({row['detail']})" if row["detail"] else ""
        printer.say(f"    {row['where']}: {row['reason']}{detail}")
    if report := summary.get("triage"):
        _render_report(printer, report)


def _render_report(printer: Printer, report: Mapping[str, Any]) -> None:
    printer.say(
        f"The reference prefers the chosen side in {report['reference_accuracy']:.1%} of the pairs; the longer side is the "
        f"chosen one in {report['pick_the_longer_accuracy']:.1%} (median difference {report['median_length_difference']:+,.0f} tokens)."
    )
    for finding in report["findings"]:
        rows = ", ".join(map(str, finding["rows"][:8])) + (", …" if finding["count"] > 8 else "")
        printer.say(f"  {finding['count']:,} {finding['name']}: source rows {rows} ({finding['meaning']})")


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


def render_estimate(printer: Printer, figures: Mapping[str, Any]) -> None:
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
