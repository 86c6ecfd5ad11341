"""One optimizer step, a held-out evaluation, and the checkpoints between them."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.cache.view import PairView
from dpocli.checkpoint import retention, storage
from dpocli.checkpoint.state import Content, DamagedCheckpointError, Spent, State
from dpocli.config.commands import TrainOptions
from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Console
from dpocli.distributed.processes import Processes, StopRequest
from dpocli.distributed.shared_filesystem import appears
from dpocli.errors import NumericsError, UsageError
from dpocli.model.save import Provenance
from dpocli.objective import losses
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.objective.metrics import pair_metrics
from dpocli.scoring.passes import FILLER, my_passes, score
from dpocli.scoring.throughput import Throughput
from dpocli.scoring.token_logps import pair_logps
from dpocli.training.gradients import GlobalBatch, Gradients, MicroBatch, Step
from dpocli.training.policy import Policy
from dpocli.training.schedule import Schedule, learning_rates


@dataclass(frozen=True, slots=True)
class TrainSetup:
    """What a run trains, on what, and how."""

    policy: Policy
    optimizer: torch.optim.Optimizer
    training: PairView
    held_out: PairView | None
    schedule: Schedule
    loss: LossChoice
    options: TrainOptions

    @property
    def processes(self) -> Processes:
        return self.policy.processes

    @property
    def checkpoints(self) -> Path:
        """The directory of all checkpoints."""
        return self.options.out / "checkpoints"


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """What one step did, the same on every process."""

    step: int
    metrics: dict[str, float]
    num_pairs: int
    num_tokens: int


class Trainer:
    """Takes the policy from step to step. Batch loss = Σ wᵢ · lossᵢ / Σ wᵢ over the global batch.

    Args:
        setup: of the run.
        content: what it is made from, for its checkpoints.
        provenance: the same for its model.
    """

    def __init__(self, setup: TrainSetup, content: Content, provenance: Provenance) -> None:
        self.setup, self.content, self._provenance = setup, content, provenance
        self.loss_states: losses.States = {}
        """What losses with a memory remember of the steps so far."""
        self.check_first_batch: Callable[[PairLogps, NDArray[np.int64]], None] | None = None
        """Gets the log-probs of the first batch before the first update, and raises where they cannot be."""
        self.throughput = Throughput(setup.policy.scorer, backward=True)
        self.last_finite_step = 0
        """The last step whose weights are known to have given a finite loss and a finite gradient: the next is done."""
        self.rows_before: int | None = None
        """Rows of `metrics.jsonl` up to the step that the run resumes from, as its checkpoint remembers them."""
        options = setup.options
        self._learning_rate = learning_rates(options.optimizer, setup.schedule.num_steps)
        self._gradients = Gradients(
            setup.policy, setup.loss, self._columns(setup.training), options.policy.router_aux_loss_coef, options.seed
        )
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def step(self, step: int) -> StepOutcome:
        """Run optimizer step 1, 2, ….

        Raises:
            NumericsError: a loss or the gradient is not finite; the weights are still those of the step before.
        """
        view, loss = self.setup.training, self.setup.loss
        positions = self.setup.schedule.batch(step)
        weights = self._weights(view, positions)
        with self.throughput.clock():
            batch = GlobalBatch(positions, self._gradients.wanted, self.setup.processes)
            gathered = Step(step, self._passes(step), batch, weights)
            logps, states = self._gradients.accumulate(gathered, self.loss_states)
            # The micro-batches' losses were for the gradient; the metrics are exact over the whole batch.
            output = losses.compute(loss, logps, states)
            metrics = pair_metrics(output, logps, weights)
        if not np.isfinite(metrics["loss"]):
            raise NumericsError(
                f"Step {step}: the loss is not finite, in {view.describe_rows(_not_finite(positions, output.losses))}. "
                f"The weights are those of step {step - 1}. Look at those rows; else try a lower --learning-rate or "
                "--dtype float32."
            )
        if step == 1 and self.check_first_batch:
            self.check_first_batch(logps, positions)
        metrics |= self._update(step, positions)
        self.last_finite_step = step - 1
        self.loss_states = states
        return StepOutcome(step, metrics, len(positions), int(view.at(positions).num_tokens.sum()))

    def held_out(self, stop: StopRequest | None = None) -> dict[str, float] | None:
        """Metrics of the policy on the held-out pairs, under names that begin with `eval/`.

        All of them are one batch to a loss that depends on the whole batch. None where a stop was requested, which is
        looked at before each pass.
        """
        view, policy = self.setup.held_out, self.setup.policy
        assert view
        positions, wanted = np.arange(len(view)), self._columns(view)
        batch = GlobalBatch(positions, wanted, policy.processes)
        with policy.eval_mode():
            for mine, pairs in my_passes(view, positions, policy.scorer.packing, policy.processes):
                if stop and stop.agreed():
                    return None
                tokens_of, tokens = score(policy.scorer, pairs or [FILLER])
                if pairs:
                    batch.write(mine, pair_logps(tokens, tokens_of, pairs, wanted))
        logps = batch.all_gather()
        output = losses.compute(self.setup.loss, logps, self.loss_states)
        metrics = pair_metrics(output, logps, self._weights(view, positions))
        if not np.isfinite(metrics["loss"]):
            raise NumericsError(
                f"The held-out loss is not finite, in {view.describe_rows(_not_finite(positions, output.losses))}: the last update broke "
                "the policy, or a held-out pair is extreme. Look at those rows; else train with a lower --learning-rate in "
                "another --out, or try --dtype float32."
            )
        return {f"eval/{name}": value for name, value in metrics.items()}

    def save(self, step: int, num_rows: int, spent: dict[str, Any]) -> None:
        """Write a checkpoint after `step`, when `metrics.jsonl` has so many rows and the run took what `spent` says."""
        files = self.setup.policy.files
        assert files
        state = State(
            **self.content.model_dump(),
            step=step,
            loss_states={name: dict(values) for name, values in self.loss_states.items()},
            account=Spent.model_validate(spent),
            rows=num_rows,
            base=str(files.directory.resolve()),
            base_adapter=str(files.adapter.resolve()) if files.adapter else None,
        )
        storage.save(
            self.setup.checkpoints,
            self.setup.policy.state_tensors(self.setup.optimizer),
            state,
            partial(self._write_extra, step),
            self.setup.options.checkpoints.keep_last,
            self.last_finite_step,
            self.setup.processes,
        )

    def _write_extra(self, step: int, directory: Path) -> None:
        self.provenance(step).write(directory)
        if adapter := self.setup.policy.adapter:
            adapter.peft_config["default"].save_pretrained(str(directory))

    def provenance(self, step: int) -> Provenance:
        """The provenance of the weights as they are now."""
        return self._provenance.model_copy(update={"step": step, "loss_states": self.loss_states})

    def restore(self, console: Console) -> State | None:
        """Return to the newest checkpoint that is whole; None where there is none.

        The first process decides which one that is. A damaged one that is newer would stop a run that nobody watches,
        and the steps since an older one can be repeated with the same values, as after every kill. So the run resumes
        from there, with a warning, and the damaged one is kept under another name. Where no older one is whole, or
        what is wrong is not damage, nothing is touched.

        Raises:
            UsageError: it was made from other pairs or another model; or none is whole.
        """
        checkpoints, processes = self.setup.checkpoints, self.setup.processes
        if processes.is_first:
            retention.remove_unfinished(checkpoints)
        damage: list[tuple[Path, DamagedCheckpointError]] = []
        before: int | None = None
        # The number, not the path: the directory may have another name on another machine.
        while step := processes.from_first((retention.latest(checkpoints, up_to=before) or (0,))[0]):
            path = checkpoints / f"step-{step}"
            try:
                state = self.load(step)
                break
            except DamagedCheckpointError as error:
                damage.append((path, error))
                before = step - 1
        else:
            if damage:
                raise damage[0][1]
            return None
        for broken, found_there in damage:
            kept = processes.first_does(partial(retention.set_aside, broken))
            console.warn(
                f"{found_there.why} The run resumes from {path.name} instead; the damaged one is kept as {kept}."
            )
        self.rows_before = state.rows
        self.last_finite_step = step - 1
        return state

    def load(self, step: int) -> State:
        """Return to the checkpoint of a step. Collective; all processes fail where one does."""
        path, policy = self.setup.checkpoints / f"step-{step}", self.setup.policy
        with policy.processes.agreeing():
            if not appears(path):
                raise UsageError(
                    f"{path}: the first process sees this checkpoint, and process {policy.processes.rank} does not. Give an "
                    "--out on a file system that all machines of the run share."
                )
            state = State.read(path)
            state.check(path, self.setup.schedule.num_steps, self.content)
        allocate = partial(policy.allocate_state, self.setup.optimizer)
        tensors = storage.load(path, state, allocate, policy.processes)
        policy.load_moments(self.setup.optimizer, tensors)
        self.loss_states = state.loss_states
        return state

    def last_finite_checkpoint(self) -> Path | None:
        """The newest whose weights are known to be good; None where there is none."""
        found = retention.latest(self.setup.checkpoints, up_to=self.last_finite_step)
        return found and found[1]

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _columns(self, view: PairView) -> LogpColumns:
        return LogpColumns.by(self.setup.loss.needs, has_reference=view.store.has_reference)

    def _passes(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step; those of the next are read meanwhile."""
        setup = self.setup

        def read(wanted: int) -> list[MicroBatch]:
            packing = setup.policy.scorer.packing
            return list(my_passes(setup.training, setup.schedule.batch(wanted), packing, setup.processes))

        current = self._ahead.pop(step, None) or self._reader.submit(read, step)
        if step < setup.schedule.num_steps:
            self._ahead[step + 1] = self._reader.submit(read, step + 1)
        return current.result()

    def _weights(self, view: PairView, positions: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(view.at(positions).weights).to(self.setup.processes.device)

    def _update(self, step: int, positions: NDArray[np.int64]) -> dict[str, float]:
        parameters = [parameter for _, parameter in self.setup.policy.master_weights]
        limit = self.setup.options.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not np.isfinite(grad_norm):
            raise NumericsError(
                f"Step {step}: the gradient is not finite although the loss is, over "
                f"{self.setup.training.describe_rows(positions)}. The weights are those of step {step - 1}. Try a lower "
                "--learning-rate, or --dtype float32."
            )
        rate = self._learning_rate(step)
        for group in self.setup.optimizer.param_groups:
            group["lr"] = rate
        self.setup.optimizer.step()
        self.setup.optimizer.zero_grad()
        return {"grad_norm": grad_norm, "learning_rate": rate}


def _not_finite(positions: NDArray[np.int64], pair_losses: Tensor) -> NDArray[np.int64]:
    kept: NDArray[np.int64] = positions[~np.isfinite(pair_losses.detach().cpu().numpy())]
    return kept
