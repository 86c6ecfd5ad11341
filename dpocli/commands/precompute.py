"""`dpocli precompute`: the frozen reference scores every pair, once."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpocli.artifacts.cache_format import MAX_LISTED_SKIPS, kept_types
from dpocli.artifacts.cache_writer import CacheWriter
from dpocli.artifacts.destination import check_out
from dpocli.artifacts.fingerprint import build_fingerprint
from dpocli.artifacts.run_dir import RunDirectory
from dpocli.commands.tiles import TileEncoder, judge_skips, writing_behind
from dpocli.config.models import PrecomputeOptions
from dpocli.data.encode import Encoder
from dpocli.data.preference import EncodedPair
from dpocli.data.sources import Rows, open_rows
from dpocli.engine.exactness import PairsInMemory, sample, settle, window_of
from dpocli.engine.mesh import Processes, launched, pick_device
from dpocli.engine.model import (
    dtype_name,
    environment,
    load_model,
    load_tokenizer,
    locate_model,
    pick_dtype,
)
from dpocli.engine.passes import reference_logps, token_budget
from dpocli.engine.stop import StopFlag
from dpocli.engine.throughput import Throughput
from dpocli.errors import PreemptedError
from dpocli.objective.scoring import PairScorer
from dpocli.progress import Progress
from dpocli.terminal import Printer, Terminal

ROWS_THAT_DECIDE_TYPES = 1024
"""First rows of the data, from which every worker takes the types of the kept columns."""


def run(options: PrecomputeOptions, terminal: Terminal) -> None:
    """Fills this worker's share of the cache; tiles that are there already are not touched."""
    rank, num_ranks, _ = launched()
    device = pick_device(options.device)
    dtype = pick_dtype(options.dtype, device)
    model_directory = locate_model(options)
    tokenizer = load_tokenizer(model_directory, options)
    rows = open_rows(options)
    check_out(options.out, "precompute")
    with (
        RunDirectory(options.out, "precompute", rank=rank, shard=options.shard, say=terminal.say) as out,
        StopFlag() as stop,
    ):
        terminal.say(f"{rows.num_rows:,} rows; reference {options.model} in {dtype_name(dtype)} on {device}")
        writer = _open_cache(options, rows, model_directory, tokenizer, dtype, device, terminal)
        out.write_config(options)
        worker, num_workers = options.worker
        missing = writer.missing(worker + num_workers * rank, num_workers * num_ranks)
        tiles = TileEncoder(rows, Encoder(tokenizer, options), options, terminal)
        budget = token_budget(options.token_budget, device)

        @cache
        def reference() -> Reference:
            """Loaded when the first tile needs it: a cache that is complete costs no model."""
            model = load_model(model_directory, options, dtype, device)
            return Reference(PairScorer(model, token_budget=budget), options, writer, terminal)

        def go_on() -> None:
            """The open tile is thrown away: what counts is that the node is left in time."""
            if stop or out.stop_requested():
                raise PreemptedError(_stopped(writer))

        with (
            terminal.progress(sum(tile.num_rows for tile in missing), "precompute") as progress,
            writing_behind(writer) as parts,
        ):
            for tile, pairs, skipped in tiles.encode(missing):
                go_on()
                scored = reference().score(pairs, progress, go_on) if pairs else []
                parts.write(tile, scored, skipped)
                progress.update(advance=len(skipped))
        summary = _summary(options, writer, tiles)
        if reference.cache_info().currsize:
            summary["scoring"] = reference().throughput.summary()
        judge_skips(Counter(summary["skipped"]), rows.num_rows, options.max_skipped)
        out.write_summary(summary)
        terminal.result(summary, lambda printer: _render(printer, summary))


class Reference:
    """The frozen model, laid out the fastest way that is exact for it."""

    def __init__(self, scorer: PairScorer, options: PrecomputeOptions, writer: CacheWriter, terminal: Terminal) -> None:
        self.throughput = Throughput(scorer)
        self._scorer, self._options, self._writer, self._terminal = scorer, options, writer, terminal
        self._longest_tried = 0

    def score(
        self, pairs: Sequence[EncodedPair], progress: Progress, go_on: Callable[[], None]
    ) -> Sequence[EncodedPair]:
        """The pairs of a tile with their log-probs."""
        self._settle(pairs)
        with self.throughput.clock():
            return reference_logps(self._scorer, pairs, progress, go_on)

    def _settle(self, pairs: Sequence[EncodedPair]) -> None:
        """Once; and again where pairs come that reach further beyond what the model looks back over."""
        tile = PairsInMemory(pairs)
        longest, window = int(tile.lengths.max()), window_of(self._scorer)
        if self._longest_tried and not (window and longest > max(window, 1.25 * self._longest_tried)):
            return
        alone = Processes(0, 1, self._scorer.model.device)
        tried = sample(self._scorer, [tile], seed=0)
        settle(self._scorer, tried, self._options.scoring, alone, self._terminal.say)
        self._longest_tried = longest
        self._writer.inform(environment(self._scorer.model.device, self._scorer))


def _open_cache(
    options: PrecomputeOptions,
    rows: Rows,
    model_directory: Path,
    tokenizer: PreTrainedTokenizerBase,
    dtype: torch.dtype,
    device: torch.device,
    terminal: Terminal,
) -> CacheWriter:
    fingerprint = build_fingerprint(
        options,
        tokenizer=tokenizer,
        content=rows.content,
        total_rows=rows.num_rows,
        rows_per_part=options.rows_per_part,
        model_dir=model_directory,
        dtype=dtype_name(dtype),
        trust_remote_code=options.trust_remote_code,
        information=environment(device),
        hash_memory_path=options.out / ".hashes.json",
    )
    first_rows = (raw.fields for raw in rows.read(0, ROWS_THAT_DECIDE_TYPES) if raw.fields)
    kept = kept_types(first_rows, options.keep_columns)
    writer = CacheWriter(options.out, fingerprint, rows.num_rows, options.rows_per_part, kept, say=terminal.warn)
    writer.check()
    return writer


def _summary(options: PrecomputeOptions, writer: CacheWriter, tiles: TileEncoder) -> dict[str, Any]:
    """What the whole cache holds by now, whoever wrote it."""
    footers = list(writer.footers())
    counts = sum((Counter(footer.counts) for footer in footers), Counter())
    return {
        "out": str(options.out),
        "complete": len(footers) == len(writer.tiles),
        "parts": len(footers),
        "parts_total": len(writer.tiles),
        "rows": writer.total_rows,
        "pairs": sum(footer.num_pairs for footer in footers),
        "truncated": counts["truncated"],
        "tokens": counts["prompt_tokens"] + counts["chosen_tokens"] + counts["rejected_tokens"],
        "skipped": dict(sum((Counter(footer.skipped) for footer in footers), Counter())),
        "skipped_rows": [asdict(row) for footer in footers for row in footer.skipped_rows][:MAX_LISTED_SKIPS],
        "notices": dict(tiles.encoder.notices),
    }


def _render(printer: Printer, summary: Mapping[str, Any]) -> None:
    missing = summary["parts_total"] - summary["parts"]
    state = "complete" if not missing else f"{missing} of {summary['parts_total']} parts are missing (other workers')"
    printer.say(
        f"{summary['out']}: {summary['pairs']:,} pairs of {summary['rows']:,} rows, {summary['tokens']:,} tokens, "
        f"{summary['truncated']:,} pairs truncated; {state}."
    )
    for reason, count in summary["skipped"].items():
        printer.say(f"  {count:,} rows skipped: {reason}")
    for row in summary["skipped_rows"][:5]:
        detail = f" ({row['detail']})" if row["detail"] else ""
        printer.say(f"    {row['where']}: {row['reason']}{detail}")


def _stopped(writer: CacheWriter) -> str:
    there, total = writer.progress()
    return f"Stopped on request with {there} of {total} parts written. The same command line goes on from there."
