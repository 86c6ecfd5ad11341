"""`dpocli train`: the policy learns from cached pairs; the reference is never run again."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from dpocli.cache.reader import PairStore
from dpocli.cache.view import PairView
from dpocli.checkpoint.retention import latest
from dpocli.checkpoint.state import Content
from dpocli.commands.pairs import Inputs, check_inputs, check_weights
from dpocli.commands.resume import check_same_content, finished_summary, run_digest
from dpocli.commands.run_summary import no_better_warning, render, truncation_warning
from dpocli.commands.train_outputs import finish
from dpocli.config.commands import TrainOptions
from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Console
from dpocli.distributed.launch import pick_device
from dpocli.distributed.processes import init_processes
from dpocli.distributed.shared_filesystem import check_shared
from dpocli.distributed.signals import StopFlag
from dpocli.errors import UsageError, mark_recorded
from dpocli.model.hashing import HASH_MEMORY_NAME, HashMemory
from dpocli.model.identity import ModelFiles, ModelIdentity
from dpocli.model.load import pick_dtype
from dpocli.model.resolve import load_tokenizer, resolve_model
from dpocli.model.save import Provenance
from dpocli.run.directory import RunDirectory
from dpocli.scoring.layout_check import choose_layout, sample
from dpocli.training.loop import run_steps
from dpocli.training.monitor import Monitor
from dpocli.training.optimizers import make_optimizer
from dpocli.training.plan import Plan
from dpocli.training.policy import load_policy
from dpocli.training.schedule import Schedule, learning_rates
from dpocli.training.step0 import check_step0
from dpocli.training.token_budget import Device, set_token_budget
from dpocli.training.trackers import Trackers, check_trackers
from dpocli.training.trainer import Trainer


def run(options: TrainOptions, console: Console) -> None:
    """Trains, or goes on where the same line stopped, or says that there is nothing left to do; or only plans it."""
    try:
        _run(options, console)
    except BaseException as error:
        if options.dry_run:
            mark_recorded(error)  # who only looks leaves no trace
        raise


def _run(options: TrainOptions, console: Console) -> None:
    loss = options.loss_choice()
    check_inputs(options, [loss])
    device = pick_device(options.device, options.launcher)
    files = resolve_model(options.model, trains=True)
    options = options.for_model(is_adapter=files.adapter is not None)
    if finished := finished_summary(options):
        check_same_content(options, finished, files)
        console.result(finished, lambda printer: printer.say(f"{options.out}: finished already; nothing to do."))
        return
    tokenizer = load_tokenizer(files, options.model)
    check_trackers(options)
    inputs = Inputs.open(options, [loss], tokenizer, console)
    with ExitStack() as stack:
        processes = stack.enter_context(init_processes(device, options.launcher, even_alone=True))
        out = RunDirectory(options.out, "train", rank=processes.rank, say=console.say)
        scratch, checkpoints = options.data.scratch or options.out, options.out / "checkpoints"
        if options.dry_run:
            own = Path(stack.enter_context(TemporaryDirectory(dir=options.data.scratch)))
            scratch = processes.from_first(own)
        else:
            newest = latest(checkpoints)
            out.update(step=newest[0] if newest else 0)
            stack.enter_context(out)
            check_shared(options.out, processes)
        stop = stack.enter_context(StopFlag())
        store = inputs.pairs(scratch, processes, console)
        training, held_out = split_pairs(options, store, inputs.held_out)
        check_weights(loss, [view for view in (training, held_out) if view])
        dtype = _training_dtype(options, store, device)
        schedule = Schedule.plan(options, len(training), processes.count)
        policy = load_policy(options, loss, files, dtype, processes)
        with policy.dropout_off():
            choose_layout(
                policy.scorer,
                sample(policy.scorer, [view for view in (training, held_out) if view], options.seed),
                options.scoring.layout,
                processes,
                console.say,
                policy.outer_gradient,
                dropout=options.policy.model_dropout,
            )
        set_token_budget(policy, training, options, Device.of(device))
        optimizer = make_optimizer(policy, options)
        plan = Plan.of(options, loss, policy, training, held_out, schedule, dtype)
        if options.dry_run:
            console.result(plan.to_json(), plan.render)
            processes.wait()  # until all have read what the first one is about to clear away
            return
        plan.tell(console)
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
            console.say,
        )
        stack.callback(trainer.close)
        done = trainer.restore(checkpoints, console.warn)
        out.update(step=done, at_once=True)
        if done:
            console.say(f"Going on after step {done} of {schedule.num_steps}.")
        else:
            if store.has_reference:
                found = check_step0(options, policy, training, identity, dtype, processes, console)
                trainer.account.notes["step0"] = asdict(found)
            if warning := truncation_warning(training):
                console.warn(warning.text)
        trackers = stack.enter_context(Trackers(options, done + 1, enabled=processes.is_first))
        # Only now: a start that was refused may be mended with other settings in the same directory.
        out.write_config(options)
        monitor = Monitor(trainer, out, trackers, console)
        steps = run_steps(trainer, done + 1, held_out, checkpoints, out, stop, monitor)
        if steps < schedule.num_steps:
            console.say(
                f"Stopped early after step {steps} of {schedule.num_steps}: the held-out loss has not improved for "
                f"{options.held_out.early_stopping} evaluations."
            )
        summary = finish(options, loss, out, trainer, tokenizer, files, steps, console)
        if text := no_better_warning(summary):
            console.warn(text)
        console.result(summary, lambda printer: render(printer, summary, options))


def split_pairs(
    options: TrainOptions, store: PairStore, held_out_store: PairStore | None
) -> tuple[PairView, PairView | None]:
    """Training pairs, and held-out ones where they are asked for; no prompt is on both sides of a split."""
    everything = np.arange(len(store))
    if held_out_store:
        return PairView(store, everything), PairView(held_out_store, np.arange(len(held_out_store)))
    if not options.held_out.fraction:
        return PairView(store, everything), None
    # The hash decides, not a draw: the same prompt is held out in every run, whatever the order of the data.
    held_out = store.columns.prompt_hashes / 2.0**64 < options.held_out.fraction
    if not held_out.any() or held_out.all():
        raise UsageError(
            f"--eval-fraction {options.held_out.fraction}: that leaves {int(held_out.sum())} of {len(store)} pairs held out. "
            "Choose another fraction, or give --eval-reference."
        )
    return PairView(store, everything[~held_out]), PairView(store, everything[held_out])


def _training_dtype(options: TrainOptions, store: PairStore, device: torch.device) -> torch.dtype:
    dtype = pick_dtype(options.model.dtype, device, recorded=store.fingerprint.dtype)
    if dtype == torch.float16:
        found = "--dtype float16" if options.model.dtype else f"{store.directory} was scored in float16"
        raise UsageError(
            f"{found}: in training, gradients vanish in its narrow range. Give --dtype bfloat16 or --dtype float32."
        )
    return dtype


def _provenance(options: TrainOptions, loss: LossChoice, files: ModelFiles, store: PairStore) -> Provenance:
    return Provenance(
        loss=loss,
        trained_from=options.model.name,
        quantization=files.quantization,
        reference_digest=store.fingerprint.reference_digest if store.has_reference else None,
        run=run_digest(options, store),
    )


def _identity(files: ModelFiles, options: TrainOptions) -> ModelIdentity:
    return files.identity(HashMemory(options.out / HASH_MEMORY_NAME))
