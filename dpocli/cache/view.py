"""Some pairs of a store, addressed by position."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpocli.cache.reader import PairStore
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair

ROWS_NAMED = 10
"""Source rows that a message lists."""


@dataclass(frozen=True, slots=True)
class PairView:
    """Some pairs of a store: the training pairs, or the held-out ones."""

    store: PairStore
    members: NDArray[np.int64]
    """Positions in the store, shape (pairs,)."""

    def __len__(self) -> int:
        return len(self.members)

    def at(self, positions: NDArray[np.int64]) -> "PairView":
        """The pairs at these positions of the view."""
        return PairView(self.store, self.members[positions])

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of prompt + the longer side, shape (pairs,)."""
        return self.store.pair_lengths[self.members]

    def sizes(self, layout: Layout) -> NDArray[np.int64]:
        """Tokens of each pair in a layout, shape (pairs,)."""
        columns = self.store.columns
        parts = (columns.prompt_tokens, columns.chosen_tokens, columns.rejected_tokens)
        prompt, chosen, rejected = (counts[self.members].astype(np.int64) for counts in parts)
        return layout.size(prompt, chosen, rejected)

    @property
    def num_tokens(self) -> NDArray[np.int64]:
        """Distinct tokens of each pair, shape (pairs,)."""
        return self.sizes(Layout.SHARED)

    @property
    def weights(self) -> NDArray[np.float64]:
        """Weight of each pair in the loss, shape (pairs,)."""
        return self.store.weights[self.members].astype(np.float64)

    def load(self, positions: Sequence[int] | NDArray[np.int64]) -> list[EncodedPair]:
        """The pairs at these positions of the view, in this order."""
        return self.store.load(self.members[np.asarray(positions, dtype=np.int64)])

    def describe_rows(self, positions: NDArray[np.int64]) -> str:
        """The source rows of the pairs at these positions, for a message."""
        rows = np.sort(self.store.columns.rows[self.members[positions]])
        more = f" and {len(rows) - ROWS_NAMED:,} more" if len(rows) > ROWS_NAMED else ""
        return f"the pairs of source rows {', '.join(map(str, rows[:ROWS_NAMED])) or '?'}{more}"
