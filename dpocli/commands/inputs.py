"""The pairs that train and evaluate read: a reference cache, or raw rows encoded on the spot."""

import shlex
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpocli.artifacts.cache_reader import PairStore
from dpocli.artifacts.cache_writer import CacheWriter
from dpocli.artifacts.fingerprint import build_fingerprint
from dpocli.commands.tiles import TileEncoder
from dpocli.config.models import EvaluateOptions, LossChoice, TrainOptions
from dpocli.data.encode import Encoder
from dpocli.data.sources import open_rows
from dpocli.engine.mesh import Processes
from dpocli.errors import UsageError
from dpocli.terminal import Terminal

ROWS_PER_PART = 4096


def check_inputs(options: TrainOptions | EvaluateOptions, loss: LossChoice) -> None:
    """Raises UsageError where the loss cannot be computed from what is given."""
    if options.reference:
        return
    if not options.data:
        raise UsageError("--reference: missing. Give the reference cache that `dpocli precompute` wrote.")
    if loss.spec.needs_reference:
        data = " ".join(f"--data {shlex.quote(name)}" for name in options.data)
        raise UsageError(
            f"--loss {loss.name} compares with a reference, and --data holds none. Score the rows once:\n\n"
            f"    dpocli precompute --model {shlex.quote(options.model)} {data} --out reference/\n\n"
            "then give --reference reference/ instead of --data. (Losses that need no reference: "
            "dpo_reference_free, simpo.)"
        )


def open_pairs(
    options: TrainOptions | EvaluateOptions,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    processes: Processes,
    terminal: Terminal,
) -> PairStore:
    """The store of `--reference`, its tokenizer checked; or of `--data`, encoded under `scratch` first."""
    if options.reference:
        store = PairStore.open(options.reference)
        store.check_tokenizer(tokenizer)
        return store
    return _encoded(options, tokenizer, scratch / "pairs", processes, terminal)


def _encoded(
    options: TrainOptions | EvaluateOptions,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    processes: Processes,
    terminal: Terminal,
) -> PairStore:
    rows = open_rows(options)
    fingerprint = build_fingerprint(
        options, tokenizer=tokenizer, content=rows.content, total_rows=rows.num_rows, rows_per_part=ROWS_PER_PART
    )
    writer = CacheWriter(directory, fingerprint, rows.num_rows, ROWS_PER_PART)
    writer.check()
    tiles = TileEncoder(rows, Encoder(tokenizer, options), options, terminal)
    for tile in writer.missing(processes.rank, processes.count):
        writer.write(tile, *tiles.encode(tile))
    processes.wait()
    return PairStore.open(directory)
