"""Before the first step of `train`: does the policy start where the cached reference stands?"""

import numpy as np
import torch

from dpocli.artifacts.fingerprint import config_differences, information_differences
from dpocli.artifacts.model_files import ModelIdentity
from dpocli.config.models import TrainOptions
from dpocli.engine import step0
from dpocli.engine.mesh import Processes
from dpocli.engine.model import environment
from dpocli.engine.passes import PairView
from dpocli.engine.policy import Policy
from dpocli.errors import NumericsError
from dpocli.terminal import Terminal


def check_step0(
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


def _other_quantization(options: TrainOptions, start: ModelIdentity) -> str:
    given = f"--quantization {start.quantization}" if start.quantization else "no --quantization"
    line = f"dpocli precompute --config {options.reference}/config.yaml --out NEW-CACHE"
    return (
        f"{options.reference} was scored with the same weights in another quantization, so the rewards begin off zero. To "
        f"compare like with like, score the pairs with {given}: {line}"
        + (f" --quantization {start.quantization}" if start.quantization else " (and without its quantization)")
    )
