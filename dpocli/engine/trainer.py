"""One optimizer step, and a held-out evaluation: everything that touches the policy between start and end."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.config.models import LossChoice, TrainOptions
from dpocli.data.batches import PairBatch
from dpocli.data.preference import EncodedPair
from dpocli.engine import checkpoint
from dpocli.engine.mesh import Processes
from dpocli.engine.passes import FILLER, PairView, my_passes, score
from dpocli.engine.policy import Policy
from dpocli.engine.schedule import Schedule
from dpocli.errors import NumericsError, UsageError
from dpocli.objective import losses
from dpocli.objective.logps import TokenLogps, pair_logps
from dpocli.objective.metrics import MetricSums

Pass = tuple[NDArray[np.int64], list[EncodedPair]]


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step did, the same on every process."""

    step: int
    metrics: dict[str, float]
    num_pairs: int
    num_tokens: int


class Trainer:
    """Takes the policy from step to step. Batch loss = Σ wᵢ · lossᵢ / Σ wᵢ over the global batch."""

    def __init__(
        self,
        policy: Policy,
        optimizer: torch.optim.Optimizer,
        learning_rate: Callable[[int], float],
        view: PairView,
        schedule: Schedule,
        loss: LossChoice,
        options: TrainOptions,
        budget: int,
        processes: Processes,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.view = view
        self.schedule = schedule
        self.loss = loss
        self.options = options
        self.budget = budget
        self.processes = processes
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: dict[int, Future[list[Pass]]] = {}

    def step(self, step: int) -> StepOutcome:
        """Runs optimizer step 1, 2, ….

        Raises:
            NumericsError: a loss or the gradient is not finite; the weights are still those of the step before.
        """
        passes = self._passes(step)
        # What is random (dropout, where it is kept) is a function of the seed, the step and the process.
        torch.manual_seed(
            int(np.random.SeedSequence([self.options.seed, step, self.processes.rank]).generate_state(1)[0])
        )
        positions = self.schedule.batch(step)
        total_weight = float(self.view.weights[positions].sum())
        sums = MetricSums.zero(self.processes.device)
        seen: list[tuple[list[EncodedPair], Tensor]] = []
        num_tokens = 0
        for index, (_, pairs) in enumerate(passes):
            self.policy.reduce_gradients_on_backward(index == len(passes) - 1)
            batch, tokens = score(self.policy.scorer, pairs or [FILLER], self.processes.device)
            loss_sum, part, pair_losses = self._loss(batch, tokens, pairs)
            # The engine averages gradients over processes; this is the one place that undoes it.
            (loss_sum * (self.processes.count / (total_weight or 1.0))).backward()  # type: ignore[no-untyped-call]
            if pairs:
                sums += part
                seen.append((pairs, pair_losses))
                num_tokens += batch.num_tokens
        metrics = MetricSums(self.processes.sum(sums.values)).means()
        if not np.isfinite(metrics["loss"]):
            raise self._not_finite(step, seen)
        metrics |= self._update(step)
        counts = self.processes.sum(torch.tensor(float(num_tokens), dtype=torch.float64, device=self.processes.device))
        return StepOutcome(step, metrics, len(positions), int(counts.item()))

    def held_out(self, view: PairView, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Metrics of the policy on pairs it does not learn from, under names that begin with `eval/`.

        None where `interrupted`, which is asked on all processes before each pass, says so.
        """
        sums = MetricSums.zero(self.processes.device)
        with self.policy.at_rest():
            for _, pairs in my_passes(view, np.arange(len(view)), self.budget, self.processes):
                if interrupted():
                    return None
                batch, tokens = score(self.policy.scorer, pairs or [FILLER], self.processes.device)
                if pairs:
                    sums += self._loss(batch, tokens, pairs)[1]
        means = MetricSums(self.processes.sum(sums.values)).means()
        if not np.isfinite(means["loss"]):
            raise NumericsError(
                "The held-out loss is not finite: the last update broke the policy, or a held-out pair is extreme. Go on from "
                "the last checkpoint with a lower --learning-rate in another --out, or try --dtype float32."
            )
        return {f"eval/{name}": value for name, value in means.items()}

    def save(self, checkpoints: Path, step: int) -> None:
        """Writes a checkpoint of what is so after `step`."""
        pairs = {"pairs": self.view.store.fingerprint.digest, "num_pairs": len(self.view)}
        checkpoint.save(checkpoints, step, self.policy, self.optimizer, pairs, self.options.keep_last, self.processes)

    def restore(self, checkpoints: Path) -> int:
        """Goes back to the newest checkpoint, and returns its step; 0 where there is none.

        Raises:
            UsageError: it was made with other pairs.
        """
        if self.processes.is_first:
            checkpoint.remove_unfinished(checkpoints)
        newest = checkpoint.latest(checkpoints)
        if newest is None:
            return 0
        step, path = newest
        pairs = checkpoint.load(path, self.policy, self.optimizer)
        if (pairs["pairs"], pairs["num_pairs"]) != (self.view.store.fingerprint.digest, len(self.view)):
            raise UsageError(
                f"{path}: this checkpoint was made with other pairs than --reference (or --data) holds now. Give another "
                "--out, or the pairs that the run began with."
            )
        return step

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _passes(self, step: int) -> list[Pass]:
        """This process's micro-batches of a step; those of the next are read meanwhile."""

        def read(wanted: int) -> list[Pass]:
            return list(my_passes(self.view, self.schedule.batch(wanted), self.budget, self.processes))

        current = self._ahead.pop(step, None) or self._reader.submit(read, step)
        if step < self.schedule.num_steps:
            self._ahead[step + 1] = self._reader.submit(read, step + 1)
        return current.result()

    def _loss(
        self, batch: PairBatch, tokens: TokenLogps, pairs: Sequence[EncodedPair]
    ) -> tuple[Tensor, MetricSums, Tensor]:
        """Σ wᵢ · lossᵢ with its graph, the metric sums, and the losses per pair."""
        if not pairs:
            # Zero, but with a graph: the backward pass of the others waits for this process's part of it.
            nothing = (tokens.chosen.sum() + tokens.rejected.sum()) * 0.0
            return nothing, MetricSums.zero(self.processes.device), nothing[None]
        logps = pair_logps(tokens, batch, pairs, reference=self.loss.spec.needs_reference)
        output = losses.compute(self.loss, logps)
        weights = torch.tensor([pair.weight for pair in pairs], dtype=torch.float64, device=output.losses.device)
        loss_sum = (weights * output.losses).sum()
        if tokens.router_loss is not None:
            loss_sum = loss_sum + self.options.router_aux_loss_coef * tokens.router_loss * weights.sum()
        return loss_sum, MetricSums.of(output, logps, weights), output.losses.detach()

    def _update(self, step: int) -> dict[str, float]:
        parameters = [parameter for _, parameter in self.policy.masters]
        limit = self.options.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not np.isfinite(grad_norm):
            raise NumericsError(
                f"Step {step}: the gradient is not finite although the loss is. The weights are those of step "
                f"{step - 1}. Try a lower --learning-rate, or --dtype float32."
            )
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": grad_norm, "learning_rate": rate}

    def _not_finite(self, step: int, seen: Sequence[tuple[list[EncodedPair], Tensor]]) -> NumericsError:
        mine = [
            pair.row
            for pairs, pair_losses in seen
            for pair, loss in zip(pairs, pair_losses.tolist(), strict=True)
            if not np.isfinite(loss)
        ]
        rows = sorted(self.processes.gather(mine))
        return NumericsError(
            f"Step {step}: the loss is not finite, in the pairs of source rows {', '.join(map(str, rows[:10])) or '?'}. "
            f"The weights are those of step {step - 1}. Look at those rows; else try a lower --learning-rate or "
            "--dtype float32."
        )


def adamw(policy: Policy, options: TrainOptions) -> torch.optim.AdamW:
    """AdamW over every parameter, in float32."""
    return torch.optim.AdamW(
        [parameter for _, parameter in policy.masters if parameter.requires_grad],
        lr=options.learning_rate,
        betas=(options.adam_beta1, options.adam_beta2),
        eps=options.adam_epsilon,
        weight_decay=options.weight_decay,
    )
