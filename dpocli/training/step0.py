"""The step-0 check: before the first step, the live policy must give what the cache says it gives.

Judged per token, because sums over an answer carry several tenths of a nat of bfloat16 noise.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from dpocli.cache.fingerprint import config_differences, information_differences
from dpocli.cache.view import PairView
from dpocli.config.commands import TrainOptions
from dpocli.console.console import Console
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.distributed.processes import Processes
from dpocli.errors import NumericsError
from dpocli.model.identity import ModelIdentity
from dpocli.objective.logps import PairLogps
from dpocli.scoring.passes import FILLER, my_passes, score
from dpocli.scoring.scorer import PairScorer, environment
from dpocli.training.trainer import TrainSetup

NUM_DRAWN, NUM_LONGEST = 32, 4

FEW_TOKENS = 6.0
"""An answer of n tokens may differ by 1 + 6/√n times as much per token as many of them together."""

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.08, torch.float16: 0.02}
"""Mean |difference| per token, nats. The signed mean may be a quarter of it: noise has no direction, a mistake has."""


@dataclass(frozen=True, slots=True)
class Step0:
    """Live minus cached log-probs, over the checked pairs."""

    mean: float
    """Mean |Δ| per token, nats."""
    signed_mean: float
    """Mean Δ per token, nats."""
    worst_row: int
    """Source row of the pair with the largest mean |Δ|."""
    worst_mean: float
    num_pairs: int
    tolerance: float
    is_binding: bool = False
    """Whether the policy starts as the reference, so that the two must agree."""

    @property
    def holds(self) -> bool:
        return self.mean <= self.tolerance and abs(self.signed_mean) <= self.tolerance / 4

    def __str__(self) -> str:
        return (
            f"mean |difference| {self.mean:.2e} nats per token, signed {self.signed_mean:+.2e} over {self.num_pairs} "
            f"pairs, worst pair row {self.worst_row} ({self.worst_mean:.2e}); allowed {self.tolerance:g}"
        )


@dataclass(frozen=True, slots=True)
class Difference:
    """Live minus cached log-probs of one pair, summed over its tokens."""

    row: int
    absolute: float
    signed: float
    num_tokens: int

    @classmethod
    def of(cls, cached: EncodedPair, live: ReferenceLogps) -> "Difference":
        assert cached.reference is not None
        now, before = (np.concatenate([each.chosen, each.rejected]) for each in (live, cached.reference))
        delta = now.astype(np.float64) - before
        return cls(cached.row, float(np.abs(delta).sum()), float(delta.sum()), len(delta))

    @property
    def mean(self) -> float:
        return self.absolute / self.num_tokens


def measure(
    scorer: PairScorer, view: PairView, positions: NDArray[np.int64], tolerance: float, processes: Processes
) -> Step0:
    """Scores the pairs at some positions (`chosen_positions`) with the live model, beside their cached values.

    The caller switches dropout off.
    """
    found: list[Difference] = []
    with torch.no_grad():
        for _, pairs in my_passes(view, positions, scorer.packing, processes):
            batch, tokens = score(scorer, pairs or [FILLER])
            chosen, rejected = tokens.chosen.cpu().numpy(), tokens.rejected.cpu().numpy()
            ends = zip(np.cumsum(batch.chosen_lengths), np.cumsum(batch.rejected_lengths), strict=True)
            for pair, (chosen_end, rejected_end) in zip(pairs, ends, strict=False):
                live = ReferenceLogps(
                    chosen[chosen_end - len(pair.chosen_ids) : chosen_end],
                    rejected[rejected_end - len(pair.rejected_ids) : rejected_end],
                )
                found.append(Difference.of(pair, live))
    return judge(processes.gather(found), tolerance)


def judge(found: Sequence[Difference], tolerance: float) -> Step0:
    """What the differences of all checked pairs come to."""
    num_tokens = sum(each.num_tokens for each in found)
    # NaN must lose every comparison below, so it counts as the worst.
    worst = max(found, key=lambda each: np.nan_to_num(each.mean, nan=np.inf))
    return Step0(
        mean=sum(each.absolute for each in found) / num_tokens,
        signed_mean=sum(each.signed for each in found) / num_tokens,
        worst_row=worst.row,
        worst_mean=worst.mean,
        num_pairs=len(found),
        tolerance=tolerance,
    )


def chosen_positions(view: PairView, seed: int) -> NDArray[np.int64]:
    """Positions in the view of the pairs to check: 32 drawn by the seed, and the 4 longest."""
    drawn = np.random.default_rng([seed, 0x57E9]).permutation(len(view))[:NUM_DRAWN]
    longest = np.argsort(-view.lengths, kind="stable")[:NUM_LONGEST]
    return np.unique(np.concatenate([drawn, longest]))


def check_step0(setup: TrainSetup, start: ModelIdentity, console: Console) -> Step0:
    """Compare the policy with the cache: binding where it starts as the reference, else information.

    Args:
        setup: of the run, before its first step.
        start: the model that it starts from.
        console: for the result.

    Raises:
        NumericsError: the policy's log-probs are not finite, or differ from the cache.
    """
    options, policy, training = setup.options, setup.policy, setup.training
    tolerance = options.policy.step0_tolerance or TOLERANCE[policy.scorer.compute_dtype]
    with policy.eval_mode():
        positions = chosen_positions(training, options.seed)
        found = measure(policy.scorer, training, positions, tolerance, policy.processes)
    if not np.isfinite(found.mean):
        raise NumericsError(
            f"Step 0: the policy's log-probs are not finite, first for the pair of source row {found.worst_row}. Look at the "
            f"weights of --model {options.model.name}, or try --dtype float32."
        )
    reference = training.store.fingerprint
    assert reference.reference
    if not start.has_weights_of(reference.reference):
        console.say(f"Step 0, against another model's reference: {found}")
        if start.weights == reference.reference.weights and start.quantization != reference.reference.quantization:
            console.warn(_other_quantization(options, start))
        return found
    found = replace(found, is_binding=True)
    console.say(f"Step-0 check: {found}")
    if not found.holds:
        differing = [
            *config_differences(reference, start),
            *information_differences(reference, environment(policy.processes.device, policy.scorer)),
        ]
        raise NumericsError(
            f"Step-0 check: the policy has the reference's weights but not its log-probs: {found}. Differs from when "
            f"the cache was written: {'; '.join(differing) or 'nothing that is recorded'}. Train with the cache's "
            "--dtype, rebuild the cache here, or allow more with --step0-tolerance."
        )
    return found


def first_batch_check(setup: TrainSetup, found: Step0) -> Callable[[PairLogps, NDArray[np.int64]], None] | None:
    """A check of the first batch, in training mode and through the passes of training, where the step-0 check is binding.

    The step-0 check runs in evaluation mode. This one sees what training sees, before the first update: a policy that is the
    reference has log-ratios of zero, up to rounding.

    Returns:
        A function of the batch's log-probs and positions that raises NumericsError; None where nothing is known of them.
    """
    files = setup.policy.files
    # Kernels of quantized layers compute something else with gradients than without.
    is_quantized = files is not None and files.quantization is not None
    if not found.is_binding or is_quantized or setup.options.policy.model_dropout:
        return None

    def check(logps: PairLogps, positions: NDArray[np.int64]) -> None:
        if logps.reference_chosen is None or logps.reference_rejected is None:
            return  # of a loss that looks at no reference
        for side, policy, reference, tokens in (
            ("chosen", logps.policy_chosen, logps.reference_chosen, logps.chosen_tokens),
            ("rejected", logps.policy_rejected, logps.reference_rejected, logps.rejected_tokens),
        ):
            per_token = (policy.detach() - reference).abs().double() / tokens
            allowed = found.tolerance * (1 + FEW_TOKENS / tokens.double().sqrt())
            exceeded = per_token / allowed
            worst = int(exceeded.nan_to_num(nan=float("inf")).argmax())
            if not exceeded[worst] <= 1:
                raise NumericsError(
                    f"Step 1: the {side} answer of {setup.training.describe_rows(positions[[worst]])} has log-probs "
                    f"{float(per_token[worst]):.2g} nats per token from the reference's before the first update, although the "
                    f"policy has its weights (allowed {float(allowed[worst]):.2g}). In training mode this model computes "
                    "something else: the cached values cannot be used. Try --scoring padded, or allow more with "
                    "--step0-tolerance."
                )

    return check


def _other_quantization(options: TrainOptions, start: ModelIdentity) -> str:
    given = f"--quantization {start.quantization}" if start.quantization else "no --quantization"
    line = f"dpocli precompute --config {options.reference}/config.yaml --out NEW-CACHE"
    return (
        f"{options.reference} was scored with the same weights in another quantization, so the rewards begin off zero. To "
        f"compare like with like, score the pairs with {given}: {line}"
        + (f" --quantization {start.quantization}" if start.quantization else " (and without its quantization)")
    )
