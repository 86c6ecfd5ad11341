"""The log-probs of a global batch: filled pair by pair by whoever scores them, then known to all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.config.loss_expression import LossChoice
from dpocli.data.batch import transfer
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes
from dpocli.errors import brief_message
from dpocli.objective import losses
from dpocli.objective.batch_gradient import batch_gradient, with_gradient
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.scoring.passes import FILLER, score
from dpocli.scoring.token_logps import TokenLogps, pair_logps
from dpocli.training.policy import Policy
from dpocli.training.shortage import Shortage, throw_away_gradients


class GlobalBatch:
    """Rows for the pairs of a batch, in the batch's order, however they are dealt to processes and micro-batches.

    Args:
        positions: the pairs of the batch, shape (pairs,); no two are the same.
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


MicroBatch = tuple[NDArray[np.int64], list[EncodedPair]]
"""A micro-batch of this process: positions in the training pairs, and the pairs; empty where only others have some."""


@dataclass(frozen=True, slots=True)
class Step:
    """One optimizer step's worth of pairs."""

    number: int
    passes: Sequence[MicroBatch]
    """This process's micro-batches, as many as every other process has."""
    batch: GlobalBatch
    weights: Tensor
    """Of all pairs of the batch, in its order: shape (pairs,), float64."""
    shortage: Shortage = field(default_factory=Shortage)

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
    processes: Processes

    def accumulate(self, step: Step, states: losses.States) -> tuple[PairLogps, losses.States]:
        """Back-propagates the loss of a step.

        Returns:
            The log-probs of the whole batch, and what the losses remember once it is counted in; the same on all
            processes.
        """
        if self.loss.is_whole_batch:
            return self._from_the_whole(step, states)

        def learn(index: int) -> None:
            mine, _ = step.passes[index]
            tokens, logps = self._score(step, index)
            weights = step.weights[step.batch.places(mine)]
            loss = None
            if logps is not None:
                step.batch.put(mine, logps)
                loss = (weights * losses.compute(self.loss, logps).losses).sum() / step.total_weight
            self._backward(step, index, loss, tokens, weights.sum() / step.total_weight)

        self._each_pass(step, learn)
        return step.batch.everywhere(), states

    def _from_the_whole(self, step: Step, states: losses.States) -> tuple[PairLogps, losses.States]:
        """Where the loss of a pair depends on the others.

        All pairs are scored without a graph first. Then the gradient with respect to their log-probs is known, and each
        micro-batch is scored again to carry its share of it to the weights. A batch that goes through the model in
        one piece is scored once.
        """
        in_one_piece = len(step.passes) == self.processes.count == 1
        kept: list[tuple[TokenLogps, PairLogps | None]] = []

        def look(index: int) -> None:
            with torch.set_grad_enabled(in_one_piece):
                tokens, live = self._score(step, index)
            if live is not None:
                step.batch.put(step.passes[index][0], live)
            if in_one_piece:
                kept.append((tokens, live))

        self._each_pass(step, look, exchanges=False)
        logps = step.batch.everywhere()
        states = losses.next_states(self.loss, logps, states)
        gradient = batch_gradient(self.loss, logps, step.weights, states)

        def learn(index: int) -> None:
            tokens, live = kept.pop() if in_one_piece else self._score(step, index)
            places = step.batch.places(step.passes[index][0])
            mine_gradient = {name: column[places] for name, column in gradient.items()}
            loss = None if live is None else with_gradient(live, mine_gradient)
            self._backward(step, index, loss, tokens, step.weights[places].sum() / step.total_weight)

        self._each_pass(step, learn)
        return logps, states

    def _each_pass(self, step: Step, work: Callable[[int], None], *, exchanges: bool = True) -> None:
        """Does `work` on every pass. After a shortage that can wait, nothing but what the other processes wait for."""
        for index in range(len(step.passes)):
            if step.shortage.found is None:
                try:
                    work(index)
                except Exception as error:
                    if not step.shortage.can_wait(error, self.policy):
                        raise
                    step.shortage.found = brief_message(error)
                else:
                    continue
                # Here, where the error no longer holds on to what the pass had allocated.
                throw_away_gradients(self.policy)
            if exchanges and index == len(step.passes) - 1:
                tokens, _ = self._score(step, index, filler=True)
                self._backward(step, index, None, tokens, step.total_weight)

    def _score(self, step: Step, index: int, *, filler: bool = False) -> tuple[TokenLogps, PairLogps | None]:
        """The live log-probs of a micro-batch; None for one without pairs, which goes through the model all the same."""
        self.policy.reduce_gradients_on_backward(index == len(step.passes) - 1)
        # What is random (dropout, where it is kept) is a function of the seed, the step, the process and the micro-batch,
        # so that a batch that is scored twice is the same twice.
        entropy = [self.seed, step.number, self.processes.rank, index]
        torch.manual_seed(int(np.random.SeedSequence(entropy).generate_state(1)[0]))
        pairs = [] if filler else step.passes[index][1]
        batch, tokens = score(self.policy.scorer, pairs or [FILLER])
        return tokens, pair_logps(tokens, batch, pairs, self.wanted) if pairs else None

    def _backward(self, step: Step, index: int, loss: Tensor | None, tokens: TokenLogps, weight: Tensor) -> None:
        """Back-propagates a micro-batch's share of the batch's loss; `weight` is its share of the weights."""
        if loss is None:
            # Zero, but with a graph: the backward pass of the others waits for this process's part of it.
            loss = (tokens.chosen.sum() + tokens.rejected.sum()) * 0.0
        elif tokens.router_loss is not None:
            loss = loss + self.router_aux_loss_coef * tokens.router_loss * weight
        step.shortage.exchanging = index == len(step.passes) - 1
        # The engine averages gradients over processes; this is the one place that undoes it.
        (loss * self.processes.count).backward()  # type: ignore[no-untyped-call]
