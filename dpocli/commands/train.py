"""`dpocli train`: the policy learns from cached pairs; the reference is never run again."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dpocli.artifacts.cache_reader import PairStore
from dpocli.artifacts.fingerprint import config_differences, information_differences
from dpocli.artifacts.hashing import HASH_MEMORY_NAME, HashMemory
from dpocli.artifacts.model_files import ModelFiles, ModelIdentity
from dpocli.artifacts.run_dir import RunDirectory
from dpocli.artifacts.status import mark_recorded
from dpocli.commands.inputs import Inputs, check_inputs, check_weights
from dpocli.commands.resume import check_same_content, finished_summary, inputs_of, run_digest
from dpocli.commands.run_summary import facts, no_better_warning, render, truncation_warning
from dpocli.config.loss_choice import LossChoice
from dpocli.config.models import TrainOptions
from dpocli.engine import step0
from dpocli.engine.checkpoint import latest
from dpocli.engine.checkpoint_state import Content
from dpocli.engine.course import agreed_best_step
from dpocli.engine.exactness import sample, settle
from dpocli.engine.locate import load_tokenizer, locate_model
from dpocli.engine.loop import run_steps
from dpocli.engine.memory import Device, set_token_budget
from dpocli.engine.mesh import Processes, joined, pick_device
from dpocli.engine.model import environment, pick_dtype, source_dtype
from dpocli.engine.narration import Narration, draw_curves_or_warn
from dpocli.engine.optimizers import make_optimizer
from dpocli.engine.passes import PairView
from dpocli.engine.plan import Plan
from dpocli.engine.policy import Policy, load_policy
from dpocli.engine.saved_model import Provenance, merge, save_adapter, save_model
from dpocli.engine.schedule import Schedule, learning_rates
from dpocli.engine.shared_out import check_shared
from dpocli.engine.stop import StopFlag
from dpocli.engine.trackers import Trackers, check_trackers
from dpocli.engine.trainer import Trainer
from dpocli.errors import NumericsError, UsageError
from dpocli.terminal import Terminal


def run(options: TrainOptions, terminal: Terminal) -> None:
    """Trains, or goes on where the same line stopped, or says that there is nothing left to do; or only plans it."""
    try:
        _run(options, terminal)
    except BaseException as error:
        if options.dry_run:
            mark_recorded(error)  # who only looks leaves no trace
        raise


def _run(options: TrainOptions, terminal: Terminal) -> None:
    loss = options.loss_choice()
    check_inputs(options, [loss])
    device = pick_device(options.device, options.launcher)
    files = locate_model(options)
    options = options.for_model(is_adapter=files.adapter is not None)
    if finished := finished_summary(options):
        check_same_content(options, finished, files)
        terminal.result(finished, lambda printer: printer.say(f"{options.out}: finished already; nothing to do."))
        return
    tokenizer = load_tokenizer(files, options)
    check_trackers(options)
    inputs = Inputs.open(options, [loss], tokenizer, terminal)
    with ExitStack() as stack:
        processes = stack.enter_context(joined(device, options.launcher, even_alone=True))
        out = RunDirectory(options.out, "train", rank=processes.rank, say=terminal.say)
        scratch, checkpoints = options.scratch or options.out, options.out / "checkpoints"
        if options.dry_run:
            own = Path(stack.enter_context(TemporaryDirectory(dir=options.scratch)))
            scratch = processes.from_first(own)
        else:
            newest = latest(checkpoints)
            out.update(step=newest[0] if newest else 0)
            stack.enter_context(out)
            check_shared(options.out, processes)
        stop = stack.enter_context(StopFlag())
        store = inputs.pairs(scratch, processes, terminal)
        training, held_out = split_pairs(options, store, inputs.held_out)
        check_weights(loss, [view for view in (training, held_out) if view])
        dtype = _training_dtype(options, store, device)
        schedule = Schedule.plan(options, len(training), processes.count)
        policy = load_policy(options, loss, files, dtype, processes)
        with policy.dropout_off():
            settle(
                policy.scorer,
                sample(policy.scorer, [view for view in (training, held_out) if view], options.seed),
                options.scoring,
                processes,
                terminal.say,
                policy.gradient_of,
                dropout=options.model_dropout,
            )
        set_token_budget(policy, training, options, Device.of(device))
        optimizer = make_optimizer(policy, options)
        plan = Plan.of(options, loss, policy, training, held_out, schedule, dtype)
        if options.dry_run:
            terminal.result(plan.to_json(), plan.render)
            processes.wait()  # until all have read what the first one is about to clear away
            return
        plan.tell(terminal)
        identity = processes.first_does(lambda: _identity(files, options))
        trainer = Trainer(
            policy,
            optimizer,
            learning_rates(options, schedule.num_steps),
            training,
            schedule,
            loss,
            options,
            processes,
            _provenance(options, loss, files, store),
            Content.of(files, identity, training, held_out),
            terminal.say,
        )
        stack.callback(trainer.close)
        done = trainer.restore(checkpoints, terminal.warn)
        out.update(step=done, at_once=True)
        if done:
            terminal.say(f"Going on after step {done} of {schedule.num_steps}.")
        else:
            if store.has_reference:
                found = _check_step0(options, policy, training, identity, dtype, processes, terminal)
                trainer.account.notes["step0"] = asdict(found)
            if warning := truncation_warning(training):
                terminal.warn(warning.text)
        trackers = stack.enter_context(Trackers(options, done + 1, enabled=processes.is_first))
        # Only now: a start that was refused may be mended with other settings in the same directory.
        out.write_config(options)
        narration = Narration(trainer, out, trackers, terminal)
        steps = run_steps(trainer, done + 1, held_out, checkpoints, out, stop, narration)
        if steps < schedule.num_steps:
            terminal.say(
                f"Stopped early after step {steps} of {schedule.num_steps}: the held-out loss has not improved for "
                f"{options.early_stopping} evaluations."
            )
        summary = _finish(options, loss, out, trainer, tokenizer, files, steps, terminal)
        if text := no_better_warning(summary):
            terminal.warn(text)
        terminal.result(summary, lambda printer: render(printer, summary, options))


def split_pairs(
    options: TrainOptions, store: PairStore, held_out_store: PairStore | None
) -> tuple[PairView, PairView | None]:
    """Training pairs, and held-out ones where they are asked for; no prompt is on both sides of a split."""
    everything = np.arange(len(store))
    if held_out_store:
        return PairView(store, everything), PairView(held_out_store, np.arange(len(held_out_store)))
    if not options.eval_fraction:
        return PairView(store, everything), None
    # The hash decides, not a draw: the same prompt is held out in every run, whatever the order of the data.
    held_out = store.columns.prompt_hashes / 2.0**64 < options.eval_fraction
    if not held_out.any() or held_out.all():
        raise UsageError(
            f"--eval-fraction {options.eval_fraction}: that leaves {int(held_out.sum())} of {len(store)} pairs held out. "
            "Choose another fraction, or give --eval-reference."
        )
    return PairView(store, everything[~held_out]), PairView(store, everything[held_out])


def _training_dtype(options: TrainOptions, store: PairStore, device: torch.device) -> torch.dtype:
    dtype = pick_dtype(options.dtype, device, recorded=store.fingerprint.dtype)
    if dtype == torch.float16:
        found = "--dtype float16" if options.dtype else f"{store.directory} was scored in float16"
        raise UsageError(
            f"{found}: in training, gradients vanish in its narrow range. Give --dtype bfloat16 or --dtype float32."
        )
    return dtype


def _check_step0(
    options: TrainOptions,
    policy: Policy,
    training: PairView,
    start: ModelIdentity,
    dtype: torch.dtype,
    processes: Processes,
    terminal: Terminal,
) -> step0.Step0:
    """Binding where the policy starts as the reference; else the difference is information."""
    tolerance = options.step0_tolerance or step0.TOLERANCE[dtype]
    with policy.at_rest():
        positions = step0.chosen_positions(training, options.seed)
        found = step0.measure(policy.scorer, training, positions, tolerance, processes)
    if not np.isfinite(found.mean):
        raise NumericsError(
            f"Step 0: the policy's log-probs are not finite, first for the pair of source row {found.worst_row}. Look at the "
            f"weights of --model {options.model}, or try --dtype float32."
        )
    reference = training.store.fingerprint
    assert reference.reference
    if not start.has_weights_of(reference.reference):
        terminal.say(f"Step 0, against another model's reference: {found}")
        if start.weights == reference.reference.weights and start.quantization != reference.reference.quantization:
            terminal.warn(_other_quantization(options, start))
        return found
    terminal.say(f"Step-0 check: {found}")
    if not found.holds:
        differing = [
            *config_differences(reference, start),
            *information_differences(reference, environment(processes.device, policy.scorer)),
        ]
        raise NumericsError(
            f"Step-0 check: the policy has the reference's weights but not its log-probs: {found}. Differs from when "
            f"the cache was written: {'; '.join(differing) or 'nothing that is recorded'}. Train with the cache's "
            "--dtype, write the cache anew here, or allow more with --step0-tolerance."
        )
    return found


def _finish(
    options: TrainOptions,
    loss: LossChoice,
    out: RunDirectory,
    trainer: Trainer,
    tokenizer: PreTrainedTokenizerBase,
    files: ModelFiles,
    steps: int,
    terminal: Terminal,
) -> dict[str, Any]:
    """The model (with --keep-best, of the best step), the curves and the summary."""
    policy, checkpoints, model_step = trainer.policy, options.out / "checkpoints", steps
    if options.keep_best and (kept := agreed_best_step(checkpoints, policy.processes)) is not None:
        trainer.go_back_to(checkpoints, model_step := kept)
    weights = policy.weights()
    if broken := [name for name, weight in weights.items() if not weight.isfinite().all()]:
        raise NumericsError(
            f"After step {model_step} {len(broken)} weights are not finite ({broken[0]}, …); no model was saved. Train again "
            "with a lower --learning-rate in another --out. The last good checkpoint: "
            f"{trainer.last_sound_checkpoint(checkpoints) or 'there is none'}."
        )
    rows = out.metrics.rows()
    summary: dict[str, Any] = {
        "out": str(options.out),
        "model": str(options.out / "model"),
        "loss": loss.model_dump(),
        "policy_weights": trainer.content.model_weights,
        "policy_settings": trainer.content.model_settings,
        "inputs": inputs_of(options),
        "pairs_digest": trainer.content.pairs,
        "held_out_digest": trainer.content.held_out,
        "pairs": trainer.schedule.num_pairs,
        "metrics": {key: value for row in rows for key, value in row.items()},
        "untrained": {key: value for key, value in (rows[0] if rows else {}).items() if key.startswith("eval/")},
        "held_out": next(
            (
                {key: value for key, value in row.items() if key.startswith("eval/")}
                for row in rows
                if row["step"] == model_step
            ),
            {},
        ),
        "scoring": trainer.throughput.summary(),
    } | facts(trainer, rows, steps, model_step)
    if policy.processes.is_first:
        provenance = trainer.provenance(model_step)
        dtype = getattr(torch, options.save_dtype) if options.save_dtype else None
        directory = options.out / "model"
        if policy.adapter:
            save_adapter(directory, policy.adapter, files, weights, tokenizer, dtype or torch.float32, provenance)
            if options.merge:
                merge(options.out / "merged", files, directory, options, tokenizer, provenance)
        else:
            dtype = dtype or source_dtype(files, options)
            save_model(
                directory,
                policy.scorer.model,
                policy.source_config,
                weights,
                policy.buffers,
                tokenizer,
                dtype,
                provenance,
            )
        draw_curves_or_warn(out, terminal)
        out.write_summary(summary)
    policy.processes.wait()
    return summary


def _provenance(options: TrainOptions, loss: LossChoice, files: ModelFiles, store: PairStore) -> Provenance:
    return Provenance(
        loss=loss,
        trained_from=options.model,
        quantization=files.quantization,
        reference_digest=store.fingerprint.reference_digest if store.has_reference else None,
        run=run_digest(options, store),
    )


def _identity(files: ModelFiles, options: TrainOptions) -> ModelIdentity:
    return files.identity(HashMemory(options.out / HASH_MEMORY_NAME))


def _other_quantization(options: TrainOptions, start: ModelIdentity) -> str:
    given = f"--quantization {start.quantization}" if start.quantization else "no --quantization"
    line = f"dpocli precompute --config {options.reference}/config.yaml --out NEW-CACHE"
    return (
        f"{options.reference} was scored with the same weights in another quantization, so the rewards begin off zero. To "
        f"compare like with like, score the pairs with {given}: {line}"
        + (f" --quantization {start.quantization}" if start.quantization else " (and without its quantization)")
    )
