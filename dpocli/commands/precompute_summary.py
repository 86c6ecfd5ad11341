"""The result of `precompute`: `summary.json`, and the same for people."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dpocli.cache.data_report import DataReport
from dpocli.cache.reader import PairStore
from dpocli.cache.schema import MAX_LISTED_SKIPS
from dpocli.cache.writer import CacheWriter
from dpocli.console.console import Printer


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
