"""Source rows → encoded tiles → parts of a cache, with encoding and writing in background threads."""

import threading
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import Any

from dpocli.cache.kept_columns import KeptType, kept_types
from dpocli.cache.schema import Tile, cache_schema
from dpocli.cache.writer import CacheWriter
from dpocli.config.options import DataOptions
from dpocli.console.console import Console
from dpocli.data.encoder import Encoder
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.data.sources import SourceRows
from dpocli.errors import DataError

EncodedTile = tuple[Tile, list[EncodedPair], list[Skipped]]

ROWS_THAT_DECIDE_TYPES = 1024
"""First rows of the data, from which every worker infers the types of the kept columns."""


class TileEncoder:
    """Encodes tiles, prints each notice once, and stops where too many rows give no pair."""

    def __init__(self, rows: SourceRows, encoder: Encoder, options: DataOptions, console: Console) -> None:
        self.rows = rows
        self.encoder = encoder
        self.options = options
        self.console = console
        self._printed: set[str] = set()
        self._is_closed = threading.Event()
        self._skipped: Counter[str] = Counter()

    def encode(self, tiles: Iterable[Tile]) -> Generator[EncodedTile, None, None]:
        """The pairs of each tile, and the rows that gave none. The next tile is encoded while one is in use.

        Each tile is taken from `tiles` just before it is encoded. Close the generator to leave early; then the tile in
        the background is abandoned.

        Raises:
            DataError: a row cannot be read, or more rows than `--max-skipped` allows are skipped.
        """
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="encode") as pool, self._abandoning():
            remaining = iter(tiles)
            upcoming = [pool.submit(self._encode, tile) for tile in islice(remaining, 1)]
            while upcoming:
                encoded, notices = upcoming.pop().result()
                upcoming += [pool.submit(self._encode, tile) for tile in islice(remaining, 1)]
                self._print(notices)
                _, _, skipped = encoded
                self._skipped.update(str(row.reason) for row in skipped)
                check_skips(self._skipped, self.rows.num_rows, self.options.max_skipped, skipped)
                yield encoded

    def _encode(self, tile: Tile) -> tuple[EncodedTile, list[str]]:
        results = []
        for result in self.encoder.encode_rows(self.rows, tile.start, tile.stop):
            if self._is_closed.is_set():
                raise CancelledError
            results.append(result)
        pairs = [result for result in results if isinstance(result, EncodedPair)]
        skipped = [result for result in results if isinstance(result, Skipped)]
        return (tile, pairs, skipped), list(self.encoder.notices)

    @contextmanager
    def _abandoning(self) -> Iterator[None]:
        """Abandon the tile in the background at the end."""
        try:
            yield
        finally:
            self._is_closed.set()

    def _print(self, notices: Sequence[str]) -> None:
        for notice in notices:
            if notice not in self._printed:
                self.console.warn(notice)
                self._printed.add(notice)


class BackgroundWriter:
    """Writes parts one at a time in a background thread. Made by `background_writer`."""

    def __init__(self, writer: CacheWriter, pool: ThreadPoolExecutor) -> None:
        self.writer = writer
        self._pool = pool
        self._last: Future[None] | None = None

    def write(
        self,
        tile: Tile,
        pairs: Sequence[EncodedPair],
        skipped: Sequence[Skipped],
        information: Mapping[str, Any] | None = None,
    ) -> None:
        """Start to write a part, after the one before. Raises the errors of `CacheWriter.write` for the part before.

        `information` about how the pairs were scored goes into the fingerprint of this part.
        """
        self.wait()
        if information is not None:
            self.writer.set_information(information)
        self._last = self._pool.submit(self.writer.write, tile, pairs, skipped)

    def wait(self) -> None:
        """Wait until all parts are on disk."""
        if self._last:
            self._last.result()

    def check(self) -> None:
        """Raise the error of the last part, if it has failed by now."""
        if self._last and self._last.done():
            self._last.result()


@contextmanager
def background_writer(writer: CacheWriter) -> Iterator[BackgroundWriter]:
    """A background writer; at the end all parts are on disk, or an error is raised."""
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="write") as pool:
        parts = BackgroundWriter(writer, pool)
        yield parts
        parts.wait()


def check_skips(skipped: Counter[str], num_rows: int, max_skipped: float, examples: Sequence[Skipped] = ()) -> None:
    """Raise DataError if all rows were skipped, or more than `--max-skipped` allows."""
    if problem := problem_of_skips(skipped, num_rows, max_skipped, examples):
        raise DataError(problem)


def problem_of_skips(
    skipped: Counter[str], num_rows: int, max_skipped: float, examples: Sequence[Skipped] = ()
) -> str | None:
    """Why the skipped rows stop a run; None if they do not."""
    total = skipped.total()
    if total <= max_skipped * num_rows and total < num_rows:
        return None
    reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.most_common())
    allowed = "no pair is left" if total == num_rows else f"--max-skipped allows {max_skipped:.0%}"
    otherwise = "" if total == num_rows else ", or raise --max-skipped"
    return (
        f"{total:,} of {num_rows:,} rows give no pair ({reasons}); {allowed}.{_first_of(examples)} Fix the data (or raise "
        f"--max-length if pairs are too long){otherwise}."
    )


def _first_of(examples: Sequence[Skipped]) -> str:
    if not examples:
        return ""
    first = examples[0]
    detail = first.detail.removeprefix(f"{first.where}: ").removesuffix(".")
    return f" The first: {first.where}: {first.reason}" + (f" ({detail})." if detail else ".")


def types_of_kept(rows: SourceRows, names: Sequence[str]) -> dict[str, KeptType]:
    """The types of the columns of `--keep-columns`.

    Raises:
        UsageError: one has the name of a column of the cache.
    """
    kept = kept_types((raw.fields for raw in rows.read(0, ROWS_THAT_DECIDE_TYPES) if raw.fields), names)
    cache_schema(kept)
    return kept
