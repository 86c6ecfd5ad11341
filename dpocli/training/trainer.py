"""One optimizer step, and a held-out evaluation: everything that touches the policy between start and end."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpocli.cache.view import PairView
from dpocli.checkpoint import retention, storage
from dpocli.checkpoint.state import Budget, Content, DamagedCheckpointError, Spent, State
from dpocli.config.commands import TrainOptions
from dpocli.config.loss_expression import LossChoice
from dpocli.distributed.processes import Processes
from dpocli.distributed.shared_filesystem import appears
from dpocli.errors import NumericsError, UsageError, brief_message, is_out_of_memory
from dpocli.model.save import Provenance
from dpocli.objective import losses
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.objective.metrics import pair_metrics
from dpocli.scoring.passes import FILLER, my_passes, score
from dpocli.scoring.throughput import Throughput
from dpocli.scoring.token_logps import pair_logps
from dpocli.training.back_off import BackOff
from dpocli.training.gradients import GlobalBatch, Gradients, MicroBatch, Step
from dpocli.training.policy import Policy
from dpocli.training.run_stats import RunStats
from dpocli.training.schedule import Schedule

ROWS_NAMED = 10
"""Source rows that a message lists."""


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
        processes: Processes,
        provenance: Provenance,
        content: Content,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.policy = policy
        self.optimizer = optimizer
        self.learning_rate = learning_rate
        self.view = view
        self.schedule = schedule
        self.loss = loss
        self.loss_states: losses.States = {}
        """What losses with a memory remember of the steps so far."""
        self.options = options
        self.processes = processes
        self._provenance = provenance
        self.content = content
        wanted = LogpColumns.by(loss.needs, has_reference=view.store.has_reference)
        self._gradients = Gradients(policy, loss, wanted, options.policy.router_aux_loss_coef, options.seed, processes)
        self.throughput = Throughput(policy.scorer, backward=True)
        self._back_off = BackOff(policy, options.scoring.token_budget, say)
        self.account = RunStats(processes.device)
        self.last_finite_step = 0
        """The last step whose weights are known to have given a finite loss and a finite gradient: the next is done."""
        self.rows_before: int | None = None
        """Rows of `metrics.jsonl` up to the step that the run goes on from, as its checkpoint remembers them."""
        self._reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._ahead: dict[int, Future[list[MicroBatch]]] = {}

    def step(self, step: int) -> StepOutcome:
        """Runs optimizer step 1, 2, ….

        Raises:
            NumericsError: a loss or the gradient is not finite; the weights are still those of the step before.
            ResourceError: memory ran out, and smaller passes do not help or cannot be made.
        """
        positions = self.schedule.batch(step)
        weights = self._weights(self.view, positions)
        with self.throughput.clock():
            logps, states = self._accumulate(step, positions, weights)
            output = losses.compute(self.loss, logps, states)
            metrics = pair_metrics(output, logps, weights)
        if not np.isfinite(metrics["loss"]):
            raise NumericsError(
                f"Step {step}: the loss is not finite, in {self._rows_of(self.view, positions, output.losses)}. "
                f"The weights are those of step {step - 1}. Look at those rows; else try a lower --learning-rate or "
                "--dtype float32."
            )
        metrics |= self._update(step, positions)
        self.last_finite_step = step - 1
        self.loss_states = states
        return StepOutcome(step, metrics, len(positions), int(self.view.at(positions).num_tokens.sum()))

    def held_out(self, view: PairView, interrupted: Callable[[], bool] = lambda: False) -> dict[str, float] | None:
        """Metrics of the policy on pairs it does not learn from, under names that begin with `eval/`.

        All of them are one batch to a loss that depends on the whole batch. None where `interrupted`, which is asked on
        all processes before each pass, says so.
        """
        positions = np.arange(len(view))
        wanted = LogpColumns.by(self.loss.needs, has_reference=view.store.has_reference)
        batch = GlobalBatch(positions, wanted, self.processes)
        with self.policy.eval_mode():
            for mine, pairs in my_passes(view, positions, self.policy.scorer.packing, self.processes):
                if interrupted():
                    return None
                tokens_of, tokens = score(self.policy.scorer, pairs or [FILLER])
                if pairs:
                    batch.put(mine, pair_logps(tokens, tokens_of, pairs, wanted))
        logps = batch.everywhere()
        output = losses.compute(self.loss, logps, self.loss_states)
        metrics = pair_metrics(output, logps, self._weights(view, positions))
        if not np.isfinite(metrics["loss"]):
            raise NumericsError(
                f"The held-out loss is not finite, in {self._rows_of(view, positions, output.losses)}: the last update broke "
                "the policy, or a held-out pair is extreme. Look at those rows; else train with a lower --learning-rate in "
                "another --out, or try --dtype float32."
            )
        return {f"eval/{name}": value for name, value in metrics.items()}

    def save(self, checkpoints: Path, step: int, num_rows: int) -> None:
        """Writes a checkpoint of what is so after `step`, when `metrics.jsonl` has so many rows."""
        files = self.policy.files
        assert files
        state = State(
            **self.content.model_dump(),
            step=step,
            loss_states={name: dict(values) for name, values in self.loss_states.items()},
            token_budget=Budget.model_validate(self._back_off.state()),
            account=Spent.model_validate(self.account.to_json()),
            rows=num_rows,
            base=str(files.directory.resolve()),
            base_adapter=str(files.adapter.resolve()) if files.adapter else None,
        )
        storage.save(
            checkpoints,
            self.policy.state_tensors(self.optimizer),
            state,
            partial(self._write_extra, step),
            self.options.checkpoints.keep_last,
            self.last_finite_step,
            self.processes,
        )

    def _write_extra(self, step: int, directory: Path) -> None:
        self.provenance(step).write(directory)
        if adapter := self.policy.adapter:
            adapter.peft_config["default"].save_pretrained(str(directory))

    def provenance(self, step: int) -> Provenance:
        """Of the weights as they are now."""
        return self._provenance.model_copy(update={"step": step, "loss_states": self.loss_states})

    def restore(self, checkpoints: Path, warn: Callable[[str], None]) -> int:
        """Goes back to the newest checkpoint that is whole, and returns its step; 0 where there is none.

        The first process says which one it is. A damaged one that is newer would stop a run that nobody watches, and
        the steps since an older one can be made again with the same values: that is what every kill leads to. So the
        run goes on from there, with a warning, and the damaged one stays under another name. Where no older one is
        whole, or what is wrong is no damage, nothing is touched.

        Args:
            checkpoints: the directory of all of them.
            warn: told of damage.

        Raises:
            UsageError: it was made from something else than there is now; or none is whole.
        """
        if self.processes.is_first:
            retention.remove_unfinished(checkpoints)
        damage: list[tuple[Path, DamagedCheckpointError]] = []
        before: int | None = None
        # The number, not the path: the directory may have another name on another machine.
        while step := self.processes.from_first((retention.latest(checkpoints, up_to=before) or (0,))[0]):
            path = checkpoints / f"step-{step}"
            try:
                state = self._load(path)
                break
            except DamagedCheckpointError as error:
                damage.append((path, error))
                before = step - 1
        else:
            if damage:
                raise damage[0][1]
            return 0
        for broken, found_there in damage:
            kept = self.processes.first_does(partial(retention.set_aside, broken))
            warn(f"{found_there.why} The run goes on from {path.name} instead; the damaged one is kept as {kept}.")
        self.account.check_stop(state.account.model_dump() if state.account else {})
        self.rows_before = state.rows
        self.last_finite_step = step - 1
        return step

    def go_back_to(self, checkpoints: Path, step: int) -> None:
        """Takes the policy back to the checkpoint of a step, to be saved as the model."""
        self._load(checkpoints / f"step-{step}")

    def last_finite_checkpoint(self, checkpoints: Path) -> Path | None:
        """The newest whose weights are known to be good; None where there is none."""
        found = retention.latest(checkpoints, up_to=self.last_finite_step)
        return found and found[1]

    def _load(self, path: Path) -> State:
        """Every process takes part, and all fail where one does."""
        with self.processes.agreeing():
            if not appears(path):
                raise UsageError(
                    f"{path}: the first process sees this checkpoint, and process {self.processes.rank} does not. Give an "
                    "--out on a file system that all machines of the run share."
                )
            state = State.read(path)
            state.check(path, self.schedule.num_steps, self.content)
        tensors = storage.load(path, state, self.policy.allocate_state, self.processes)
        self.policy.load_moments(self.optimizer, tensors)
        self.loss_states = state.loss_states
        self._back_off.restore(state.token_budget.model_dump() if state.token_budget else None)
        return state

    def close(self) -> None:
        self._reader.shutdown(cancel_futures=True)

    def _accumulate(self, step: int, positions: NDArray[np.int64], weights: Tensor) -> tuple[PairLogps, losses.States]:
        """The gradient of a step, in passes that fit into memory."""
        shortage: str | None
        while True:
            passes = self._passes(step)
            batch = GlobalBatch(positions, self._gradients.wanted, self.processes)
            attempt = Step(step, passes, batch, weights)
            try:
                found = self._gradients.accumulate(attempt, self.loss_states)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                shortage, together = brief_message(error), self.processes.count == 1
            else:
                if not self.processes.any(attempt.shortage.found is not None):
                    self._back_off.tell(step)
                    return found
                shortage, together = attempt.shortage.found, True
            self._back_off.after(step, passes, shortage, together=together)
            self._ahead.clear()  # which was cut by the larger budget

    def _passes(self, step: int) -> list[MicroBatch]:
        """This process's micro-batches of a step; those of the next are read meanwhile."""

        def read(wanted: int) -> list[MicroBatch]:
            packing = self.policy.scorer.packing
            return list(my_passes(self.view, self.schedule.batch(wanted), packing, self.processes))

        current = self._ahead.pop(step, None) or self._reader.submit(read, step)
        if step < self.schedule.num_steps:
            self._ahead[step + 1] = self._reader.submit(read, step + 1)
        return current.result()

    def _weights(self, view: PairView, positions: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(view.at(positions).weights).to(self.processes.device)

    def _update(self, step: int, positions: NDArray[np.int64]) -> dict[str, float]:
        parameters = [parameter for _, parameter in self.policy.master_weights]
        limit = self.options.optimizer.max_grad_norm or float("inf")
        norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        grad_norm = float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)
        if not np.isfinite(grad_norm):
            raise NumericsError(
                f"Step {step}: the gradient is not finite although the loss is, over {self._rows_of(self.view, positions)}. "
                f"The weights are those of step {step - 1}. Try a lower --learning-rate, or --dtype float32."
            )
        rate = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"grad_norm": grad_norm, "learning_rate": rate}

    def _rows_of(self, view: PairView, positions: NDArray[np.int64], pair_losses: Tensor | None = None) -> str:
        """The pairs whose loss is not finite, or all of them where no losses are given, by their source rows."""
        if pair_losses is not None:
            positions = positions[~np.isfinite(pair_losses.detach().cpu().numpy())]
        rows = np.sort(view.store.columns.rows[view.members[positions]])
        more = f" and {len(rows) - ROWS_NAMED:,} more" if len(rows) > ROWS_NAMED else ""
        return f"the pairs of source rows {', '.join(map(str, rows[:ROWS_NAMED])) or '?'}{more}"
