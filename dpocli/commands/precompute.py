"""`dpocli precompute`: the frozen reference scores every pair, once."""

import os
import random
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing, nullcontext
from dataclasses import asdict, dataclass

import torch
from transformers import PreTrainedTokenizerBase

from dpocli.cache.fingerprint import build_fingerprint, compare
from dpocli.cache.reader import PairStore
from dpocli.cache.reuse import Reusable
from dpocli.cache.schema import Tile
from dpocli.cache.writer import CacheWriter, recorded_dtype
from dpocli.commands.encoding import BackgroundWriter, TileEncoder, background_writer, check_skips, types_of_kept
from dpocli.commands.precompute_report import add_data_report, estimate, render, render_estimate, summarize
from dpocli.commands.reference import Reference
from dpocli.config.commands import PrecomputeOptions
from dpocli.console.console import Console
from dpocli.console.progress import Progress
from dpocli.data.encoder import Encoder
from dpocli.data.sources import SourceRows, open_rows
from dpocli.distributed.launch import launched, pick_device
from dpocli.distributed.processes import Processes, init_processes
from dpocli.distributed.signals import StopFlag
from dpocli.errors import CacheError, DataError, PreemptedError, UsageError
from dpocli.model.hashing import HASH_MEMORY_NAME, HashMemory
from dpocli.model.identity import ModelFiles
from dpocli.model.load import dtype_name, pick_dtype
from dpocli.model.resolve import load_tokenizer, resolve_model
from dpocli.run.directory import RunDirectory
from dpocli.run.output_check import PART_PATTERN, check_out
from dpocli.scoring.scorer import environment


@dataclass(frozen=True, slots=True)
class PrecomputeJob:
    """What a command line means, before anything is written."""

    options: PrecomputeOptions
    console: Console
    dtype: torch.dtype
    model: ModelFiles
    tokenizer: PreTrainedTokenizerBase
    rows: SourceRows
    team: Processes
    """The processes that share one copy of the model with this one."""
    hash_memory: HashMemory

    @classmethod
    def resolve(cls, options: PrecomputeOptions, console: Console, processes: Processes) -> "PrecomputeJob":
        """Find the model, its tokenizer and the rows.

        Raises:
            DpoError: one of them is missing or wrong, or `--out` holds something else.
        """
        dtype = pick_dtype(options.model.dtype, processes.device, recorded=recorded_dtype(options.out))
        model = resolve_model(options.model)
        tokenizer = load_tokenizer(model, options.model)
        rows, team = open_rows(options.data), processes.team(options.model.shards)
        check_out(options.out, "precompute")
        hash_memory = HashMemory(options.out / HASH_MEMORY_NAME)
        return cls(options, console, dtype, model, tokenizer, rows, team, hash_memory)

    def writer(self) -> CacheWriter:
        """The writer of the cache. Hashes the model."""
        options = self.options
        fingerprint = build_fingerprint(
            options.data,
            tokenizer=self.tokenizer,
            content=self.rows.content,
            total_rows=self.rows.num_rows,
            rows_per_part=options.rows_per_part,
            model=self.model,
            dtype=dtype_name(self.dtype),
            information=environment(self.team.device),
            hash_memory=self.hash_memory,
        )
        kept = types_of_kept(self.rows, options.data.keep_columns)
        return CacheWriter(options.out, fingerprint, kept, self.console)

    def reference(self, writer: CacheWriter) -> Reference:
        """The reference model, which is loaded when it is first needed."""
        reusable = Reusable.open(self.options.reuse, writer.fingerprint)
        return Reference(self.model, self.options, self.dtype, self.team, reusable, self.console)

    def encoder(self) -> Encoder:
        return Encoder(self.tokenizer, self.options.data)

    @property
    def worker(self) -> tuple[int, int]:
        """(index, count) of this worker: of the shard, and of the launcher's processes within it."""
        rank, num_ranks, _ = launched(self.options.launcher)
        shard, num_shards = self.options.worker
        return shard + num_shards * (rank // self.team.count), num_shards * (num_ranks // self.team.count)


class StopRequest:
    """Whether to stop: after a signal, or by the file OUT/stop. The processes of a team decide together."""

    def __init__(self, flag: StopFlag, out: RunDirectory, parts: BackgroundWriter, team: Processes) -> None:
        self._flag, self._out, self._parts, self._team = flag, out, parts, team

    def check(self) -> None:
        """Raise PreemptedError if asked to stop. The tile in work is discarded, so that the process ends soon."""
        self._parts.check()
        if self._team.any(bool(self._flag) or self._out.stop_requested()):
            self._parts.wait()  # so that the part before is counted
            written, total = self._parts.writer.progress()
            raise PreemptedError(
                f"Stopped on request with {written} of {total} parts written. Run the same command line to resume."
            )


def run(options: PrecomputeOptions, console: Console) -> None:
    """Write this worker's share of the cache; or estimate what that takes, or verify a finished cache."""
    device = pick_device(options.device, options.launcher)
    # Workers with a model of their own need no process group.
    alone = nullcontext(Processes(0, 1, device))
    with init_processes(device, options.launcher) if options.model.shards > 1 else alone as processes:
        job = PrecomputeJob.resolve(options, console, processes)
        if options.verify:
            _verify(job)
        elif options.dry_run:
            _estimate(job)
        elif _is_read_only(job):
            _confirm_complete(job)
        else:
            _fill(job)


def _fill(job: PrecomputeJob) -> None:
    """Write the missing parts. Existing ones are not changed."""
    options, console = job.options, job.console
    rank, _, _ = launched(options.launcher)
    directory = RunDirectory(
        options.out, "precompute", rank=rank, shard=options.shard, companions=True, say=console.say
    )
    with directory as out:
        console.say(
            f"{job.rows.num_rows:,} rows; reference {options.model.name} in {dtype_name(job.dtype)} on {job.team.device}"
        )
        writer = job.writer()
        if out.is_accepted:
            job.hash_memory.save()
        writer.check()
        writer.prepare()
        reference = job.reference(writer)
        # Until here there is nothing to save, and a signal ends the command at once.
        with StopFlag() as flag, background_writer(writer) as parts:
            out.write_config(options)
            job.hash_memory.save()
            stop = StopRequest(flag, out, parts, job.team)
            missing = _missing_tiles(job, writer, out, stop)
            tiles = TileEncoder(job.rows, job.encoder(), options.data, console)
            _score(job, missing, tiles, reference, parts, stop)
            summary = summarize(options.out, writer, tiles.encoder.notices, reference.figures())
            check_skips(Counter(summary["skipped"]), job.rows.num_rows, options.data.max_skipped)
            add_data_report(summary, writer)
            # The process that writes the last part finalizes the cache.
            out.write_summary(summary, from_any=summary["complete"])
            console.result(summary, lambda printer: render(printer, summary))


def _missing_tiles(job: PrecomputeJob, writer: CacheWriter, out: RunDirectory, stop: StopRequest) -> list[Tile]:
    """The tiles that this worker has to write, in the order in which it does."""
    index, count = job.worker
    missing = []
    for tile in writer.tiles[index::count]:
        if job.team.count == 1:  # a team takes the tiles of its first process, which the others wait for
            stop.check()
        if not writer.is_present(tile):
            missing.append(tile)
    if out.is_companion:
        # Others begin with the first tile: begin elsewhere, so as to meet them late.
        start = random.randrange(max(len(missing), 1))
        missing = missing[start:] + missing[:start]
        job.console.say("Another process is filling this cache too; parts that it writes meanwhile are left out.")
    return job.team.from_first(missing)


def _score(
    job: PrecomputeJob,
    missing: list[Tile],
    tiles: TileEncoder,
    reference: Reference,
    parts: BackgroundWriter,
    stop: StopRequest,
) -> None:
    """Encode, score and write tiles: the next is encoded and the one before written while one is scored."""
    with job.console.progress(sum(tile.num_rows for tile in missing), "precompute") as progress:
        # A team would have to agree on the tiles that other workers have written meanwhile.
        to_encode = _unwritten(missing, parts.writer, progress) if job.team.count == 1 else missing
        with closing(tiles.encode(to_encode)) as encoded:
            for tile, pairs, skipped in encoded:
                stop.check()
                completed = reference.complete(pairs, progress, stop.check)
                if job.team.is_first:
                    parts.write(tile, completed, skipped, reference.information)
                progress.update(advance=len(skipped))
        parts.wait()
    if splits := reference.num_splits:
        job.console.say(
            f"Memory ran out in {splits:,} {'pass' if splits == 1 else 'passes'}, made in two instead: the values are the "
            "same. A smaller --token-budget saves that time."
        )


def _unwritten(tiles: Iterable[Tile], writer: CacheWriter, progress: Progress) -> Iterator[Tile]:
    """The tiles that no other worker has written by the time that they are asked for."""
    for tile in tiles:
        if writer.is_present(tile):
            progress.update(advance=tile.num_rows)
        else:
            yield tile


def _is_read_only(job: PrecomputeJob) -> bool:
    """Whether `--out` holds parts, and this user may not write there."""
    out, by_effective_user = job.options.out, os.access in os.supports_effective_ids
    may_write = os.access(out, os.W_OK, effective_ids=by_effective_user)
    return job.team.from_first(any(out.glob(PART_PATTERN)) and not may_write)


def _confirm_complete(job: PrecomputeJob) -> None:
    """Report a complete cache in a directory that cannot be written.

    Raises:
        UsageError: parts are missing.
    """
    out, writer = job.options.out, job.writer()
    writer.check()
    if missing := writer.missing():
        raise UsageError(
            f"--out {out}: permission denied. The directory is read-only, and {len(missing)} of {len(writer.tiles)} parts are "
            "missing or damaged. Make it writable, or give another directory."
        )
    job.console.say(f"{out} is complete and read-only: nothing to do.")
    summary = summarize(out, writer, notices={}, figures={"reused": 0})
    add_data_report(summary, writer)
    job.console.result(summary, lambda printer: render(printer, summary))


def _estimate(job: PrecomputeJob) -> None:
    """`--dry-run`."""
    writer = job.writer()
    writer.check()
    missing = job.team.from_first(writer.missing(*job.worker))
    num_missing = sum(tile.num_rows for tile in missing)
    with job.console.progress(None, "probe") as progress:
        figures = estimate(
            job.rows, job.encoder(), job.options.data, writer, job.reference(writer), num_missing, progress
        )
    job.console.result(figures, lambda printer: render_estimate(printer, figures))
    if figures["stops"]:
        raise DataError(figures["stops"])


def _verify(job: PrecomputeJob) -> None:
    """`--verify`."""
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
