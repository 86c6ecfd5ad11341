"""The pairs that train and evaluate read: reference caches, or raw rows encoded on the spot."""

import shlex
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from dpocli.cache.fingerprint import Fingerprint, build_fingerprint
from dpocli.cache.reader import PairStore
from dpocli.cache.view import PairView
from dpocli.cache.writer import CacheWriter
from dpocli.commands.encoding import TileEncoder, judge_skips, types_of_kept, writing_behind
from dpocli.config.commands import EvaluateOptions, PrecomputeOptions, TrainOptions
from dpocli.config.flags import given_keys, options_of, values_of
from dpocli.config.loss_expression import LossChoice
from dpocli.config.losses import CATALOGUE
from dpocli.console.console import Console
from dpocli.data.encoder import Encoder
from dpocli.data.sources import SourceRows, open_rows
from dpocli.distributed.processes import Processes
from dpocli.errors import CacheError, DataError, UsageError
from dpocli.run.output_check import check_out

ROWS_PER_PART = 4096


@dataclass(frozen=True, slots=True)
class Inputs:
    """What is read, looked at before anything is written."""

    options: TrainOptions | EvaluateOptions
    tokenizer: PreTrainedTokenizerBase
    reference: PairStore | None
    """The cache of `--reference`."""
    rows: SourceRows | None
    """Those of `--data`."""
    held_out: PairStore | None
    """The cache of `--eval-reference`."""

    @classmethod
    def open(
        cls,
        options: TrainOptions | EvaluateOptions,
        losses: Sequence[LossChoice],
        tokenizer: PreTrainedTokenizerBase,
        console: Console,
    ) -> "Inputs":
        """Opens what the options name, and tells what is worth knowing about the tokenizer.

        Raises:
            UsageError: there are no such files.
            DataError: there are no rows in them.
            CacheError: a cache is missing, incomplete, damaged, of another tokenizer or of another reference, or holds no
                log-probs although the loss needs them.
        """
        reference = _open_cache(options.reference, losses, tokenizer, console) if options.reference else None
        held_out = None
        if isinstance(options, TrainOptions) and options.held_out.reference:
            held_out = _open_cache(options.held_out.reference, losses, tokenizer, console)
            _refuse_empty(held_out)
            if reference is not None and reference.has_reference:
                reference.check_same_reference(held_out)
        rows = open_rows(options.data) if reference is None else None
        return cls(options, tokenizer, reference, rows, held_out)

    def pairs(
        self, scratch: Path, processes: Processes, console: Console, *, beside: PairStore | None = None
    ) -> PairStore:
        """The pairs of `--reference`; or of `--data`, encoded under `scratch` first.

        Args:
            scratch: where.
            processes: share the encoding.
            terminal: told of rows that are skipped.
            beside: what another model's tokenizer made of the same rows: taken where this one's makes the same, and not
                overwritten where it does not.

        Raises:
            DataError: rows cannot be read, or there is no pair to use.
        """
        store = self.reference
        if store is None:
            assert self.rows is not None
            store = _encoded(self.options, self.tokenizer, self.rows, scratch, processes, console, beside)
        _refuse_empty(store)
        if isinstance(self.options, TrainOptions) and not store.weights.any():
            raise DataError(
                f"{store.directory}: all {len(store):,} pairs have weight 0, so nothing can be learned from them. Mend the "
                "field `weight` of the data, or leave it out."
            )
        return store


def check_inputs(
    options: TrainOptions | EvaluateOptions, losses: Sequence[LossChoice], trained_from: str | None = None
) -> None:
    """Raises UsageError where a loss cannot be computed from what is given, or `--out` holds something else."""
    check_out(options.out, "train" if isinstance(options, TrainOptions) else "evaluate")
    if options.reference:
        return
    if not options.data.files:
        raise UsageError("--reference: missing. Give the reference cache that `dpocli precompute` wrote.")
    if needing := [loss.label for loss in losses if loss.needs_reference]:
        free = ", ".join(spec.name for spec in CATALOGUE.values() if not spec.needs_reference)
        raise UsageError(
            f"--loss {', '.join(needing)} compares with a reference, and --data holds none. Score the rows once:\n\n"
            f"    {precompute_line(options, trained_from)}\n\n"
            f"then give --reference reference/ instead of --data. (Losses that need no reference: {free}.)"
        )


def check_weights(loss: LossChoice, views: Sequence[PairView]) -> None:
    """Raises UsageError where pairs have weights, and the loss has no meaning for them."""
    weightless = [term.name for term in loss.terms if not term.spec.takes_weights]
    for view in views:
        if weightless and (weighted := (view.weights != 1).nonzero()[0]).size:
            row = view.load(weighted[:1])[0].row
            raise UsageError(
                f"--loss {loss.label}: {weightless[0]} compares pairs with each other by rank, and what a weight would mean "
                f"there is not defined; {len(weighted):,} pairs of {view.store.directory} have a weight other than 1, the first "
                f"in source row {row}. Take another loss, or leave the field `weight` out."
            )


def fingerprint_of_rows(
    options: TrainOptions | EvaluateOptions, tokenizer: PreTrainedTokenizerBase, rows: SourceRows
) -> Fingerprint:
    """Of the pairs that the rows of `--data` become, without encoding them."""
    return build_fingerprint(
        options.data, tokenizer=tokenizer, content=rows.content, total_rows=rows.num_rows, rows_per_part=ROWS_PER_PART
    )


def precompute_line(options: TrainOptions | EvaluateOptions, trained_from: str | None = None) -> str:
    """The command that makes the cache of the rows that `options` name, read and encoded as they say.

    A model that dpocli trained is compared with the one that it was trained from.
    """
    values, given = values_of(options), given_keys(options)
    values["out"] = "reference/"
    values["model"] = trained_from or (
        options.models[0] if isinstance(options, EvaluateOptions) else options.model.name
    )
    words = ["dpocli", "precompute"]
    for option in options_of(PrecomputeOptions):
        value = values.get(option.key)
        if option.key not in given or option.key in (
            "json",
            "dry_run",
            "scratch",
            "scoring",
            "token_budget",
        ):
            continue
        if option.is_switch:
            words += [option.flags[0 if value else 1]]
        else:
            for item in value if isinstance(value, list) else [value]:
                words += [option.flag, str(item)]
    return shlex.join(words)


def _open_cache(
    directory: Path, losses: Sequence[LossChoice], tokenizer: PreTrainedTokenizerBase, console: Console
) -> PairStore:
    store = PairStore.open(directory)
    if notes := store.check_tokenizer(tokenizer):
        console.warn(f"Since {directory} was made: {'; '.join(notes)}. The cached pairs are used as they are.")
    needing = [loss.label for loss in losses if loss.needs_reference]
    if needing and not store.has_reference:
        raise CacheError(
            f"The pairs of {directory} were encoded for training without a reference, and --loss {needing[0]} compares with "
            "one. Score the rows: dpocli precompute --model REFERENCE --data prefs.jsonl --out CACHE"
        )
    return store


def _refuse_empty(store: PairStore) -> None:
    if not len(store):
        raise DataError(f"{store.directory} holds no pair: all {store.num_rows:,} rows were skipped. Give other data.")


def _encoded(
    options: TrainOptions | EvaluateOptions,
    tokenizer: PreTrainedTokenizerBase,
    rows: SourceRows,
    scratch: Path,
    processes: Processes,
    console: Console,
    beside: PairStore | None,
) -> PairStore:
    fingerprint = fingerprint_of_rows(options, tokenizer, rows)
    if beside is not None and beside.fingerprint.digest == fingerprint.digest:
        return beside
    # A scratch directory may be shared by runs on other rows: there, each set of pairs has a name of its own.
    needs_name = options.data.scratch or beside is not None
    directory = scratch / (f"pairs-{fingerprint.digest[:16]}" if needs_name else "pairs")
    kept = types_of_kept(rows, options.data.keep_columns)
    writer = CacheWriter(directory, fingerprint, rows.num_rows, ROWS_PER_PART, kept, say=console.warn)
    writer.check()
    tiles = TileEncoder(rows, Encoder(tokenizer, options.data), options.data, console)
    missing = writer.missing(processes.rank, processes.count)
    with writing_behind(writer) as parts, closing(tiles.encode(missing)) as encoded:
        for tile in encoded:
            parts.write(*tile)
    processes.wait()
    store = PairStore.open(directory)
    judge_skips(store.skipped, store.num_rows, options.data.max_skipped)
    return store
