"""What changes several losses in the same way: divergences, LD-DPO and WPO's weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpocli.config.hyperparameters import MODIFIERS, Need, Value
from dpocli.config.loss_expression import LossChoice
from dpocli.config.losses import CATALOGUE
from dpocli.errors import UsageError
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LOSSES, compute
from dpocli.objective.losses.modifiers import length_desensitized, with_divergence, wpo_weights
from tests.objective.random_logps import (
    ON,
    at_the_reference,
    close,
    gradients,
    learned,
    name_of,
    optional,
    random_logps,
    with_log_ratios,
)

ACCEPTED = [(name, modifier.name) for name, spec in CATALOGUE.items() for modifier in spec.modifiers]
WITH_DIVERGENCE = [name for name, modifier in ACCEPTED if modifier == "f_divergence"]

DERIVATIVE: Mapping[str, Callable[[float, float], float]] = {
    "reverse_kl": lambda u, _: math.log(u),
    "forward_kl": lambda u, _: 1 - 1 / u,
    "js": lambda u, _: math.log(2 * u / (1 + u)),
    "alpha": lambda u, alpha: (1 - u**-alpha) / alpha,
}
"""f'(u) of the paper, up to a constant that is 0 at u = 1."""

DIVERGENCES: list[dict[str, Any]] = [{"f_divergence": kind} for kind in ("reverse_kl", "forward_kl", "js")]
DIVERGENCES += [{"f_divergence": "alpha", "f_alpha": alpha} for alpha in (0.1, 0.5, 0.9)]
divergences = pytest.mark.parametrize("numbers", DIVERGENCES, ids=name_of)


def score(log_ratio: float, f_divergence: str, f_alpha: float = 0.5) -> float:
    """f'(u) that the modifier gives to the chosen side."""
    logps = with_log_ratios(log_ratio, 0.0)
    return float(with_divergence(logps, f_divergence=f_divergence, f_alpha=f_alpha).policy_chosen)


# which losses take which


@pytest.mark.parametrize(("name", "modifier"), ACCEPTED)
def test_a_modifier_that_is_listed_works(name: str, modifier: str) -> None:
    choice = LossChoice.of(name, ON[modifier])
    assert choice.terms[0].modifiers.items() >= ON[modifier].items()
    plain, modified = compute(LossChoice.of(name), random_logps()), compute(choice, random_logps())
    assert not close(plain.losses, modified.losses, 1e-8)
    assert modified.losses.isfinite().all()
    assert torch.equal(plain.chosen_rewards, modified.chosen_rewards) == (modifier == "weighting")


def test_a_modifier_that_is_not_listed_is_refused() -> None:
    refused = [(name, modifier.name) for name in CATALOGUE for modifier in MODIFIERS]
    refused = [pair for pair in refused if pair not in ACCEPTED]
    assert refused
    wrong = []
    for name, modifier in refused:
        value = ON[modifier][modifier]
        expected = f"--{modifier.replace('_', '-')}: {name} does not use it. Losses that do: dpo,"
        wrong += [(name, modifier, said) for said in [refusal(name, {modifier: value})] if expected not in said]
        expected = f"{name} does not use {modifier}. It takes "
        text = f"{name}({modifier}={value})"
        wrong += [(name, modifier, said) for said in [refusal(text, {})] if expected not in said]
    assert wrong == []


def refusal(text: str, numbers: Mapping[str, Value]) -> str:
    try:
        return f"not refused: {LossChoice.of(text, numbers)}"
    except UsageError as error:
        return str(error)


def test_which_losses_take_which_modifiers() -> None:
    """Each works with the losses that its paper defines it for, not with a likelihood term or a target per side."""
    by_modifier = {
        modifier.name: {name for name, accepted in ACCEPTED if accepted == modifier.name} for modifier in MODIFIERS
    }
    assert by_modifier == {
        "ld_alpha": {"dpo", "hinge", "robust"},
        "f_divergence": {"dpo", "dpo_norm", "hinge", "ipo"},
        "f_alpha": {"dpo", "dpo_norm", "hinge", "ipo"},
        "weighting": {"dpo", "dpo_norm", "hinge", "ipo"},
    }


@pytest.mark.parametrize(("name", "modifier"), ACCEPTED)
def test_a_modifier_that_is_off_is_no_setting(name: str, modifier: str) -> None:
    if modifier == "f_alpha":
        off: dict[str, Value] = {"f_divergence": "reverse_kl"}
    else:
        off = {modifier: optional_value(CATALOGUE[name].accepts[modifier].off)}
    assert LossChoice.of(name, off) == LossChoice.of(name)


def optional_value(value: Value | None) -> Value:
    assert value is not None
    return value


@pytest.mark.parametrize(
    ("modifier", "needs"),
    [("ld_alpha", {Need.TAILS}), ("f_divergence", set()), ("f_alpha", set()), ("weighting", {Need.COLLISION})],
)
def test_what_a_modifier_needs(modifier: str, needs: set[Need]) -> None:
    assert LossChoice.of("dpo", ON[modifier]).needs == needs | {Need.REFERENCE}
    assert LossChoice.of("dpo").needs == {Need.REFERENCE}


def test_all_modifiers_together() -> None:
    """First the tails, then the divergence on what is left, then the weight of the pair as it was."""
    logps = random_logps()
    numbers: dict[str, Value] = {"ld_alpha": 0.3, "f_divergence": "js", "weighting": "wpo", "beta": 0.3}
    bent = with_divergence(length_desensitized(logps, ld_alpha=0.3), f_divergence="js")
    expected = wpo_weights(logps) * LOSSES["dpo"](bent, beta=0.3).losses
    assert close(compute(LossChoice.of("dpo", numbers), logps).losses, expected)


# divergences


@divergences
def test_a_divergence_gives_the_derivative_of_its_formula(numbers: dict[str, Any]) -> None:
    for log_ratio in (-3.0, -0.5, 0.0, 0.25, 4.0):
        expected = DERIVATIVE[numbers["f_divergence"]](math.exp(log_ratio), numbers.get("f_alpha", math.nan))
        assert score(log_ratio, **numbers) == pytest.approx(expected, rel=1e-12, abs=1e-14), log_ratio


@divergences
def test_both_sides_and_nothing_else(numbers: dict[str, Any]) -> None:
    logps = random_logps()
    bent = with_divergence(logps, **numbers)
    for side in ("chosen", "rejected"):
        policy, reference = getattr(logps, f"policy_{side}"), getattr(logps, f"reference_{side}")
        expected = [score(log_ratio, **numbers) for log_ratio in (policy - reference).tolist()]
        ours = getattr(bent, f"policy_{side}") - getattr(bent, f"reference_{side}")
        assert close(ours, torch.tensor(expected, dtype=torch.float64), 1e-9)
    for column, values in logps.columns().items():
        if column not in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected"):
            assert getattr(bent, column) is values


def test_alpha_lies_between_the_two_kl_divergences() -> None:
    for log_ratio in (-2.0, -0.1, 0.7, 3.0):
        towards_0, towards_1 = score(log_ratio, "alpha", 1e-5), score(log_ratio, "alpha", 1 - 1e-5)
        assert towards_0 == pytest.approx(score(log_ratio, "reverse_kl"), abs=1e-4), log_ratio
        assert towards_1 == pytest.approx(score(log_ratio, "forward_kl"), abs=1e-3), log_ratio
        between = score(log_ratio, "alpha", 0.5)
        assert score(log_ratio, "forward_kl") < between < score(log_ratio, "reverse_kl"), log_ratio


@divergences
def test_the_score_rises_with_the_log_ratio(numbers: dict[str, Any]) -> None:
    scores = [score(log_ratio / 4, **numbers) for log_ratio in range(-80, 81)]
    assert scores == sorted(set(scores))


@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_rewards_are_beta_times_the_score(name: str) -> None:
    logps = random_logps()
    per_token = CATALOGUE[name].reward.per_token
    for numbers in DIVERGENCES:
        output = compute(LossChoice.of(name, {"beta": 0.3, **numbers}), logps)
        bent = with_divergence(logps, **numbers)
        chosen = bent.policy_chosen / (logps.chosen_tokens if per_token else 1)
        rejected = bent.policy_rejected / (logps.rejected_tokens if per_token else 1)
        assert close(output.chosen_rewards, 0.3 * chosen), numbers
        assert close(output.rejected_rewards, 0.3 * rejected), numbers
        assert close(output.losses, LOSSES[name](bent, beta=0.3).losses), numbers


@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_at_the_reference_a_divergence_changes_nothing(name: str) -> None:
    logps = at_the_reference(random_logps())
    plain = compute(LossChoice.of(name), logps)
    for numbers in DIVERGENCES:
        output = compute(LossChoice.of(name, numbers), logps)
        assert close(output.chosen_rewards, torch.zeros(7, dtype=torch.float64), 1e-14), numbers
        assert close(output.rejected_rewards, torch.zeros(7, dtype=torch.float64), 1e-14), numbers
        assert close(output.losses, plain.losses, 1e-12), numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
@pytest.mark.parametrize("numbers", [{"f_divergence": "forward_kl"}, {"f_divergence": "alpha", "f_alpha": 0.9}])
def test_where_the_score_would_overflow_it_continues_as_its_tangent(
    numbers: dict[str, Any], dtype: torch.dtype
) -> None:
    log_ratios = torch.tensor([-2e3, -1e3, -30.0], dtype=dtype, requires_grad=True)
    zeros, counts = torch.zeros(3, dtype=dtype), torch.ones(3, dtype=torch.int64)
    scores = with_divergence(PairLogps(log_ratios, zeros, zeros, zeros, counts, counts), **numbers).policy_chosen
    assert scores.isfinite().all()
    # Squares, of IPO, are finite too.
    assert (scores**2).isfinite().all()
    first, second, third = scores.tolist()
    assert first < second < third < 0
    slopes = gradients(scores, log_ratios)[0].tolist()
    assert slopes[0] == slopes[1] > 1  # an answer that fell so far is still pulled back


@pytest.mark.parametrize("name", WITH_DIVERGENCE)
def test_gradients_that_reach_the_tokens_are_finite(name: str) -> None:
    """Sums are float64, but the log-probs of tokens are float32, and their gradient is too."""
    falling = torch.linspace(-500.0, 20.0, 105, dtype=torch.float32, requires_grad=True)
    still = torch.full((105,), -100.0, dtype=torch.float64)
    count = torch.full((105,), 10)
    for numbers in DIVERGENCES:
        for sides in ((-100.0 + falling.double(), still), (still, -100.0 + falling.double())):
            logps = PairLogps(*sides, still, still, count, count)
            losses = compute(LossChoice.of(name, numbers), logps).losses
            assert losses.isfinite().all(), numbers
            (gradient,) = gradients(losses, falling)
            assert gradient.isfinite().all(), numbers


# LD-DPO


def test_an_alpha_of_1_changes_nothing() -> None:
    logps = random_logps()
    same = length_desensitized(logps, ld_alpha=1.0)
    for name, values in logps.columns().items():
        assert torch.equal(same.columns()[name], values), name


def test_an_alpha_of_0_sees_the_shared_tokens_alone() -> None:
    """Two tokens against five: the last three of the longer side are left out, of policy and reference."""
    policy, reference = [-1.0, -2.0, -4.0, -8.0, -16.0], [-1.5, -2.5, -3.5, -4.5, -5.5]
    zero = torch.zeros(1, dtype=torch.float64)

    def total(values: list[float]) -> Tensor:
        return torch.tensor([sum(values)], dtype=torch.float64)

    logps = PairLogps(
        policy_chosen=total(policy),
        policy_rejected=total([-0.5, -0.25]),
        reference_chosen=total(reference),
        reference_rejected=total([-1.0, -1.0]),
        chosen_tokens=torch.tensor([5]),
        rejected_tokens=torch.tensor([2]),
        policy_chosen_tail=total(policy[2:]),
        policy_rejected_tail=zero,
        reference_chosen_tail=total(reference[2:]),
        reference_rejected_tail=zero,
    )
    shared = length_desensitized(logps, ld_alpha=0.0)
    assert (float(shared.policy_chosen), float(shared.policy_rejected)) == (-3.0, -0.75)
    assert float(optional(shared.reference_chosen)) == -4.0
    assert float(optional(shared.reference_rejected)) == -2.0
    half = length_desensitized(logps, ld_alpha=0.5)
    assert (float(half.policy_chosen), float(optional(half.reference_chosen))) == (-17.0, -10.75)
    # Log-ratios 1 and 1.25; over all its tokens, the longer side's would be -13.5.
    output = compute(LossChoice.of("dpo", {"ld_alpha": 0.0, "beta": 0.1}), logps)
    assert float(output.chosen_rewards) == pytest.approx(0.1)
    assert float(output.rejected_rewards) == pytest.approx(0.125)
    assert float(output.losses) == pytest.approx(math.log1p(math.exp(0.025)))


def test_what_the_tails_hold_does_not_count_at_an_alpha_of_0() -> None:
    logps = random_logps()
    moved = replace(
        logps,
        policy_chosen=logps.policy_chosen + 5.0,
        policy_chosen_tail=optional(logps.policy_chosen_tail) + 5.0,
        reference_rejected=optional(logps.reference_rejected) - 3.0,
        reference_rejected_tail=optional(logps.reference_rejected_tail) - 3.0,
    )
    for name in ("dpo", "hinge", "robust"):
        none, some = (LossChoice.of(name, {"beta": 0.3, "ld_alpha": alpha}) for alpha in (0.0, 0.1))
        assert close(compute(none, moved).losses, compute(none, logps).losses)
        assert not close(compute(some, moved).losses, compute(some, logps).losses, 1e-3)


@pytest.mark.parametrize("alpha", [0.0, 0.4])
def test_at_the_reference_there_is_no_margin_whatever_the_lengths(alpha: float) -> None:
    logps = replace(
        at_the_reference(logps := random_logps()),
        reference_chosen_tail=logps.policy_chosen_tail,
        reference_rejected_tail=logps.policy_rejected_tail,
    )
    output = compute(LossChoice.of("dpo", {"ld_alpha": alpha}), logps)
    assert close(output.losses, torch.full_like(output.losses, math.log(2)))
    assert close(output.chosen_rewards, torch.zeros(7, dtype=torch.float64), 1e-12)


def test_the_gradient_of_the_tails_is_less_by_alpha() -> None:
    logps = learned(random_logps())
    tail = optional(logps.policy_chosen_tail).clone().requires_grad_()
    losses = compute(LossChoice.of("dpo", {"ld_alpha": 0.3}), replace(logps, policy_chosen_tail=tail)).losses
    whole, of_the_tail = gradients(losses, logps.policy_chosen, tail)
    assert close(whole + of_the_tail, 0.3 * whole)


# WPO


def weights_of(chosen: float, rejected: float, collision: float = 0.0) -> Tensor:
    """Of a pair of 4 and 2 tokens with these sums."""

    def column(value: float) -> Tensor:
        return torch.tensor([value], dtype=torch.float64)

    return wpo_weights(
        PairLogps(
            *(column(chosen), column(rejected), None, None, torch.tensor([4]), torch.tensor([2])),
            *(column(collision), column(collision)),
        )
    )


def test_weights_are_means_per_token() -> None:
    assert float(weights_of(-4.0, -1.0)) == pytest.approx(math.exp(-1.0 - 0.5))
    assert float(weights_of(-4.0, -1.0, collision=-2.0)) == pytest.approx(math.exp(-0.5 + 0.5))


def test_the_product_of_the_weights_is_clamped_to_1_not_each() -> None:
    assert float(weights_of(-8.0, -2.0, collision=-4.0)) == pytest.approx(1.0)  # exp(-1) and exp(+1)
    assert float(weights_of(-4.0, -1.0, collision=-4.0)) == 1.0  # 1 and exp(1.5)
    assert float(weights_of(-8.0, -3.0, collision=-4.0)) == pytest.approx(math.exp(-0.5))  # exp(-1) and exp(0.5)
    weights = wpo_weights(random_logps(pairs=60))
    assert ((weights > 0) & (weights <= 1)).all()
    assert 0 < int((weights == 1).sum()) < 60


@pytest.mark.parametrize("name", [name for name, modifier in ACCEPTED if modifier == "weighting"])
def test_weights_multiply_the_loss_and_take_no_gradient(name: str) -> None:
    logps = learned(random_logps())
    leaves = logps.policy_chosen, logps.policy_rejected
    weights = wpo_weights(logps)
    assert not weights.requires_grad
    weighted = compute(LossChoice.of(name, {"weighting": "wpo"}), logps)
    plain = compute(LossChoice.of(name), logps)
    assert close(weighted.losses, weights * plain.losses)
    assert torch.equal(weighted.chosen_rewards, plain.chosen_rewards)
    assert torch.equal(weighted.rejected_rewards, plain.rejected_rewards)
    for mine, other in zip(gradients(weighted.losses, *leaves), gradients(plain.losses, *leaves), strict=True):
        assert close(mine, weights * other)
