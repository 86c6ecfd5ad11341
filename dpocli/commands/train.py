"""`dpocli train`: the policy learns from cached pairs; the reference is never run again."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpocli.artifacts.cache_reader import PairStore
from dpocli.artifacts.fingerprint import information_differences, is_reference
from dpocli.artifacts.plots import draw_curves
from dpocli.artifacts.run_dir import RunDirectory
from dpocli.commands.inputs import check_inputs, open_pairs
from dpocli.commands.resume import Resumable
from dpocli.config.models import LossChoice, TrainOptions
from dpocli.engine import checkpoint, step0
from dpocli.engine.loop import StepOutcome, Trainer, adamw
from dpocli.engine.mesh import Processes, joined, pick_device
from dpocli.engine.model import (
    Provenance,
    environment,
    load_model,
    load_tokenizer,
    locate_model,
    pick_dtype,
    save_model,
    source_dtype,
)
from dpocli.engine.passes import PairView, token_budget
from dpocli.engine.plan import describe
from dpocli.engine.policy import Policy
from dpocli.engine.schedule import Schedule, learning_rates
from dpocli.engine.stop import StopFlag
from dpocli.engine.trackers import Trackers
from dpocli.errors import NumericsError, PreemptedError, UsageError
from dpocli.objective.scoring import PairScorer
from dpocli.terminal import Printer, Terminal


def run(options: TrainOptions, terminal: Terminal) -> None:
    """Trains, or goes on where the same line stopped, or says that there is nothing left to do."""
    loss = LossChoice.from_options(options)
    check_inputs(options, loss)
    device = pick_device(options.device)
    model_directory = locate_model(options)
    tokenizer = load_tokenizer(model_directory, options)
    with ExitStack() as stack:
        processes = stack.enter_context(joined(device, even_alone=True))
        out = stack.enter_context(RunDirectory(options.out, "train", rank=processes.rank, say=terminal.say))
        stop = stack.enter_context(StopFlag())
        past = Resumable.of(options)
        if past.finished:
            terminal.result(
                past.summary, lambda printer: printer.say(f"{options.out}: finished already; nothing to do.")
            )
            return
        store = open_pairs(options, tokenizer, options.scratch or options.out, processes, terminal)
        out.write_config(options)
        training, held_out = split_pairs(options, store, tokenizer)
        dtype = pick_dtype(options.dtype, device, recorded=store.fingerprint.dtype)
        _refuse_float16(dtype)
        schedule = Schedule.plan(options, len(training), processes.count)
        budget = token_budget(options.token_budget, device)
        policy = _load_policy(options, loss, model_directory, dtype, processes)
        describe(terminal, options, loss, policy, training, held_out, schedule, dtype, budget)
        trainer = Trainer(
            policy,
            adamw(policy, options),
            learning_rates(options, schedule.num_steps),
            training,
            schedule,
            loss,
            options,
            budget,
            processes,
        )
        stack.callback(trainer.close)
        trackers = stack.enter_context(Trackers(options, enabled=processes.is_first))
        first = 1
        if newest := checkpoint.latest(options.out / "checkpoints"):
            state = checkpoint.load(newest[1], policy, trainer.optimizer)
            past.check_pairs(state, store)
            first = newest[0] + 1
            terminal.say(f"Going on after step {newest[0]} of {schedule.num_steps}.")
        elif store.has_reference:
            _check_step0(options, policy, training, model_directory, dtype, budget, processes, terminal)
        out.metrics.truncate_after(first - 1)
        run_steps(trainer, options, out, stop, held_out, trackers, first, terminal)
        summary = _finish(options, loss, out, policy, tokenizer, model_directory, schedule, store, device)
        terminal.result(summary, lambda printer: _render(printer, summary))


def run_steps(
    trainer: Trainer,
    options: TrainOptions,
    out: RunDirectory,
    stop: StopFlag,
    held_out: PairView | None,
    trackers: Trackers,
    first: int,
    terminal: Terminal,
) -> None:
    """Steps from `first` to the last, with held-out evaluations, checkpoints, and a stop where one is asked for."""
    last = trainer.schedule.num_steps
    tenth = max(1, round(last / 10))
    save_every, eval_every = options.save_every or tenth, options.eval_every or tenth

    def log(row: Mapping[str, float]) -> None:
        out.metrics.append(row)
        trackers.log(row)

    def save(step: int) -> None:
        state = Resumable.state(trainer.view.store)
        directory = options.out / "checkpoints"
        checkpoint.save(directory, step, trainer.policy, trainer.optimizer, state, options.keep_last, trainer.processes)

    if held_out and first == 1:
        log({"step": 0} | trainer.held_out(held_out))
    with terminal.progress(last, "train", unit="steps", initial=first - 1) as progress:
        for step in range(first, last + 1):
            outcome = trainer.step(step)
            row: dict[str, float] = {"step": step, "epoch": step / trainer.schedule.steps_per_epoch} | outcome.metrics
            evaluated = trainer.held_out(held_out) if held_out and (step % eval_every == 0 or step == last) else {}
            if step % options.log_every == 0 or step == last or evaluated:
                log(row | evaluated)
            _show(progress, outcome)
            out.update(step=step)
            stopping = trainer.processes.any(bool(stop) or out.stop_requested())
            if step == last or step % save_every == 0 or stopping:
                save(step)
            if stopping and step < last:
                raise PreemptedError(
                    f"Stopped on request after step {step} of {last}, with a checkpoint. The same command line goes on."
                )


def split_pairs(
    options: TrainOptions, store: PairStore, tokenizer: PreTrainedTokenizerBase
) -> tuple[PairView, PairView | None]:
    """Training pairs, and held-out ones where they are asked for; no prompt is on both sides of a split."""
    everything = np.arange(len(store))
    if options.eval_reference:
        other = PairStore.open(options.eval_reference)
        other.check_tokenizer(tokenizer)
        if store.has_reference:
            store.check_same_reference(other)
        return PairView(store, everything), PairView(other, np.arange(len(other)))
    if not options.eval_fraction:
        return PairView(store, everything), None
    # The hash decides, not a draw: the same prompt is held out in every run, whatever the order of the data.
    held_out = store.prompt_hashes() / 2.0**64 < options.eval_fraction
    if not held_out.any() or held_out.all():
        raise UsageError(
            f"--eval-fraction {options.eval_fraction}: that leaves {int(held_out.sum())} of {len(store)} pairs held out. "
            "Choose another fraction, or give --eval-reference."
        )
    return PairView(store, everything[~held_out]), PairView(store, everything[held_out])


def _load_policy(
    options: TrainOptions,
    loss: LossChoice,
    model_directory: Path,
    dtype: torch.dtype,
    processes: Processes,
) -> Policy:
    # Master weights are float32; the policy's forward pass is in `dtype`.
    model = load_model(model_directory, options, torch.float32, processes.device)
    scorer = PairScorer(model, collision=loss.spec.needs_collision, router_loss=options.router_aux_loss_coef > 0)
    return Policy(scorer, options, dtype, processes)


def _refuse_float16(dtype: torch.dtype) -> None:
    if dtype == torch.float16:
        raise UsageError("--dtype float16: gradients vanish in its narrow range. Train in bfloat16 or float32.")


def _check_step0(
    options: TrainOptions,
    policy: Policy,
    training: PairView,
    model_directory: Path,
    dtype: torch.dtype,
    budget: int,
    processes: Processes,
    terminal: Terminal,
) -> None:
    """Binding where the policy starts as the reference; else the difference is information."""
    tolerance = options.step0_tolerance or step0.TOLERANCE[dtype]
    found = step0.measure(policy.scorer, training, options.seed, budget, tolerance, processes)
    reference = training.store.fingerprint
    if not processes.any(processes.is_first and is_reference(reference, model_directory, options.out / ".hashes.json")):
        terminal.say(f"Step 0, against another model's reference: {found}")
        return
    terminal.say(f"Step-0 check: {found}")
    if not found.holds:
        differing = information_differences(reference, environment(processes.device))
        raise NumericsError(
            f"Step-0 check: the policy has the reference's weights but not its log-probs: {found}. Differs from when "
            f"the cache was written: {'; '.join(differing) or 'nothing that is recorded'}. Train with the cache's "
            "--dtype, write the cache anew here, or allow more with --step0-tolerance."
        )


def _show(progress: Any, outcome: StepOutcome) -> None:
    progress.update(
        pairs=outcome.num_pairs,
        tokens=outcome.num_tokens,
        loss=outcome.metrics["loss"],
        accuracy=outcome.metrics["rewards/accuracies"],
        margin=outcome.metrics["rewards/margins"],
    )


def _finish(
    options: TrainOptions,
    loss: LossChoice,
    out: RunDirectory,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    model_directory: Path,
    schedule: Schedule,
    store: PairStore,
    device: torch.device,
) -> dict[str, Any]:
    """The model, the curves and the summary."""
    weights = dict(policy.weights())
    rows = out.metrics.rows()
    summary: dict[str, Any] = {
        "out": str(options.out),
        "model": str(options.out / "model"),
        "loss": loss.model_dump(),
        "steps": schedule.num_steps,
        "pairs": schedule.num_pairs,
        "metrics": {key: value for row in rows for key, value in row.items()},
        "untrained": {key: value for key, value in (rows[0] if rows else {}).items() if key.startswith("eval/")},
        "environment": environment(device),
    }
    if policy.processes.is_first:
        dtype = getattr(torch, options.save_dtype) if options.save_dtype else source_dtype(model_directory)
        provenance = Provenance(
            loss=loss,
            trained_from=options.model,
            reference_digest=store.fingerprint.reference_digest if store.has_reference else None,
        )
        save_model(options.out / "model", policy.scorer.model, weights, tokenizer, dtype, provenance)
        draw_curves(rows, options.out / "curves.png")
        out.write_summary(summary)
    policy.processes.wait()
    return summary


def _render(printer: Printer, summary: Mapping[str, Any]) -> None:
    metrics = summary["metrics"]
    names = ("loss", "rewards/accuracies", "rewards/margins", "rewards/chosen", "rewards/rejected")
    rows = [
        [name, metrics.get(name), summary["untrained"].get(f"eval/{name}"), metrics.get(f"eval/{name}")]
        for name in names
    ]
    printer.table(
        f"{summary['model']} after {summary['steps']:,} steps", ["", "last step", "held-out before", "held-out"], rows
    )
