"""`dpocli train`: train a policy on cached pairs, without running the reference again."""

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

from dpocli.checkpoint.retention import latest
from dpocli.checkpoint.state import Content
from dpocli.commands.pairs import Inputs, check_inputs
from dpocli.commands.resume import check_same_content, finished_summary
from dpocli.commands.train_outputs import no_better_warning, render, truncation_warning, write_outputs
from dpocli.commands.train_setup import identify, provenance_of, set_up
from dpocli.config.commands import TrainOptions
from dpocli.console.console import Console
from dpocli.distributed.launch import pick_device
from dpocli.distributed.processes import init_processes
from dpocli.distributed.shared_filesystem import check_shared
from dpocli.distributed.signals import StopFlag
from dpocli.model.resolve import load_tokenizer, resolve_model
from dpocli.run.directory import RunDirectory
from dpocli.run.status import StatusFile
from dpocli.training.loop import train_loop
from dpocli.training.monitor import Monitor, RunStats, check_trackers
from dpocli.training.plan import Plan
from dpocli.training.rehearsal import memory_of
from dpocli.training.step0 import check_step0, first_batch_check
from dpocli.training.token_budget import choose_token_budget, reporting_shortage
from dpocli.training.trainer import Trainer


def run(options: TrainOptions, console: Console) -> None:
    """Train, resume, or print the result of a finished run again; with --dry-run, print the plan."""
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
    check_trackers(options.logging.track)
    inputs = Inputs.open(options, [loss], tokenizer, console)
    with ExitStack() as stack:
        processes = stack.enter_context(init_processes(device, options.launcher, even_alone=True))
        previous = processes.from_first(StatusFile(options.out).read())
        out = RunDirectory(options.out, "train", rank=processes.rank, say=console.say)
        if options.dry_run:
            own = stack.enter_context(TemporaryDirectory(dir=options.data.scratch))
            scratch = processes.from_first(Path(own))
        else:
            scratch = options.data.scratch or options.out
            newest = latest(options.out / "checkpoints")
            out.update(step=newest[0] if newest else 0, token_budget=previous.token_budget if previous else None)
            stack.enter_context(out)
            check_shared(options.out, processes)
        stop = stack.enter_context(StopFlag())
        store = inputs.pairs(scratch, processes, console)
        setup = set_up(options, loss, files, store, inputs.held_out, processes, console)
        with reporting_shortage(setup.policy, out):
            choose_token_budget(setup, previous, memory_of(device), console)
        out.update(token_budget=setup.policy.scorer.packing.token_budget)
        plan = Plan.of(setup)
        if options.dry_run:
            console.result(plan.to_json(), plan.render)
            processes.wait()  # until all have read what the first one is about to remove
            return
        plan.show(console)
        identity = identify(options, files, processes)
        content = Content.of(files, identity, setup.training, setup.held_out)
        trainer = Trainer(setup, content, provenance_of(setup, files))
        stack.callback(trainer.close)
        state = trainer.restore(console)
        done, stats = state.step if state else 0, RunStats(device, state.account if state else None)
        out.update(step=done, at_once=True)
        if done:
            console.say(f"Resuming after step {done} of {setup.schedule.num_steps}.")
        else:
            if store.has_reference:
                found = check_step0(setup, identity, console)
                stats.notes["step0"] = asdict(found)
                trainer.check_first_batch = first_batch_check(setup, found)
            if warning := truncation_warning(setup.training):
                console.warn(warning.text)
        # Only now: a start that was refused may be repeated with other settings in the same directory.
        out.write_config(options)
        with Monitor(trainer, out, stats, done, console) as monitor, reporting_shortage(setup.policy, out):
            last = train_loop(trainer, done, out, stop, monitor)
        if last < setup.schedule.num_steps:
            console.say(
                f"Stopped early after step {last} of {setup.schedule.num_steps}: the held-out loss has not improved for "
                f"{options.held_out.early_stopping} evaluations."
            )
        summary = write_outputs(trainer, tokenizer, last, stats, out, console)
        if text := no_better_warning(summary):
            console.warn(text)
        console.result(summary, lambda printer: render(printer, summary, options))
