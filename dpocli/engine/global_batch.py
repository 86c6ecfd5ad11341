"""The log-probs of a global batch: filled pair by pair by whoever scores them, then known to all."""

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.data.batches import transfer
from dpocli.engine.mesh import Processes
from dpocli.objective.logps import PairLogps, Wanted


class GlobalBatch:
    """Rows for the pairs of a batch, in the batch's order, however they are dealt to processes and micro-batches.

    Args:
        positions: the pairs of the batch, shape (pairs,); no two are the same.
        wanted: the optional columns.
        processes: the same on every one of them.
    """

    def __init__(self, positions: NDArray[np.int64], wanted: Wanted, processes: Processes) -> None:
        self._processes = processes
        self._wanted = wanted
        self._order = np.argsort(positions)
        self._sorted = positions[self._order]
        # Float64 carries token counts exactly too.
        self._rows = torch.zeros(len(positions), len(wanted.names), dtype=torch.float64, device=processes.device)

    def places(self, positions: NDArray[np.int64]) -> torch.Tensor:
        """Where in the batch these pairs stand. Shape (some pairs,), int64."""
        places = self._order[np.searchsorted(self._sorted, positions)]
        return transfer(torch.from_numpy(places), self._processes.device)

    def put(self, positions: NDArray[np.int64], logps: PairLogps) -> None:
        """Fills in some pairs, which no other call and no other process fills in."""
        self._rows[self.places(positions)] = logps.matrix()

    def everywhere(self) -> PairLogps:
        """All pairs of the batch, on every process. To be called by all, once they have filled in theirs."""
        # A sum in which every row but one is zero is exact, and the same on all processes.
        return PairLogps.from_matrix(self._wanted, self._processes.sum(self._rows))
