"""The gradient of a global batch, accumulated over micro-batches and processes."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.config.loss_expression import LossChoice
from dpocli.data.batch import transfer
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes
from dpocli.objective import losses
from dpocli.objective.batch_gradient import batch_gradient, with_gradient
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.scoring.passes import FILLER, score
from dpocli.scoring.token_logps import TokenLogps, pair_logps
from dpocli.training.policy import Policy


class GlobalBatch:
    """Log-probs of the pairs of a batch, in the batch's order, however they are dealt to processes and micro-batches.

    Args:
        positions: the pairs of the batch, shape (pairs,), all different.
        wanted: the optional columns.
        processes: the same on every one of them.
    """

    def __init__(self, positions: NDArray[np.int64], wanted: LogpColumns, processes: Processes) -> None:
        self._processes = processes
        self._wanted = wanted
        self._order = np.argsort(positions)
        self._sorted = positions[self._order]
        # Float64 carries token counts exactly too.
        self._rows = torch.zeros(len(positions), len(wanted.names), dtype=torch.float64, device=processes.device)

    def index(self, positions: NDArray[np.int64]) -> torch.Tensor:
        """Indices into the batch of the pairs at these positions. Shape (some pairs,), int64."""
        indices = self._order[np.searchsorted(self._sorted, positions)]
        return transfer(torch.from_numpy(indices), self._processes.device)

    def write(self, positions: NDArray[np.int64], logps: PairLogps) -> None:
        """Write the log-probs of some pairs. Every pair is written once, by one process."""
        self._rows[self.index(positions)] = logps.matrix()

    def all_gather(self) -> PairLogps:
        """Return all pairs of the batch. Collective: call it once all processes have written their pairs."""
        # A sum in which every row but one is zero is exact, and the same on all processes.
        return PairLogps.from_matrix(self._wanted, self._processes.sum(self._rows))


MicroBatch = tuple[NDArray[np.int64], list[EncodedPair]]
"""A micro-batch of this process: positions in the training pairs, and the pairs; empty where only others have some."""


@dataclass(frozen=True, slots=True)
class Step:
    """The pairs of one optimizer step."""

    number: int
    passes: Sequence[MicroBatch]
    """This process's micro-batches, as many as every other process has."""
    batch: GlobalBatch
    weights: Tensor
    """Weights of all pairs of the batch, in its order: shape (pairs,), float64."""

    @property
    def total_weight(self) -> Tensor:
        return self.weights.sum().clamp(min=1e-300)


@dataclass(frozen=True, slots=True)
class Gradients:
    """Adds the gradient of a batch's loss to the policy's parameters."""

    policy: Policy
    loss: LossChoice
    wanted: LogpColumns
    router_aux_loss_coef: float
    seed: int

    def accumulate(self, step: Step, states: losses.States) -> tuple[PairLogps, losses.States]:
        """Back-propagate the loss of a step.

        Returns:
            The log-probs of the whole batch, and the losses' states after it; the same on all processes.
        """
        if self.loss.is_whole_batch:
            return self._accumulate_coupled(step, states)
        for index, (mine, _) in enumerate(step.passes):
            tokens, logps = self._score(step, index)
            weights = step.weights[step.batch.index(mine)]
            loss = None
            if logps is not None:
                step.batch.write(mine, logps)
                loss = (weights * losses.compute(self.loss, logps).losses).sum() / step.total_weight
            self._backward(loss, tokens, weights.sum() / step.total_weight)
        return step.batch.all_gather(), states

    def _accumulate_coupled(self, step: Step, states: losses.States) -> tuple[PairLogps, losses.States]:
        """Back-propagate a loss in which a pair depends on the others of its batch.

        All pairs are scored without a graph first. Then the gradient with respect to their log-probs is known, and each
        micro-batch is scored again to carry its share of it to the weights. A batch that goes through the model in
        one piece is scored once.
        """
        in_one_piece = len(step.passes) == self.policy.processes.count == 1
        kept: list[tuple[TokenLogps, PairLogps | None]] = []
        for index, (mine, _) in enumerate(step.passes):
            with torch.set_grad_enabled(in_one_piece):
                tokens, live = self._score(step, index)
            if live is not None:
                step.batch.write(mine, live)
            if in_one_piece:
                kept.append((tokens, live))
        logps = step.batch.all_gather()
        states = losses.next_states(self.loss, logps, states)
        gradient = batch_gradient(self.loss, logps, step.weights, states)
        for index, (mine, _) in enumerate(step.passes):
            tokens, live = kept.pop() if in_one_piece else self._score(step, index)
            indices = step.batch.index(mine)
            my_gradient = {name: column[indices] for name, column in gradient.items()}
            loss = None if live is None else with_gradient(live, my_gradient)
            self._backward(loss, tokens, step.weights[indices].sum() / step.total_weight)
        return logps, states

    def _score(self, step: Step, index: int) -> tuple[TokenLogps, PairLogps | None]:
        """The live log-probs of a micro-batch; None for one without pairs, which goes through the model all the same."""
        self.policy.reduce_gradients_on_backward(index == len(step.passes) - 1)
        # What is random (dropout, where it is kept) is a function of the seed, the step, the process and the micro-batch,
        # so that a batch that is scored twice gives the same values twice.
        entropy = [self.seed, step.number, self.policy.processes.rank, index]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        _, pairs = step.passes[index]
        batch, tokens = score(self.policy.scorer, pairs or [FILLER])
        return tokens, pair_logps(tokens, batch, pairs, self.wanted) if pairs else None

    def _backward(self, loss: Tensor | None, tokens: TokenLogps, weight: Tensor) -> None:
        """Back-propagate a micro-batch's share of the batch's loss; `weight` is its share of the weights."""
        if loss is None:
            # Zero, but with a graph: the backward pass of the others waits for this process's part of it.
            loss = (tokens.chosen.sum() + tokens.rejected.sum()) * 0.0
        elif tokens.router_loss is not None:
            loss = loss + self.router_aux_loss_coef * tokens.router_loss * weight
        # The engine averages gradients over processes; this is the one place that undoes it.
        (loss * self.policy.processes.count).backward()  # type: ignore[no-untyped-call]
