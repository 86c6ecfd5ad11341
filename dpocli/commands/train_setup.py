"""From the options of `train` to what its run is made of: pairs, policy, layout, optimizer."""

import numpy as np
import torch

from dpocli.cache.reader import PairStore
from dpocli.cache.view import PairView
from dpocli.commands.pairs import check_weights
from dpocli.commands.resume import run_digest
from dpocli.config.commands import TrainOptions
from dpocli.config.loss_expression import LossChoice
from dpocli.config.training_options import HeldOutOptions
from dpocli.console.console import Console
from dpocli.distributed.processes import Processes
from dpocli.errors import UsageError
from dpocli.model.hashing import HASH_MEMORY_NAME, HashMemory
from dpocli.model.identity import ModelFiles, ModelIdentity
from dpocli.model.load import pick_dtype
from dpocli.model.save import Provenance
from dpocli.scoring.layout_check import choose_layout, sample
from dpocli.training.optimizers import make_optimizer
from dpocli.training.policy import load_policy
from dpocli.training.schedule import Schedule
from dpocli.training.trainer import TrainSetup


def set_up(
    options: TrainOptions,
    loss: LossChoice,
    files: ModelFiles,
    store: PairStore,
    held_out_store: PairStore | None,
    processes: Processes,
    console: Console,
) -> TrainSetup:
    """Split the pairs, load the policy, choose its layout and make its optimizer. Collective."""
    training, held_out = split_pairs(options.held_out, store, held_out_store)
    views = [view for view in (training, held_out) if view]
    check_weights(loss, views)
    dtype = _training_dtype(options, store, processes.device)
    schedule = Schedule.plan(options.optimizer, len(training), processes.count, options.seed)
    policy = load_policy(options, loss, files, dtype, processes)
    with policy.dropout_off():
        choose_layout(
            policy.scorer,
            sample(policy.scorer, views, options.seed),
            options.scoring.layout,
            processes,
            console.say,
            policy.outer_gradient,
            dropout=options.policy.model_dropout,
        )
    optimizer = make_optimizer(policy, options.optimizer)
    return TrainSetup(policy, optimizer, training, held_out, schedule, loss, options)


def split_pairs(
    options: HeldOutOptions, store: PairStore, held_out_store: PairStore | None
) -> tuple[PairView, PairView | None]:
    """Training pairs, and held-out ones where they are wanted; no prompt is on both sides of a split."""
    everything = np.arange(len(store))
    if held_out_store:
        return PairView(store, everything), PairView(held_out_store, np.arange(len(held_out_store)))
    if not options.fraction:
        return PairView(store, everything), None
    # The hash decides, not a draw: the same prompt is held out in every run, whatever the order of the data.
    held_out = store.columns.prompt_hashes / 2.0**64 < options.fraction
    if not held_out.any() or held_out.all():
        raise UsageError(
            f"--eval-fraction {options.fraction}: that leaves {int(held_out.sum())} of {len(store)} pairs held out. "
            "Choose another fraction, or give --eval-reference."
        )
    return PairView(store, everything[~held_out]), PairView(store, everything[held_out])


def identify(options: TrainOptions, files: ModelFiles, processes: Processes) -> ModelIdentity:
    """The identity of the model that training starts from, hashed by the first process."""

    def hash_files() -> ModelIdentity:
        memory = HashMemory(options.out / HASH_MEMORY_NAME)
        identity = files.identity(memory)
        memory.save()
        return identity

    return processes.first_does(hash_files)


def provenance_of(setup: TrainSetup, files: ModelFiles) -> Provenance:
    """Where the trained model comes from."""
    store = setup.training.store
    return Provenance(
        loss=setup.loss,
        trained_from=setup.options.model.name,
        quantization=files.quantization,
        reference_digest=store.fingerprint.reference_digest if store.has_reference else None,
        run=run_digest(setup.options, store),
    )


def _training_dtype(options: TrainOptions, store: PairStore, device: torch.device) -> torch.dtype:
    dtype = pick_dtype(options.model.dtype, device, recorded=store.fingerprint.dtype)
    if dtype == torch.float16:
        found = "--dtype float16" if options.model.dtype else f"{store.directory} was scored in float16"
        raise UsageError(
            f"{found}: in training, gradients vanish in its narrow range. Give --dtype bfloat16 or --dtype float32."
        )
    return dtype
