"""The pairs that train and evaluate read: reference caches, or raw rows encoded on the spot."""

import shlex
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpocli.artifacts.cache_reader import PairStore
from dpocli.artifacts.cache_writer import CacheWriter
from dpocli.artifacts.destination import check_out
from dpocli.artifacts.fingerprint import build_fingerprint
from dpocli.commands.tiles import TileEncoder, judge_skips
from dpocli.config.models import EvaluateOptions, LossChoice, PrecomputeOptions, TrainOptions
from dpocli.data.encode import Encoder
from dpocli.data.sources import Rows, open_rows
from dpocli.engine.mesh import Processes
from dpocli.errors import CacheError, DataError, UsageError
from dpocli.options import options_of
from dpocli.terminal import Terminal

ROWS_PER_PART = 4096


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read, looked at before anything is written."""

    options: TrainOptions | EvaluateOptions
    tokenizer: PreTrainedTokenizerBase
    reference: PairStore | None
    """The cache of `--reference`."""
    rows: Rows | None
    """Those of `--data`."""
    held_out: PairStore | None
    """The cache of `--eval-reference`."""

    @classmethod
    def open(
        cls,
        options: TrainOptions | EvaluateOptions,
        loss: LossChoice,
        tokenizer: PreTrainedTokenizerBase,
        terminal: Terminal,
    ) -> "Inputs":
        """Opens what the options name, and tells what is worth knowing about the tokenizer.

        Raises:
            UsageError: there are no such files.
            DataError: there are no rows in them.
            CacheError: a cache is missing, incomplete, damaged, of another tokenizer or of another reference, or holds no
                log-probs although the loss needs them.
        """
        reference = _open_cache(options.reference, loss, tokenizer, terminal) if options.reference else None
        held_out = None
        if isinstance(options, TrainOptions) and options.eval_reference:
            held_out = _open_cache(options.eval_reference, loss, tokenizer, terminal)
            _refuse_empty(held_out)
            if reference is not None and reference.has_reference:
                reference.check_same_reference(held_out)
        rows = open_rows(options) if reference is None else None
        return cls(options, tokenizer, reference, rows, held_out)

    def pairs(self, scratch: Path, processes: Processes, terminal: Terminal) -> PairStore:
        """The pairs of `--reference`; or of `--data`, encoded under `scratch` first.

        Raises:
            DataError: rows cannot be read, or there is no pair to use.
        """
        store = self.reference
        if store is None:
            assert self.rows is not None
            store = _encoded(self.options, self.tokenizer, self.rows, scratch, processes, terminal)
        _refuse_empty(store)
        if isinstance(self.options, TrainOptions) and not store.weights.any():
            raise DataError(
                f"{store.directory}: all {len(store):,} pairs have weight 0, so nothing can be learned from them. Mend the "
                "field `weight` of the data, or leave it out."
            )
        return store


def check_inputs(options: TrainOptions | EvaluateOptions, loss: LossChoice, trained_from: str | None = None) -> None:
    """Raises UsageError where the loss cannot be computed from what is given, or `--out` holds something else."""
    check_out(options.out, "train" if isinstance(options, TrainOptions) else "evaluate")
    if options.reference:
        return
    if not options.data:
        raise UsageError("--reference: missing. Give the reference cache that `dpocli precompute` wrote.")
    if loss.spec.needs_reference:
        raise UsageError(
            f"--loss {loss.name} compares with a reference, and --data holds none. Score the rows once:\n\n"
            f"    {precompute_line(options, trained_from)}\n\n"
            "then give --reference reference/ instead of --data. (Losses that need no reference: "
            "dpo_reference_free, simpo.)"
        )


def precompute_line(options: TrainOptions | EvaluateOptions, trained_from: str | None = None) -> str:
    """The command that makes the cache of the rows that `options` name, read and encoded as they say.

    A model that dpocli trained is compared with the one that it was trained from.
    """
    values = options.model_dump(mode="json")
    values["model"] = trained_from or options.model
    words = ["dpocli", "precompute"]
    for option in options_of(PrecomputeOptions):
        value = "reference/" if option.field == "out" else values.get(option.field)
        if option.field not in options.model_fields_set or option.field in ("as_json", "scratch", "token_budget"):
            continue
        if option.is_switch:
            words += [option.flags[0 if value else 1]]
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [option.flag, str(item)]
    return shlex.join(words)


def _open_cache(directory: Path, loss: LossChoice, tokenizer: PreTrainedTokenizerBase, terminal: Terminal) -> PairStore:
    store = PairStore.open(directory)
    if notes := store.check_tokenizer(tokenizer):
        terminal.warn(f"Since {directory} was made: {'; '.join(notes)}. The cached pairs are used as they are.")
    if loss.spec.needs_reference and not store.has_reference:
        raise CacheError(
            f"The pairs of {directory} were encoded for training without a reference, and --loss {loss.name} compares with "
            "one. Score the rows: dpocli precompute --model REFERENCE --data prefs.jsonl --out CACHE"
        )
    return store


def _refuse_empty(store: PairStore) -> None:
    if not len(store):
        raise DataError(f"{store.directory} holds no pair: all {store.num_rows:,} rows were skipped. Give other data.")


def _encoded(
    options: TrainOptions | EvaluateOptions,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    scratch: Path,
    processes: Processes,
    terminal: Terminal,
) -> PairStore:
    fingerprint = build_fingerprint(
        options, tokenizer=tokenizer, content=rows.content, total_rows=rows.num_rows, rows_per_part=ROWS_PER_PART
    )
    # A scratch directory may be shared by runs on other rows: there, each set of pairs has a name of its own.
    directory = scratch / (f"pairs-{fingerprint.digest[:16]}" if options.scratch else "pairs")
    writer = CacheWriter(directory, fingerprint, rows.num_rows, ROWS_PER_PART, say=terminal.warn)
    writer.check()
    tiles = TileEncoder(rows, Encoder(tokenizer, options), options, terminal)
    for tile in writer.missing(processes.rank, processes.count):
        writer.write(tile, *tiles.encode(tile))
    processes.wait()
    store = PairStore.open(directory)
    judge_skips(store.skipped, store.num_rows, options.max_skipped)
    return store
