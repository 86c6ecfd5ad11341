"""What the formulas of the losses promise: needs, rewards, gradients, invariances, limits."""

import inspect
import math
from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dpocli.config.hyperparameters import MODIFIERS, Need, Value
from dpocli.config.loss_expression import LossChoice
from dpocli.config.losses import CATALOGUE
from dpocli.objective.batch_gradient import batch_gradient, with_gradient
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.objective.losses import LOSSES, NEXT_STATE, LossOutput, States, compute, next_states
from dpocli.objective.losses.modifiers import wpo_weights
from dpocli.objective.losses.reference_free import alphapo
from dpocli.objective.metrics import batch_loss, pair_metrics

OTHER: Mapping[str, Value] = {
    "label_smoothing": 0.2,
    "discopop_tau": 0.4,
    "dpop_lambda": 2.0,
    "r_dpo_alpha": 0.1,
    "reduction": "sum",
    "gamma": 0.5,
    "alphapo_alpha": -0.5,
    "sft_weight": 0.3,
    "delta": "none",
    "beta_dpo_alpha": 0.3,
    "beta_dpo_momentum": 0.5,
}
"""Of each hyperparameter that is a loss's own, a value that is no loss's default."""

ON: Mapping[str, dict[str, Value]] = {
    "ld_alpha": {"ld_alpha": 0.3},
    "f_divergence": {"f_divergence": "js"},
    "f_alpha": {"f_divergence": "alpha", "f_alpha": 0.4},
    "weighting": {"weighting": "wpo"},
}
"""What turns each modifier on."""

STATES: States = {"bco_pair": {"pairs": 20.0, "mean": 0.3}, "beta_dpo": {"mean": -0.7}}

NAMES = sorted(LOSSES)
VARIANTS: list[tuple[str, dict[str, Value]]] = [(name, {}) for name in NAMES] + [
    (name, {own.name: OTHER[own.name]}) for name in NAMES for own in CATALOGUE[name].hyperparameters
]
"""Every loss, and every loss with each of its own hyperparameters at another value."""
MODIFIED: list[tuple[str, dict[str, Value]]] = [
    (name, ON[modifier.name]) for name in NAMES for modifier in CATALOGUE[name].modifiers
]
"""Every loss with each of its modifiers on."""


def name_of(value: Any) -> str:
    return ",".join(f"{key}={given}" for key, given in value.items()) if isinstance(value, dict) else str(value)


variants_and_modified = pytest.mark.parametrize(("name", "numbers"), VARIANTS + MODIFIED, ids=name_of)
each_loss = pytest.mark.parametrize("name", NAMES)


def random_logps(seed: int = 0, pairs: int = 7) -> PairLogps:
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


def with_log_ratios(chosen: float, rejected: float, tokens: int = 1) -> PairLogps:
    """One pair with these log-ratios; its answers are as long, and as likely for WPO."""
    reference = torch.tensor([-20.0], dtype=torch.float64)
    count = torch.tensor([tokens])
    sums = reference + chosen, reference + rejected
    return PairLogps(*sums, reference, reference, count, count, *sums)


def permuted(logps: PairLogps, order: Tensor) -> PairLogps:
    return PairLogps(**{name: values[order] for name, values in logps.columns().items()})


def choice_of(name: str, **numbers: Value) -> LossChoice:
    """The loss with a beta of 0.3, at which none of them is flat, unless another is given."""
    return LossChoice.of(name, ({} if CATALOGUE[name].beta is None else {"beta": 0.3}) | numbers)


def output_of(name: str, logps: PairLogps, states: States | None = None, /, **numbers: Value) -> LossOutput:
    return compute(choice_of(name, **numbers), logps, states)


def losses_of(name: str, logps: PairLogps, states: States | None = None, /, **numbers: Value) -> Tensor:
    return output_of(name, logps, states, **numbers).losses


def close(mine: Tensor, other: Tensor, tolerance: float = 1e-10) -> bool:
    return torch.allclose(mine, other, rtol=tolerance, atol=tolerance)


# the catalogue


def test_the_catalogue_is_what_is_implemented() -> None:
    assert CATALOGUE.keys() == LOSSES.keys()
    assert {name for name, spec in CATALOGUE.items() if spec.stateful} == NEXT_STATE.keys()
    assert {name for name, spec in CATALOGUE.items() if spec.name != name} == set()


@each_loss
def test_the_catalogue_declares_the_keywords_of_the_function(name: str) -> None:
    spec = CATALOGUE[name]
    (logps, *keywords) = inspect.signature(LOSSES[name]).parameters.values()
    assert logps.name == "logps"
    assert all(keyword.kind is inspect.Parameter.KEYWORD_ONLY for keyword in keywords)
    # Of sft, beta is the only one with a default: it is not used.
    beta = inspect.Parameter.empty if spec.beta is not None else 1.0
    expected = {"beta": beta} | spec.defaults | ({"state": None} if spec.stateful else {})
    assert {keyword.name: keyword.default for keyword in keywords} == expected


@pytest.mark.parametrize("name", NEXT_STATE)
def test_the_state_takes_the_keywords_of_its_loss(name: str) -> None:
    keywords = inspect.signature(NEXT_STATE[name]).parameters.keys()
    assert keywords == {"logps", "beta", "state", *CATALOGUE[name].defaults}


def test_only_sft_has_no_beta() -> None:
    assert [name for name, spec in CATALOGUE.items() if spec.beta is None] == ["sft"]
    logps = random_logps()
    assert close(LOSSES["sft"](logps, beta=7.0).losses, LOSSES["sft"](logps).losses)


def test_the_other_values_cover_all_hyperparameters() -> None:
    assert OTHER.keys() == {own.name for spec in CATALOGUE.values() for own in spec.hyperparameters}
    assert ON.keys() == {modifier.name for modifier in MODIFIERS}


@pytest.mark.parametrize(("name", "numbers"), VARIANTS[len(NAMES) :] + MODIFIED, ids=name_of)
def test_every_hyperparameter_changes_something(name: str, numbers: dict[str, Value]) -> None:
    states = STATES if name == "beta_dpo" else {}
    if "beta_dpo_momentum" in numbers:  # it acts on the state alone
        ours, others = (next_states(choice_of(name, **given), random_logps(), states)[name] for given in (numbers, {}))
        assert ours["mean"] != others["mean"]
        return
    changed = losses_of(name, random_logps(), states, **numbers)
    assert ((changed - losses_of(name, random_logps(), states)).abs() > 1e-6).any()


@each_loss
def test_beta_changes_the_loss_where_there_is_one(name: str) -> None:
    if CATALOGUE[name].beta is not None:
        assert not close(losses_of(name, random_logps(), beta=0.4), losses_of(name, random_logps()), 1e-6)


# what a loss needs


@variants_and_modified
def test_what_a_loss_needs_is_what_it_reads(name: str, numbers: dict[str, Value]) -> None:
    everything, choice = random_logps(), choice_of(name, **numbers)
    names = LogpColumns.by(choice.needs, has_reference=choice.needs_reference).names
    needed = {column: values for column, values in everything.columns().items() if column in names}
    absent: dict[str, Any] = dict.fromkeys(("reference_chosen", "reference_rejected"))
    expected = compute(choice, everything)
    assert expected.losses.shape == expected.chosen_rewards.shape == expected.rejected_rewards.shape == (7,)
    found = compute(choice, PairLogps(**absent | needed))
    assert torch.equal(found.losses, expected.losses)
    assert torch.equal(found.chosen_rewards, expected.chosen_rewards)
    assert torch.equal(found.rejected_rewards, expected.rejected_rewards)
    for column in needed.keys() - LogpColumns().names:
        removed: dict[str, Any] = {column: None}
        with pytest.raises((AssertionError, TypeError)):
            compute(choice, replace(everything, **removed))


@variants_and_modified
def test_columns_that_are_not_needed_are_not_read(name: str, numbers: dict[str, Value]) -> None:
    everything, choice = random_logps(), choice_of(name, **numbers)
    names = LogpColumns.by(choice.needs, has_reference=choice.needs_reference).names
    nan = torch.full((7,), math.nan, dtype=torch.float64)
    poisoned = replace(everything, **{column: nan for column in everything.columns() if column not in names})
    assert torch.equal(compute(choice, poisoned).losses, compute(choice, everything).losses)


@variants_and_modified
def test_only_losses_of_the_whole_batch_look_at_other_pairs(name: str, numbers: dict[str, Value]) -> None:
    logps, choice = random_logps(), choice_of(name, **numbers)
    states = STATES if name == "beta_dpo" else {}
    together = compute(choice, logps, states).losses
    apart = torch.cat([compute(choice, permuted(logps, torch.tensor([pair])), states).losses for pair in range(7)])
    assert close(together, apart) != choice.is_whole_batch


@pytest.mark.parametrize(
    "numbers", [{}, {"delta": "none"}, {"delta": "running"}], ids=["default", "delta=none", "delta=running"]
)
def test_delta_none_leaves_no_need_of_the_whole_batch(numbers: dict[str, Value]) -> None:
    assert (Need.WHOLE_BATCH in choice_of("bco_pair", **numbers).needs) == (numbers != {"delta": "none"})


# rewards


@pytest.mark.parametrize(("name", "numbers"), [variant for variant in VARIANTS if variant[0] != "alphapo"], ids=name_of)
def test_rewards_are_what_the_catalogue_declares(name: str, numbers: dict[str, Value]) -> None:
    """Those of alphapo are bent by its alpha: see the next test."""
    logps, declared = random_logps(), CATALOGUE[name].reward
    output = output_of(name, logps, **numbers)
    per_token = declared.per_token and not (name == "ipo" and numbers.get("reduction") == "sum")
    for rewards, policy, reference, tokens in (
        (output.chosen_rewards, logps.policy_chosen, logps.reference_chosen, logps.chosen_tokens),
        (output.rejected_rewards, logps.policy_rejected, logps.reference_rejected, logps.rejected_tokens),
    ):
        expected = policy - optional(reference) if declared.log_ratio else policy
        expected = expected / tokens if per_token else expected
        assert close(rewards, 0.3 * expected if declared.times_beta else expected)


@pytest.mark.parametrize("alpha", [0.25, -0.5, 0.0])
def test_rewards_of_alphapo_rise_with_the_mean_logp(alpha: float) -> None:
    logps = random_logps(pairs=40)
    output = output_of("alphapo", logps, alphapo_alpha=alpha)
    means = torch.cat([logps.policy_chosen / logps.chosen_tokens, logps.policy_rejected / logps.rejected_tokens])
    rewards = torch.cat([output.chosen_rewards, output.rejected_rewards])
    assert torch.equal(rewards.argsort(), means.argsort())
    # At a certain answer the slope is beta, whatever alpha is.
    near_zero = replace(logps, policy_chosen=-1e-6 * logps.chosen_tokens.double())
    slopes = output_of("alphapo", near_zero, alphapo_alpha=alpha).chosen_rewards / -1e-6
    assert close(slopes, torch.full_like(slopes, 0.3), 1e-5)


@each_loss
def test_a_declared_reward_says_how_it_is_made(name: str) -> None:
    said = str(CATALOGUE[name].reward)
    reward = CATALOGUE[name].reward
    assert said.startswith("beta x ") == reward.times_beta
    assert ("mean" in said, "log-ratio" in said) == (reward.per_token, reward.log_ratio)


@variants_and_modified
def test_rewards_take_no_gradient(name: str, numbers: dict[str, Value]) -> None:
    logps = random_logps()
    learned = logps.policy_chosen.clone().requires_grad_(), logps.policy_rejected.clone().requires_grad_()
    output = output_of(name, with_policy(logps, *learned), **numbers)
    assert output.losses.requires_grad
    assert not output.chosen_rewards.requires_grad
    assert not output.rejected_rewards.requires_grad


@each_loss
def test_needing_the_reference_is_ranking_against_it(name: str) -> None:
    assert CATALOGUE[name].reward.log_ratio == CATALOGUE[name].needs_reference


# gradients


@variants_and_modified
def test_gradients_by_finite_differences(name: str, numbers: dict[str, Value]) -> None:
    """beta_dpo without a state has the benchmark beta; bco_pair's shift is held by one."""
    logps = random_logps()
    leaves = tuple(
        values.clone().requires_grad_()
        for values in (
            logps.policy_chosen,
            logps.policy_rejected,
            optional(logps.policy_chosen_tail),
            optional(logps.policy_rejected_tail),
        )
    )

    def loss(chosen: Tensor, rejected: Tensor, chosen_tail: Tensor, rejected_tail: Tensor) -> Tensor:
        moved = replace(
            with_policy(logps, chosen, rejected), policy_chosen_tail=chosen_tail, policy_rejected_tail=rejected_tail
        )
        return output_of(name, moved, {"bco_pair": STATES["bco_pair"]}, **numbers).losses

    assert torch.autograd.gradcheck(loss, leaves)


def gradients(losses: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(losses.sum(), leaves))


def learned(logps: PairLogps) -> PairLogps:
    return with_policy(
        logps, logps.policy_chosen.clone().requires_grad_(), logps.policy_rejected.clone().requires_grad_()
    )


def test_beta_dpo_is_dpo_with_the_beta_of_the_batch() -> None:
    logps = learned(random_logps())
    leaves = logps.policy_chosen, logps.policy_rejected
    log_ratios = [
        (policy - optional(reference)).detach()
        for policy, reference in zip(leaves, (logps.reference_chosen, logps.reference_rejected), strict=True)
    ]
    beta = 0.3 * (1 + 0.6 * (float((log_ratios[0] - log_ratios[1]).mean()) + 0.7))
    assert beta != pytest.approx(0.3, rel=0.05)
    output, dpo = output_of("beta_dpo", logps, STATES), output_of("dpo", logps, beta=beta)
    assert close(output.losses, dpo.losses)
    for mine, other in zip(gradients(output.losses, *leaves), gradients(dpo.losses, *leaves), strict=True):
        assert close(mine, other)
    assert close(output.chosen_rewards, 0.3 * log_ratios[0])  # the benchmark beta


def test_the_beta_of_beta_dpo_stays_above_zero() -> None:
    logps = with_log_ratios(-20.0, 20.0)
    assert close(losses_of("beta_dpo", logps, STATES), losses_of("dpo", logps, beta=1e-3))


def test_beta_dpo_without_a_state_takes_the_batch_for_usual() -> None:
    assert close(losses_of("beta_dpo", random_logps()), losses_of("dpo", random_logps()))


def test_the_shift_of_bco_takes_no_gradient() -> None:
    logps = learned(random_logps())
    leaves = logps.policy_chosen, logps.policy_rejected
    choice = choice_of("bco_pair")
    running, fixed = compute(choice, logps), compute(choice, logps, next_states(choice, random_logps(), {}))
    assert close(running.losses, fixed.losses)
    for mine, other in zip(gradients(running.losses, *leaves), gradients(fixed.losses, *leaves), strict=True):
        assert close(mine, other)
    shift = float(torch.cat([running.chosen_rewards, running.rejected_rewards]).mean())
    assert shift != pytest.approx(0.0, abs=1e-3)
    by_hand = -F.logsigmoid(running.chosen_rewards - shift) - F.logsigmoid(shift - running.rejected_rewards)
    assert close(running.losses, by_hand)


@variants_and_modified
def test_the_gradient_of_a_batch_in_two_steps(name: str, numbers: dict[str, Value]) -> None:
    """First with respect to the log-probs of all pairs, then from the log-probs on, micro-batch by micro-batch."""
    choice, weights = choice_of(name, **numbers), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 3.0]).double()
    logps = random_logps()
    columns = ("policy_chosen", "policy_rejected", "policy_chosen_tail", "policy_rejected_tail")
    leaves = {column: optional(getattr(logps, column)).clone().requires_grad_() for column in columns}
    whole = batch_loss(compute(choice, replace(logps, **leaves), STATES).losses, weights)
    expected = torch.autograd.grad(whole, list(leaves.values()), allow_unused=True)
    found = batch_gradient(choice, logps, weights, STATES)
    assert found.keys() == leaves.keys()
    for column, gradient in zip(columns, expected, strict=True):
        assert close(found[column], torch.zeros(7).double() if gradient is None else gradient)
    for part in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6])):
        micro_batch = permuted(replace(logps, **leaves), part)
        torch.autograd.backward(with_gradient(micro_batch, {column: values[part] for column, values in found.items()}))
    for column, leaf in leaves.items():
        assert close(optional(leaf.grad), found[column])


# invariances

CONSTANTS = torch.tensor([0.7, -1.3, 2.0, 0.1, -0.4, 3.0, -2.5], dtype=torch.float64)
ONE_CONSTANT = torch.full((7,), 0.7, dtype=torch.float64)
IMITATES = {"sft", "rpo", "cpo", "slic", "orpo"}
"""They raise the chosen answer's likelihood itself."""


@pytest.mark.parametrize("side", ["chosen", "rejected"])
@each_loss
def test_only_the_log_ratio_to_the_reference_counts(name: str, side: str) -> None:
    """The same constant added to policy and reference."""
    logps = random_logps()
    # aot sorts the margins of policy and reference apart, so that only the same constant for all pairs changes nothing.
    constants = ONE_CONSTANT if name == "aot" else CONSTANTS
    moved = (constants, 0 * constants) if side == "chosen" else (0 * constants, constants)
    shifted = with_policy(logps, logps.policy_chosen + moved[0], logps.policy_rejected + moved[1])
    if CATALOGUE[name].needs_reference:
        shifted = replace(
            shifted,
            reference_chosen=optional(logps.reference_chosen) + moved[0],
            reference_rejected=optional(logps.reference_rejected) + moved[1],
        )
    same = close(losses_of(name, shifted), losses_of(name, logps))
    if name in ("rpo", "sft"):
        assert same == (side == "rejected")
    else:
        assert same == CATALOGUE[name].needs_reference


ONLY_THE_MARGIN: Mapping[str, dict[str, Value]] = {
    "dpo": {},
    "dpo_reference_free": {},
    "wpo": {},
    "robust": {},
    "exo_pair": {},
    "discopop": {},
    "r_dpo": {},
    "hinge": {},
    "ipo": {"reduction": "sum"},
    "cpo": {"sft_weight": 0.0},
    "rpo": {"sft_weight": 0.0},
    "slic": {"sft_weight": 0.0},
    "aot": {},
    "aot_unpaired": {},
    "beta_dpo": {},
}
"""Losses of the margin of sums alone, with the numbers that make them so."""


@pytest.mark.parametrize("numbers_matter", [True, False])
@each_loss
def test_only_the_margin_counts(name: str, numbers_matter: bool) -> None:
    """The same constant added to both sides of the policy."""
    logps = random_logps()
    # aot_unpaired sorts the two sides apart, so that only the same constant for all pairs changes nothing.
    constants = ONE_CONSTANT if name == "aot_unpaired" else CONSTANTS
    shifted = with_policy(logps, logps.policy_chosen + constants, logps.policy_rejected + constants)
    numbers = ONLY_THE_MARGIN.get(name, {}) if numbers_matter else {}
    same = close(losses_of(name, shifted, STATES, **numbers), losses_of(name, logps, STATES, **numbers))
    assert same == (name in ONLY_THE_MARGIN and numbers == ONLY_THE_MARGIN[name])


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_apart_pairs_do_not_keep_together(name: str) -> None:
    logps = random_logps()
    shifted = with_policy(logps, logps.policy_chosen + CONSTANTS, logps.policy_rejected + CONSTANTS)
    assert close(losses_of(name, shifted), losses_of(name, logps)) == (name == "aot")
    moved = replace(
        with_policy(logps, logps.policy_chosen + CONSTANTS, logps.policy_rejected),
        reference_chosen=optional(logps.reference_chosen) + CONSTANTS,
    )
    assert close(losses_of(name, moved), losses_of(name, logps)) == (name == "aot_unpaired")


@pytest.mark.parametrize(("name", "margins"), [("aot", "sides"), ("aot_unpaired", "models")])
def test_aot_by_hand(name: str, margins: str) -> None:
    """The k-th smallest of the one against the k-th smallest of the other; a loss belongs to the pair of rank k."""
    logps = random_logps()
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    reference_chosen, reference_rejected = optional(logps.reference_chosen), optional(logps.reference_rejected)
    if margins == "sides":
        first, second = (chosen - rejected).tolist(), (reference_chosen - reference_rejected).tolist()
    else:
        first, second = (chosen - reference_chosen).tolist(), (rejected - reference_rejected).tolist()
    expected = [math.log1p(math.exp(-0.3 * (mine - sorted(second)[sorted(first).index(mine)]))) for mine in first]
    assert close(losses_of(name, logps), torch.tensor(expected, dtype=torch.float64))


SCALING: Mapping[str, int] = {
    **dict.fromkeys(("dpo", "dpo_norm", "dpo_reference_free", "wpo", "robust", "exo_pair", "discopop", "dpop"), 0),
    **dict.fromkeys(("r_dpo", "hinge", "nca_pair", "bco_pair", "apo_zero", "apo_down"), 0),
    **dict.fromkeys(("simpo", "simpo_hinge", "aot", "aot_unpaired", "beta_dpo"), 0),
    **dict.fromkeys(("ipo", "sppo_hard"), 2),
    "sft": 1,
}
"""Log-probs times s and beta over s multiply the loss by s to this power."""


@each_loss
def test_only_beta_times_the_log_probs_counts(name: str) -> None:
    logps, scale = random_logps(), 2.5
    scaled = replace(
        with_policy(logps, scale * logps.policy_chosen, scale * logps.policy_rejected),
        reference_chosen=scale * optional(logps.reference_chosen),
        reference_rejected=scale * optional(logps.reference_rejected),
    )
    numbers = {} if CATALOGUE[name].beta is None else {"beta": 0.3 / scale}
    expected = scale ** SCALING.get(name, 0) * losses_of(name, logps)
    assert close(losses_of(name, scaled, **numbers), expected) == (name in SCALING)


def test_losses_of_more_than_beta_times_the_log_probs_scale_with_their_other_numbers() -> None:
    logps, scale = random_logps(), 2.5
    scaled = replace(
        with_policy(logps, scale * logps.policy_chosen, scale * logps.policy_rejected),
        reference_chosen=scale * optional(logps.reference_chosen),
        reference_rejected=scale * optional(logps.reference_rejected),
    )
    for name, own, power in (
        ("rpo", {"sft_weight": 1 / scale}, 0),
        ("cpo", {"sft_weight": 1 / scale}, 0),
        ("alphapo", {"alphapo_alpha": 0.25 / scale}, 0),
    ):
        assert close(losses_of(name, scaled, beta=0.3 / scale, **own), scale**power * losses_of(name, logps)), name
    assert close(losses_of("slic", scaled, beta=0.3 * scale), scale * losses_of("slic", logps))


@variants_and_modified
def test_permuting_the_pairs_permutes_losses_and_rewards(name: str, numbers: dict[str, Value]) -> None:
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    straight = output_of(name, random_logps(), STATES, **numbers)
    shuffled = output_of(name, permuted(random_logps(), order), STATES, **numbers)
    for field in ("losses", "chosen_rewards", "rejected_rewards"):
        assert close(getattr(shuffled, field), getattr(straight, field)[order])
    assert len(set(straight.losses.tolist())) == 7 or name in ("hinge", "simpo_hinge", "slic")


# chosen up and rejected down

MONOTONE = (
    *("dpo", "dpo_norm", "dpo_reference_free", "wpo", "robust", "dpop", "r_dpo", "hinge", "bco_pair", "apo_zero"),
    *("simpo", "simpo_hinge", "alphapo", "cpo", "orpo", "slic", "sft", "rpo"),
)
MONOTONE_AS_A_BATCH = ("aot", "aot_unpaired")
"""A pair may change its rank, but none of the sorted differences falls."""
NOT_MONOTONE: Mapping[str, tuple[dict[str, Value], tuple[float, float], tuple[float, float]]] = {
    "ipo": ({"beta": 0.5}, (2.0, 0.0), (0.5, -0.5)),  # beyond its target
    "sppo_hard": ({"beta": 0.5}, (1.0, -1.0), (0.5, -0.5)),
    "cal_dpo": ({"beta": 0.5}, (3.0, -3.0), (0.5, -0.5)),
    "exo_pair": ({"beta": 1.0}, (4.0, -4.0), (0.5, -0.5)),  # surer than 1 - e
    "discopop": ({"beta": 0.05}, (0.0, 0.0), (1.0, -1.0)),  # the ridge between its two losses
    "nca_pair": ({"beta": 1.0}, (2.0, -9.0), (0.5, -0.5)),  # more than its anchor asks of the chosen side
    "apo_down": ({"beta": 1.0}, (0.0, -9.0), (0.5, -0.5)),  # the chosen side shall fall
}
"""The log-ratios from which a move of the two sides raises the loss."""


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", MONOTONE + MONOTONE_AS_A_BATCH)
def test_chosen_up_and_rejected_down_never_raises_a_monotone_loss(name: str, seed: int) -> None:
    logps, generator = random_logps(seed, pairs=30), torch.Generator().manual_seed(seed)
    up, down = 3 * torch.rand(2, 30, generator=generator, dtype=torch.float64) ** 2
    # A probability is at most 1.
    moved = with_policy(logps, (logps.policy_chosen + up).clamp(max=0.0), logps.policy_rejected - down)
    before, after = losses_of(name, logps, STATES), losses_of(name, moved, STATES)
    if name in MONOTONE_AS_A_BATCH:
        before, after = before.sum(), after.sum()
    assert (after <= before + 1e-12).all()
    assert (after < before).any()


@pytest.mark.parametrize("name", NOT_MONOTONE)
def test_a_loss_that_is_not_monotone(name: str) -> None:
    numbers, (chosen, rejected), (up, down) = NOT_MONOTONE[name]
    assert up > 0 > down
    before, after = (
        losses_of(name, with_log_ratios(*at), **numbers) for at in ((chosen, rejected), (chosen + up, rejected + down))
    )
    assert float(after) > float(before) + 1e-6


def test_beta_dpo_is_not_monotone_where_others_raise_the_beta_of_the_batch() -> None:
    logps = random_logps()
    wrong = int(
        (
            logps.policy_chosen
            - logps.policy_rejected
            - optional(logps.reference_chosen)
            + optional(logps.reference_rejected)
        ).argmin()
    )
    up = torch.full((7,), 5.0, dtype=torch.float64)
    up[wrong] = 0.01
    moved = with_policy(logps, logps.policy_chosen + up, logps.policy_rejected)
    assert (losses_of("beta_dpo", moved, STATES) > losses_of("beta_dpo", logps, STATES))[wrong]


def test_every_loss_is_said_to_be_monotone_or_not() -> None:
    assert sorted([*MONOTONE, *MONOTONE_AS_A_BATCH, *NOT_MONOTONE, "beta_dpo"]) == NAMES


# extremes

EXTREME_MODIFIERS: tuple[dict[str, Value], ...] = (
    {"ld_alpha": 0.0},
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js"},
    {"f_divergence": "alpha", "f_alpha": 0.1},
    {"f_divergence": "alpha", "f_alpha": 0.9},
    {"weighting": "wpo"},
)
EXTREME = VARIANTS + [
    (name, given) for name in NAMES for given in EXTREME_MODIFIERS if given.keys() <= CATALOGUE[name].accepts.keys()
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize(("name", "numbers"), EXTREME, ids=name_of)
def test_values_rewards_and_gradients_stay_finite_at_extremes(
    name: str, numbers: dict[str, Value], dtype: torch.dtype
) -> None:
    """Margins of ±1000 nats at log-probs of -10,000, and a policy that is certain; the paper's beta.

    Sums are float64, but the log-probs of tokens, to which the gradient goes, are float32.
    """

    def column(*values: float) -> Tensor:
        return torch.tensor(values, dtype=dtype)

    leaves = [
        torch.tensor(values, dtype=torch.float32, requires_grad=True)
        for values in (
            [-1e4, -1e4, -9e3, -1e4, -1e4, 0.0, 0.0, -1e4],
            [-1e4, -9e3, -1e4, -1e4, -1e4, -1e4, 0.0, 0.0],
            [-50.0] * 8,
            [0.0] * 8,
        )
    ]
    chosen, rejected, *tails = (leaf.to(dtype) for leaf in leaves)
    reference_chosen = column(-1e4, -1e4, -1e4, -9e3, -1e4, -10.0, -10.0, -10.0)
    reference_rejected = column(-1e4, -1e4, -1e4, -1e4, -9e3, -1e4, -10.0, -10.0)
    count = torch.tensor([10] * 8)
    logps = PairLogps(
        *(chosen, rejected, reference_chosen, reference_rejected, count + 2, count),
        *(column(*[-5.0] * 8), column(*[-1e4] * 8)),
        *(*tails, column(*[-40.0] * 8), column(*[0.0] * 8)),
    )
    output = compute(LossChoice.of(name, numbers), logps)
    for values in (output.losses, output.chosen_rewards, output.rejected_rewards):
        assert values.isfinite().all()
        assert values.dtype == dtype
    found = torch.autograd.grad(output.losses.sum(), leaves, allow_unused=True)
    assert found[0] is not None
    assert (found[0] != 0).any()
    for gradient in found:
        assert gradient is None or gradient.isfinite().all()


@pytest.mark.parametrize("tokens", [1, 1000])
def test_orpo_of_a_certain_answer(tokens: int) -> None:
    certain = torch.zeros(1, dtype=torch.float32, requires_grad=True)
    count = torch.tensor([tokens])
    losses = losses_of("orpo", PairLogps(certain, torch.tensor([-3.0]), None, None, count, count))
    assert 0 <= float(losses.detach()) < 1e-4
    assert gradients(losses, certain)[0].isfinite().all()


# limits


@pytest.mark.parametrize(
    ("name", "numbers", "same_as", "its_numbers"),
    [
        ("dpop", {"dpop_lambda": 0.0}, "dpo", {}),
        ("r_dpo", {"r_dpo_alpha": 0.0}, "dpo", {}),
        ("robust", {"label_smoothing": 0.0}, "dpo", {}),
        ("rpo", {"sft_weight": 0.0}, "dpo", {}),
        ("rpo", {"sft_weight": 0.0, "label_smoothing": 0.2}, "dpo", {"label_smoothing": 0.2}),
        ("cpo", {"sft_weight": 0.0}, "dpo_reference_free", {}),
        ("cpo", {"sft_weight": 0.0, "label_smoothing": 0.2}, "dpo_reference_free", {"label_smoothing": 0.2}),
        ("alphapo", {"alphapo_alpha": 0.0, "gamma": 1.0}, "simpo", {}),
        ("beta_dpo", {"beta_dpo_alpha": 0.0}, "dpo", {}),
        ("wpo", {}, "dpo", {"weighting": "wpo"}),
        ("wpo", {"label_smoothing": 0.2}, "dpo", {"label_smoothing": 0.2, "weighting": "wpo"}),
    ],
    ids=name_of,
)
def test_known_limits(name: str, numbers: dict[str, Value], same_as: str, its_numbers: dict[str, Value]) -> None:
    mine = output_of(name, random_logps(), STATES, **numbers)
    other = output_of(same_as, random_logps(), **its_numbers)
    assert close(mine.losses, other.losses, 1e-14)
    assert close(mine.chosen_rewards, other.chosen_rewards, 1e-14)
    assert close(mine.rejected_rewards, other.rejected_rewards, 1e-14)


def test_alphapo_tends_to_simpo() -> None:
    logps = random_logps()
    target = losses_of("simpo", logps, gamma=0.25)
    apart = [
        float((alphapo(logps, beta=0.3, alphapo_alpha=alpha).losses - target).abs().max()) for alpha in (1e-2, 1e-3)
    ]
    assert 0 < apart[1] < 0.11 * apart[0] < 0.11


def test_sums_that_have_a_name_of_their_own() -> None:
    logps = random_logps()
    for text, name, numbers in (
        ("dpo(beta=0.3)+sft", "rpo", {}),
        ("dpo(beta=0.3)+0.5*sft(reduction=sum)", "rpo", {"sft_weight": 0.5, "reduction": "sum"}),
        ("dpo_reference_free(beta=0.3)+2*sft", "cpo", {"sft_weight": 2.0}),
    ):
        assert close(compute(LossChoice.of(text), logps).losses, losses_of(name, logps, **numbers)), text


def test_cal_dpo_with_one_calibration_of_the_batch_is_the_same_on_the_mean() -> None:
    logps = learned(random_logps())
    leaves = logps.policy_chosen, logps.policy_rejected
    chosen, rejected = leaves[0] - optional(logps.reference_chosen), leaves[1] - optional(logps.reference_rejected)
    target = 0.5 / 0.3
    calibration = ((chosen - target) ** 2).mean() + ((rejected + target) ** 2).mean()
    as_a_batch = -F.logsigmoid(chosen - rejected) + 0.5 * calibration
    per_pair = losses_of("cal_dpo", logps)
    assert not close(per_pair, as_a_batch, 1e-3)
    assert close(per_pair.mean(), as_a_batch.mean())
    for mine, other in zip(gradients(per_pair, *leaves), gradients(as_a_batch, *leaves), strict=True):
        assert close(mine, other)


LN2 = math.log(2)
AT_THE_REFERENCE: Mapping[str, float] = {
    **dict.fromkeys(("dpo", "dpo_norm", "robust", "dpop", "aot", "aot_unpaired", "beta_dpo"), LN2),
    "hinge": 1.0,
    "discopop": 0.5 * LN2 + 0.5,
    "exo_pair": -LN2 - 0.5 * (math.log(0.999) + math.log(0.001)),
    "ipo": (1 / 0.6) ** 2,
    "sppo_hard": 2 * (1 / 0.6) ** 2,
    "cal_dpo": LN2 + (1 / 0.6) ** 2,
    "nca_pair": 2 * LN2,
    "bco_pair": 2 * LN2,
    "apo_zero": 1.0,
    "apo_down": 1.0,
}
"""The loss of any pair of which the policy says what the reference says."""


@pytest.mark.parametrize("name", [name for name in NAMES if CATALOGUE[name].needs_reference])
def test_at_the_reference_no_loss_sees_a_margin(name: str) -> None:
    logps = random_logps()
    logps = replace(logps, reference_chosen=logps.policy_chosen, reference_rejected=logps.policy_rejected)
    output = output_of(name, logps)
    assert (output.chosen_rewards == 0).all()
    assert (output.rejected_rewards == 0).all()
    if name == "wpo":
        expected = LN2 * wpo_weights(logps)
    elif name == "rpo":
        expected = LN2 - logps.policy_chosen / logps.chosen_tokens
    elif name == "r_dpo":
        expected = -F.logsigmoid(0.01 * (logps.chosen_tokens - logps.rejected_tokens).double())
    else:
        expected = torch.full_like(output.losses, AT_THE_REFERENCE[name])
    assert close(output.losses, expected)


# states


@pytest.mark.parametrize("numbers", [{}, {"delta": "none"}], ids=["running", "none"])
def test_the_state_of_bco_is_the_mean_of_all_rewards_seen(numbers: dict[str, Value]) -> None:
    choice, logps = choice_of("bco_pair", **numbers), random_logps()
    states: States = {}
    for part in (torch.tensor([0, 1]), torch.tensor([2, 3, 4, 5, 6])):
        states = next_states(choice, permuted(logps, part), states)
    assert states["bco_pair"] == pytest.approx(next_states(choice, logps, {})["bco_pair"], rel=1e-12)
    output = compute(choice, logps)
    mean = float(torch.cat([output.chosen_rewards, output.rejected_rewards]).mean())
    assert states["bco_pair"] == {"pairs": 7, "mean": pytest.approx(mean)}
    assert {type(value) for value in states["bco_pair"].values()} == {float}


def test_bco_takes_its_shift_from_the_state() -> None:
    output = output_of("bco_pair", random_logps(), STATES)
    by_hand = -F.logsigmoid(output.chosen_rewards - 0.3) - F.logsigmoid(0.3 - output.rejected_rewards)
    assert close(output.losses, by_hand)
    no_shift = losses_of("bco_pair", random_logps(), STATES, delta="none")
    assert close(no_shift, losses_of("bco_pair", random_logps(), delta="none"))
    assert not close(no_shift, output.losses, 1e-3)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_state_of_beta_dpo_is_a_running_mean_of_margins(momentum: float) -> None:
    choice = choice_of("beta_dpo", beta_dpo_momentum=momentum)
    states: States = {}
    expected = 0.0
    for seed in (1, 2, 3):
        logps = random_logps(seed)
        log_ratios = (
            logps.policy_chosen - optional(logps.reference_chosen),
            logps.policy_rejected - optional(logps.reference_rejected),
        )
        expected = momentum * expected + (1 - momentum) * float((log_ratios[0] - log_ratios[1]).mean())
        states = next_states(choice, logps, states)
    assert states == {"beta_dpo": {"mean": pytest.approx(expected)}}
    assert type(states["beta_dpo"]["mean"]) is float


def test_states_take_no_part_in_the_graph_and_are_of_losses_that_have_one() -> None:
    logps = learned(random_logps())
    assert next_states(LossChoice.of("dpo+0.5*sft"), logps, {}) == {}
    assert next_states(LossChoice.of("beta_dpo+sft"), logps, {}).keys() == {"beta_dpo"}
    assert next_states(LossChoice.of("0.8*dpo+0.2*bco_pair+sft"), logps, {}).keys() == {"bco_pair"}


# weighted sums


def test_a_weighted_sum_is_the_weighted_sum_of_its_terms() -> None:
    logps = learned(random_logps())
    total = compute(LossChoice.of("0.8*dpo(beta=0.2)+0.5*simpo(gamma=0.3)+3*sft"), logps)
    parts = {
        name: compute(LossChoice.of(text), logps)
        for name, text in (("dpo", "dpo(beta=0.2)"), ("simpo", "simpo(gamma=0.3)"), ("sft", "sft"))
    }
    assert close(total.losses, 0.8 * parts["dpo"].losses + 0.5 * parts["simpo"].losses + 3 * parts["sft"].losses)
    assert list(total.terms) == ["dpo", "simpo", "sft"]
    for name, losses in total.terms.items():
        assert close(losses, parts[name].losses)
        assert not losses.requires_grad
    assert torch.equal(total.chosen_rewards, parts["dpo"].chosen_rewards)
    assert torch.equal(total.rejected_rewards, parts["dpo"].rejected_rewards)
    leaves = logps.policy_chosen, logps.policy_rejected
    by_part = [gradients(parts[name].losses, logps.policy_chosen)[0] for name in ("dpo", "simpo", "sft")]
    assert close(gradients(total.losses, *leaves)[0], 0.8 * by_part[0] + 0.5 * by_part[1] + 3 * by_part[2])


@pytest.mark.parametrize(
    ("text", "ranking"), [("sft+0.1*simpo+dpo", "simpo"), ("dpo+sft", "dpo"), ("0.5*sft", "sft"), ("2*hinge", "hinge")]
)
def test_the_rewards_of_a_sum_are_those_of_its_first_term_that_compares(text: str, ranking: str) -> None:
    logps = random_logps()
    total, expected = compute(LossChoice.of(text), logps), compute(LossChoice.of(ranking), logps)
    assert torch.equal(total.chosen_rewards, expected.chosen_rewards)
    assert torch.equal(total.rejected_rewards, expected.rejected_rewards)
    assert total.terms.keys() == {term.name for term in LossChoice.of(text).terms}


def test_a_single_term_with_a_weight() -> None:
    logps = random_logps()
    total, plain = compute(LossChoice.of("0.5*dpo"), logps), compute(LossChoice.of("dpo"), logps)
    assert close(total.losses, 0.5 * plain.losses)
    assert close(total.terms["dpo"], plain.losses)
    assert plain.terms == {}


def test_each_term_of_a_sum_has_its_own_state_and_modifiers() -> None:
    logps = random_logps()
    total = compute(LossChoice.of("dpo(ld_alpha=0.2)+hinge+bco_pair(beta=0.3)+beta_dpo(beta=0.3)"), logps, STATES)
    assert close(total.terms["dpo"], compute(LossChoice.of("dpo(ld_alpha=0.2)"), logps).losses)
    assert close(total.terms["hinge"], compute(LossChoice.of("hinge"), logps).losses)
    assert close(total.terms["bco_pair"], losses_of("bco_pair", logps, STATES))
    assert close(total.terms["beta_dpo"], losses_of("beta_dpo", logps, STATES))


# metrics


def test_metrics_are_means_and_the_loss_is_weighted() -> None:
    logps, weights = random_logps(), torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 3.0]).double()
    output = compute(LossChoice.of("simpo+0.5*sft"), logps)
    metrics = pair_metrics(output, logps, weights)
    chosen, rejected = output.chosen_rewards.tolist(), output.rejected_rewards.tolist()

    def weighted(losses: Tensor) -> float:
        return float(np.average(losses.numpy(), weights=weights.numpy()))

    assert metrics["loss"] == pytest.approx(weighted(output.losses))
    assert metrics["loss/simpo"] == pytest.approx(weighted(output.terms["simpo"]))
    assert metrics["loss/sft"] == pytest.approx(weighted(output.terms["sft"]))
    assert metrics["loss"] == pytest.approx(metrics["loss/simpo"] + 0.5 * metrics["loss/sft"])
    assert metrics["rewards/chosen"] == pytest.approx(np.mean(chosen))
    assert metrics["rewards/rejected"] == pytest.approx(np.mean(rejected))
    assert metrics["rewards/margins"] == pytest.approx(np.mean(chosen) - np.mean(rejected))
    assert metrics["rewards/accuracies"] == pytest.approx(np.mean(np.array(chosen) > np.array(rejected)))
    assert metrics["rewards/ties"] == 0
    assert metrics["logps/chosen"] == pytest.approx(float(logps.policy_chosen.mean()))
    assert metrics["logps/rejected"] == pytest.approx(float(logps.policy_rejected.mean()))
    log_ratio = float((logps.policy_chosen - optional(logps.reference_chosen)).mean())
    assert metrics["logratios/chosen"] == pytest.approx(log_ratio)
    without = replace(logps, reference_chosen=None, reference_rejected=None)
    fewer = pair_metrics(compute(LossChoice.of("simpo"), without), without, weights)
    assert metrics.keys() - fewer.keys() == {
        *("loss/simpo", "loss/sft"),
        *(f"logratios/{what}" for what in ("chosen", "rejected", "margins", "accuracies", "ties")),
    }


def test_a_batch_whose_pairs_all_have_no_weight_has_no_loss() -> None:
    assert float(batch_loss(torch.ones(3).double(), torch.zeros(3).double())) == 0.0
