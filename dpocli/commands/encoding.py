"""Source rows tile by tile into a store of encoded pairs: what precompute does with a reference, and training on raw
data without one."""

import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice

from dpocli.cache.schema import KeptType, Tile, kept_types
from dpocli.cache.writer import CacheWriter
from dpocli.config.options import DataOptions
from dpocli.console.console import Console
from dpocli.data.encoder import Encoder, encode_rows
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.data.sources import SourceRows
from dpocli.errors import DataError

Encoded = tuple[Tile, list[EncodedPair], list[Skipped]]

ROWS_THAT_DECIDE_TYPES = 1024
"""First rows of the data, from which every worker takes the types of the kept columns."""


class TileEncoder:
    """Encodes tiles, tells each thing worth knowing once, and stops where too many rows give no pair."""

    def __init__(self, rows: SourceRows, encoder: Encoder, options: DataOptions, console: Console) -> None:
        self.rows = rows
        self.encoder = encoder
        self.options = options
        self.console = console
        self._told: set[str] = set()
        self._is_over = threading.Event()
        self._skipped: Counter[str] = Counter()

    def encode(self, tiles: Iterable[Tile]) -> Generator[Encoded, None, None]:
        """The pairs of each tile, and the rows that gave none; the next tile is encoded while one is in use.

        The tiles are asked for one by one, each just before it is encoded. Whoever leaves early closes the iterator, or
        the tile in the background is still encoded to its end.

        Raises:
            DataError: a row cannot be read, or more rows than `--max-skipped` allows are certain to be skipped.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as ahead, self._until_over():
            left = iter(tiles)
            upcoming = [ahead.submit(self._encode, tile) for tile in islice(left, 1)]
            while upcoming:
                encoded, notices = upcoming.pop().result()
                upcoming += [ahead.submit(self._encode, tile) for tile in islice(left, 1)]
                self._tell(notices)
                _, _, skipped = encoded
                self._skipped.update(str(row.reason) for row in skipped)
                judge_skips(self._skipped, self.rows.num_rows, self.options.max_skipped, skipped)
                yield encoded

    def _encode(self, tile: Tile) -> tuple[Encoded, list[str]]:
        results = []
        for result in encode_rows(self.rows, self.encoder, self.options, tile.start, tile.stop):
            if self._is_over.is_set():
                raise CancelledError
            results.append(result)
        pairs = [result for result in results if isinstance(result, EncodedPair)]
        skipped = [result for result in results if isinstance(result, Skipped)]
        return (tile, pairs, skipped), list(self.encoder.notices)

    @contextmanager
    def _until_over(self) -> Iterator[None]:
        """Whoever leaves does not wait for a tile that nobody will use."""
        try:
            yield
        finally:
            self._is_over.set()

    def _tell(self, notices: Sequence[str]) -> None:
        for notice in notices:
            if notice not in self._told:
                self.console.warn(notice)
                self._told.add(notice)


class PartsBehind:
    """Writes parts in the background, one at a time, while the next tile is scored. Made by `writing_behind`."""

    def __init__(self, writer: CacheWriter, pool: ThreadPoolExecutor) -> None:
        self._writer, self._pool = writer, pool
        self._last: Future[None] | None = None

    def write(self, tile: Tile, pairs: Sequence[EncodedPair], skipped: Sequence[Skipped]) -> None:
        """Returns at once. Errors are those of `CacheWriter.write`, of the part before."""
        self.wait()
        self._last = self._pool.submit(self._writer.write, tile, pairs, skipped)

    def wait(self) -> None:
        """Until everything that was given is on the disk."""
        if self._last:
            self._last.result()

    def check(self) -> None:
        """Raises what the part before has raised, if it has by now."""
        if self._last and self._last.done():
            self._last.result()


@contextmanager
def writing_behind(writer: CacheWriter) -> Iterator[PartsBehind]:
    """At the end everything is on the disk, or an error says what is not."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as pool:
        parts = PartsBehind(writer, pool)
        yield parts
        parts.wait()


def judge_skips(skipped: Counter[str], num_rows: int, max_skipped: float, examples: Sequence[Skipped] = ()) -> None:
    """Raises DataError where more rows were skipped than may be, or all of them."""
    if fault := fault_of_skips(skipped, num_rows, max_skipped, examples):
        raise DataError(fault)


def fault_of_skips(
    skipped: Counter[str], num_rows: int, max_skipped: float, examples: Sequence[Skipped] = ()
) -> str | None:
    """Why so many skipped rows stop a run; None where they do not."""
    total = skipped.total()
    if total <= max_skipped * num_rows and total < num_rows:
        return None
    reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.most_common())
    allowed = "no pair is left" if total == num_rows else f"--max-skipped allows {max_skipped:.0%}"
    otherwise = "" if total == num_rows else ", or raise --max-skipped"
    return (
        f"{total:,} of {num_rows:,} rows give no pair ({reasons}); {allowed}.{_first_of(examples)} Mend the data (or raise "
        f"--max-length if pairs are too long){otherwise}."
    )


def _first_of(examples: Sequence[Skipped]) -> str:
    if not examples:
        return ""
    first = examples[0]
    detail = first.detail.removeprefix(f"{first.where}: ").removesuffix(".")
    return f" The first: {first.where}: {first.reason}" + (f" ({detail})." if detail else ".")


def types_of_kept(rows: SourceRows, names: Sequence[str]) -> dict[str, KeptType]:
    """Of the columns of `--keep-columns`."""
    return kept_types((raw.fields for raw in rows.read(0, ROWS_THAT_DECIDE_TYPES) if raw.fields), names)
