"""Log-probs of random pairs, and the losses on them, for the tests of losses and modifiers."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dpocli.config.hyperparameters import Hyperparameter, Value
from dpocli.config.loss_expression import LossChoice
from dpocli.config.losses import CATALOGUE
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LossOutput, States, compute

PAIRS = 7

ON: Mapping[str, dict[str, Value]] = {
    "ld_alpha": {"ld_alpha": 0.3},
    "f_divergence": {"f_divergence": "js"},
    "f_alpha": {"f_divergence": "alpha", "f_alpha": 0.4},
    "weighting": {"weighting": "wpo"},
}
"""What turns each modifier on."""

STATES: States = {"bco_pair": {"pairs": 20.0, "mean": 0.3}, "beta_dpo": {"mean": -0.7}}


def other_value(parameter: Hyperparameter) -> Value:
    """A value that is not the default."""
    if parameter.choices:
        return next(choice for choice in parameter.choices if choice != parameter.default)
    assert isinstance(parameter.default, float)
    return -0.5 if parameter.name == "alphapo_alpha" else parameter.default / 2 or 0.2


def own_variants(name: str) -> list[dict[str, Value]]:
    """Numbers of a loss: none, and each of its own hyperparameters at another value."""
    return [{}, *({own.name: other_value(own)} for own in CATALOGUE[name].hyperparameters)]


def variants(name: str) -> list[dict[str, Value]]:
    """`own_variants`, and each modifier of the loss on."""
    return own_variants(name) + [ON[modifier.name] for modifier in CATALOGUE[name].modifiers]


def random_logps(seed: int = 0, pairs: int = PAIRS) -> PairLogps:
    """Sums over random tokens, with every optional column. The policy stays near the reference."""
    generator = np.random.default_rng(seed)
    columns: dict[str, list[float]] = {column.name: [] for column in fields(PairLogps)}
    for _ in range(pairs):
        lengths = {"chosen": int(generator.integers(2, 9)), "rejected": int(generator.integers(2, 9))}
        for side, length in lengths.items():
            policy = -generator.exponential(1.5, length)
            reference = policy + generator.normal(0, 0.6, length)
            shared = min(lengths.values())
            columns[f"{side}_tokens"].append(length)
            columns[f"policy_{side}"].append(policy.sum())
            columns[f"reference_{side}"].append(reference.sum())
            columns[f"policy_{side}_collision"].append((policy * generator.uniform(0.4, 1.5, length)).sum())
            columns[f"policy_{side}_tail"].append(policy[shared:].sum())
            columns[f"reference_{side}_tail"].append(reference[shared:].sum())
    return PairLogps(
        **{
            name: torch.tensor(values, dtype=torch.int64 if "tokens" in name else torch.float64)
            for name, values in columns.items()
        }
    )


def optional(values: Tensor | None) -> Tensor:
    assert values is not None
    return values


def with_policy(logps: PairLogps, chosen: Tensor, rejected: Tensor) -> PairLogps:
    """With these sums of the policy, and WPO's weights as they were."""
    moved = {"chosen": (chosen - logps.policy_chosen).detach(), "rejected": (rejected - logps.policy_rejected).detach()}
    return replace(
        logps,
        policy_chosen=chosen,
        policy_rejected=rejected,
        policy_chosen_collision=optional(logps.policy_chosen_collision) + moved["chosen"],
        policy_rejected_collision=optional(logps.policy_rejected_collision) + moved["rejected"],
    )


def moved(logps: PairLogps, chosen: Tensor, rejected: Tensor, *, reference: bool = False) -> PairLogps:
    """With these numbers added to the policy's sums, and to the reference's too where asked."""
    found = with_policy(logps, logps.policy_chosen + chosen, logps.policy_rejected + rejected)
    if not reference:
        return found
    return replace(
        found,
        reference_chosen=optional(logps.reference_chosen) + chosen,
        reference_rejected=optional(logps.reference_rejected) + rejected,
    )


def with_log_ratios(chosen: float, rejected: float, tokens: int = 1) -> PairLogps:
    """One pair with these log-ratios; its answers are equally long, and equally likely for WPO."""
    reference = torch.tensor([-20.0], dtype=torch.float64)
    count = torch.tensor([tokens])
    sums = reference + chosen, reference + rejected
    return PairLogps(*sums, reference, reference, count, count, *sums)


def at_the_reference(logps: PairLogps) -> PairLogps:
    """With a reference that equals the policy."""
    return replace(logps, reference_chosen=logps.policy_chosen, reference_rejected=logps.policy_rejected)


def permuted(logps: PairLogps, order: Tensor) -> PairLogps:
    return PairLogps(**{name: values[order] for name, values in logps.columns().items()})


def learned(logps: PairLogps) -> PairLogps:
    """With policy sums that take a gradient."""
    return with_policy(
        logps, logps.policy_chosen.clone().requires_grad_(), logps.policy_rejected.clone().requires_grad_()
    )


def gradients(losses: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(losses.sum(), leaves))


def choice_of(name: str, **numbers: Value) -> LossChoice:
    """The loss with a beta of 0.3, at which none of them is flat, unless another is given."""
    return LossChoice.of(name, ({} if CATALOGUE[name].beta is None else {"beta": 0.3}) | numbers)


def output_of(name: str, logps: PairLogps, states: States | None = None, /, **numbers: Value) -> LossOutput:
    return compute(choice_of(name, **numbers), logps, states)


def losses_of(name: str, logps: PairLogps, states: States | None = None, /, **numbers: Value) -> Tensor:
    return output_of(name, logps, states, **numbers).losses


def close(mine: Tensor, other: Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(mine, other, rtol=tolerance, atol=tolerance)


def name_of(value: Any) -> str:
    return ",".join(f"{key}={given}" for key, given in value.items()) if isinstance(value, dict) else str(value)
