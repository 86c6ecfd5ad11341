"""`dpocli precompute`: the frozen reference scores every pair, once."""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from dpocli.cache.data_report import triage
from dpocli.cache.fingerprint import build_fingerprint, compare
from dpocli.cache.reader import PairStore
from dpocli.cache.reuse import Reusable
from dpocli.cache.schema import MAX_LISTED_SKIPS, Tile
from dpocli.cache.writer import CacheWriter, recorded_dtype
from dpocli.commands import precompute_estimate
from dpocli.commands.encoding import TileEncoder, judge_skips, types_of_kept, writing_behind
from dpocli.commands.reference import Reference
from dpocli.config.commands import PrecomputeOptions
from dpocli.console.console import Console, Printer
from dpocli.data.encoder import Encoder
from dpocli.data.sources import SourceRows, open_rows
from dpocli.distributed.launch import launched, pick_device
from dpocli.distributed.processes import Processes, init_processes
from dpocli.distributed.signals import StopFlag
from dpocli.errors import CacheError, DataError, PreemptedError, mark_recorded
from dpocli.model.hashing import HASH_MEMORY_NAME, HashMemory
from dpocli.model.identity import ModelFiles
from dpocli.model.load import dtype_name, pick_dtype
from dpocli.model.resolve import load_tokenizer, resolve_model
from dpocli.run.directory import RunDirectory
from dpocli.run.output_check import check_out
from dpocli.scoring.scorer import environment


@dataclass(frozen=True, slots=True)
class PrecomputeJob:
    """What a command line comes to, before anything is written."""

    options: PrecomputeOptions
    console: Console
    device: torch.device
    dtype: torch.dtype
    model: ModelFiles
    tokenizer: PreTrainedTokenizerBase
    rows: SourceRows
    team: Processes
    """Those that share one copy of the model with this one."""

    @classmethod
    def of(cls, options: PrecomputeOptions, console: Console, everyone: Processes) -> "PrecomputeJob":
        device = everyone.device
        dtype = pick_dtype(options.model.dtype, device, recorded=recorded_dtype(options.out))
        model = resolve_model(options.model)
        tokenizer = load_tokenizer(model, options.model)
        job = cls(
            options,
            console,
            device,
            dtype,
            model,
            tokenizer,
            open_rows(options.data),
            everyone.team(options.model.shards),
        )
        check_out(options.out, "precompute")
        return job

    def writer(self) -> CacheWriter:
        """Of the cache; nothing of it is opened yet."""
        options = self.options
        fingerprint = build_fingerprint(
            options.data,
            tokenizer=self.tokenizer,
            content=self.rows.content,
            total_rows=self.rows.num_rows,
            rows_per_part=options.rows_per_part,
            model=self.model,
            dtype=dtype_name(self.dtype),
            information=environment(self.device),
            hash_memory=HashMemory(options.out / HASH_MEMORY_NAME, is_kept=not (options.dry_run or options.verify)),
        )
        kept = types_of_kept(self.rows, options.data.keep_columns)
        say = self.console.warn
        return CacheWriter(options.out, fingerprint, self.rows.num_rows, options.rows_per_part, kept, say=say)

    def reference(self, writer: CacheWriter) -> Reference:
        """Loads nothing yet."""
        reusable = Reusable.open(self.options.reuse, writer.fingerprint)
        say = self.console.say
        return Reference(self.model, self.options, self.dtype, self.team, reusable, writer.inform, say)

    def missing(self, writer: CacheWriter, between: Callable[[], None] = lambda: None) -> list[Tile]:
        """The tiles that this worker has to make. `between` is called before each is looked at."""
        rank, num_ranks, _ = launched(self.options.launcher)
        worker, num_workers = self.options.worker
        index, count = rank // self.team.count, num_ranks // self.team.count
        mine = writer.missing(worker + num_workers * index, num_workers * count, between)
        return self.team.from_first(mine)


def run(options: PrecomputeOptions, console: Console) -> None:
    """Fills this worker's share of the cache, or only looks: at what that would take, or at what a finished one holds."""
    device = pick_device(options.device, options.launcher)
    # Processes that do not share a model need not know of each other.
    apart = nullcontext(Processes(0, 1, device))
    with init_processes(device, options.launcher) if options.model.shards > 1 else apart as everyone:
        job = PrecomputeJob.of(options, console, everyone)
        if not (options.verify or options.dry_run):
            return _fill(job)
        try:
            _verify(job) if options.verify else _estimate(job)
        except BaseException as error:
            mark_recorded(error)  # who only looks leaves no trace
            raise


def _fill(job: PrecomputeJob) -> None:
    """Tiles that are there already are not touched."""
    options, console = job.options, job.console
    rank, _, _ = launched(options.launcher)
    with ExitStack() as stack:
        out = stack.enter_context(
            RunDirectory(options.out, "precompute", rank=rank, shard=options.shard, companions=True, say=console.say)
        )
        console.say(
            f"{job.rows.num_rows:,} rows; reference {options.model.name} in {dtype_name(job.dtype)} on {job.device}"
        )
        writer = job.writer()  # hashes the model; until here there is nothing to save, and a signal ends it at once
        writer.check()
        reference = job.reference(writer)
        stop = stack.enter_context(StopFlag())
        out.write_config(options)

        def heed_stop(finish: Callable[[], None] = lambda: None) -> None:
            if job.team.any(bool(stop) or out.stop_requested()):
                finish()
                raise PreemptedError(_stopped(writer))

        missing = job.missing(writer, heed_stop if job.team.count == 1 else lambda: None)
        if out.is_companion:
            # Others begin at the beginning; whoever starts elsewhere meets them late.
            start = random.randrange(max(len(missing), 1))
            missing = missing[start:] + missing[:start]
            console.say("Another process is filling this cache too; parts that it writes meanwhile are left out.")
        missing = job.team.from_first(missing)
        tiles = TileEncoder(job.rows, Encoder(job.tokenizer, options.data), options.data, console)

        with (
            console.progress(sum(tile.num_rows for tile in missing), "precompute") as progress,
            writing_behind(writer) as parts,
        ):

            def check_stop() -> None:
                """The open tile is thrown away: what counts is that the node is left in time."""
                parts.check()
                heed_stop(parts.wait)  # so that the part before is counted

            still_missing: Iterable[Tile] = missing
            if job.team.count == 1:  # a team would have to agree on each
                still_missing = _unless_present(missing, writer, lambda tile: progress.update(advance=tile.num_rows))
            with closing(tiles.encode(still_missing)) as encoded:
                for tile, pairs, skipped in encoded:
                    check_stop()
                    complete = reference.complete(pairs, progress, check_stop)
                    if job.team.is_first:
                        parts.write(tile, complete, skipped)
                    progress.update(advance=len(skipped))
        summary = _summary(options, writer, tiles) | reference.figures()
        if splits := reference.num_splits:
            console.say(
                f"Memory ran out in {splits:,} {'pass' if splits == 1 else 'passes'}, made in two instead: the values are the "
                "same. A smaller --token-budget saves that time."
            )
        judge_skips(Counter(summary["skipped"]), job.rows.num_rows, options.data.max_skipped)
        if summary["complete"] and summary["pairs"]:
            summary["triage"] = triage(PairStore.open(options.out, first=writer.tiles[0].file_name)).to_json()
        # Whoever writes the last part has the last word, whether it is the first process or not.
        out.write_summary(summary, from_any=summary["complete"])
        console.result(summary, lambda printer: _render(printer, summary))


def _unless_present(tiles: Iterable[Tile], writer: CacheWriter, skip: Callable[[Tile], None]) -> Iterator[Tile]:
    """Each tile, unless another worker has made it by the time that it is asked for."""
    for tile in tiles:
        if writer.is_present(tile):
            skip(tile)
        else:
            yield tile


def _estimate(job: PrecomputeJob) -> None:
    writer = job.writer()
    writer.check_parts()
    left = sum(tile.num_rows for tile in job.missing(writer))
    encoder = Encoder(job.tokenizer, job.options.data)
    with job.console.progress(None, "probe") as progress:
        figures = precompute_estimate.estimate(
            job.rows, encoder, job.options.data, writer, job.reference(writer), left, progress
        )
    job.console.result(figures, lambda printer: precompute_estimate.render(printer, figures))
    if figures["stops"]:
        raise DataError(figures["stops"])


def _verify(job: PrecomputeJob) -> None:
    options = job.options
    assert options.verify
    writer, store = job.writer(), PairStore.open(options.out)
    if differences := compare(store.fingerprint, writer.fingerprint):
        raise CacheError(
            f"--verify: the cache {options.out} was made with other settings than these ({'; '.join(differences)}). Give those "
            "that it was made with."
        )
    with job.console.progress(min(options.verify, len(store)), "verify") as progress:
        found = job.reference(writer).verify(store, options.verify, progress)
    figures = {"out": str(options.out), "verified": asdict(found)}
    job.console.result(figures, lambda printer: printer.say(f"{options.out} holds what this model gives: {found}."))


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
    if summary["reused"]:
        printer.say(f"  {summary['reused']:,} pairs taken over from --reuse")
    for reason, count in summary["skipped"].items():
        printer.say(f"  {count:,} rows skipped: {reason}")
    for row in summary["skipped_rows"][:5]:
        detail = f" ({row['detail']})" if row["detail"] else ""
        printer.say(f"    {row['where']}: {row['reason']}{detail}")
    if found := summary.get("triage"):
        _render_triage(printer, found)


def _render_triage(printer: Printer, found: Mapping[str, Any]) -> None:
    printer.say(
        f"The reference prefers the chosen side in {found['reference_accuracy']:.1%} of the pairs; the longer side is the "
        f"chosen one in {found['pick_the_longer_accuracy']:.1%} (median difference {found['median_length_difference']:+,.0f} tokens)."
    )
    for finding in found["findings"]:
        rows = ", ".join(map(str, finding["rows"][:8])) + (", …" if finding["count"] > 8 else "")
        printer.say(f"  {finding['count']:,} {finding['name']}: source rows {rows} ({finding['meaning']})")


def _stopped(writer: CacheWriter) -> str:
    there, total = writer.progress()
    return f"Stopped on request with {there} of {total} parts written. The same command line goes on from there."
