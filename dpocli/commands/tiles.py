"""Source rows tile by tile into a store of encoded pairs: what precompute does with a reference, and training on raw
data without one."""

from collections import Counter
from collections.abc import Sequence

from dpocli.artifacts.cache_format import Tile
from dpocli.config.models import DataOptions
from dpocli.data.encode import Encoder, encode_rows
from dpocli.data.preference import EncodedPair, Skipped
from dpocli.data.sources import Rows
from dpocli.errors import DataError
from dpocli.terminal import Terminal


class TileEncoder:
    """Encodes tiles, tells each thing worth knowing once, and stops where too many rows give no pair."""

    def __init__(self, rows: Rows, encoder: Encoder, options: DataOptions, terminal: Terminal) -> None:
        self.rows = rows
        self.encoder = encoder
        self.options = options
        self.terminal = terminal
        self._told: set[str] = set()
        self._skipped: Counter[str] = Counter()

    def encode(self, tile: Tile) -> tuple[list[EncodedPair], list[Skipped]]:
        """The pairs of a tile and the rows that gave none.

        Raises:
            DataError: a row cannot be read, or more rows than `--max-skipped` allows are certain to be skipped.
        """
        results = list(encode_rows(self.rows, self.encoder, self.options, tile.start, tile.stop))
        pairs = [result for result in results if isinstance(result, EncodedPair)]
        skipped = [result for result in results if isinstance(result, Skipped)]
        self._tell_notices()
        self._skipped.update(str(row.reason) for row in skipped)
        judge_skips(self._skipped, self.rows.num_rows, self.options.max_skipped, skipped)
        return pairs, skipped

    def _tell_notices(self) -> None:
        for notice in self.encoder.notices.keys() - self._told:
            self.terminal.warn(notice)
            self._told.add(notice)


def judge_skips(skipped: Counter[str], num_rows: int, max_skipped: float, examples: Sequence[Skipped] = ()) -> None:
    """Raises DataError where more rows were skipped than may be, or all of them."""
    total = skipped.total()
    if total <= max_skipped * num_rows and total < num_rows:
        return
    reasons = "; ".join(f"{count} × {reason}" for reason, count in skipped.most_common())
    allowed = "no pair is left" if total == num_rows else f"--max-skipped allows {max_skipped:.0%}"
    otherwise = "" if total == num_rows else ", or raise --max-skipped"
    raise DataError(
        f"{total:,} of {num_rows:,} rows give no pair ({reasons}); {allowed}.{_first_of(examples)} Mend the data (or raise "
        f"--max-length if pairs are too long){otherwise}."
    )


def _first_of(examples: Sequence[Skipped]) -> str:
    if not examples:
        return ""
    first = examples[0]
    detail = first.detail.removeprefix(f"{first.where}: ").removesuffix(".")
    return f" The first: {first.where}: {first.reason}" + (f" ({detail})." if detail else ".")
