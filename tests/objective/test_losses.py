"""What the formulas of the losses promise: needs, rewards, gradients, invariances, limits.

`test_goldens` compares values with public implementations; here each test loops over the variants of a loss.
"""

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
from dpocli.objective.losses import LOSSES, NEXT_STATE, States, compute, next_states
from dpocli.objective.losses.modifiers import wpo_weights
from dpocli.objective.losses.reference_free import alphapo
from dpocli.objective.metrics import batch_loss, pair_metrics
from tests.objective.random_logps import (
    ON,
    PAIRS,
    STATES,
    at_the_reference,
    choice_of,
    close,
    gradients,
    learned,
    losses_of,
    moved,
    name_of,
    optional,
    output_of,
    own_variants,
    permuted,
    random_logps,
    variants,
    with_log_ratios,
    with_policy,
)

LN2 = math.log(2)

Numbers = dict[str, Value]


@dataclass(frozen=True)
class NotMonotone:
    """A move of both sides' log-ratios, the chosen one up and the rejected one down, that raises the loss."""

    numbers: Numbers
    start: tuple[float, float]
    move: tuple[float, float] = (0.5, -0.5)


@dataclass(frozen=True)
class Promise:
    """What holds of a loss's formula. The defaults hold of most; a test fails where one does not."""

    margin_alone: Numbers | None = None
    """The numbers with which the loss depends on the margin of sums alone; None: with none."""
    scaling: int | None = 0
    """Log-probs times s and beta over s multiply the loss by s to this power; None: by no power."""
    monotone: NotMonotone | str = "each pair"
    """Chosen up and rejected down never raise the loss of "each pair", or the mean of the "batch"."""
    at_the_reference: float | None = LN2
    """The loss of any pair of which the policy says what the reference says; None: it depends on the pair."""


IPO_TARGET = 1 / 0.6
"""1/(2 beta) at a beta of 0.3."""

PROMISES: Mapping[str, Promise] = {
    "dpo": Promise(margin_alone={}),
    "dpo_reference_free": Promise(margin_alone={}),
    "wpo": Promise(margin_alone={}, at_the_reference=None),
    "robust": Promise(margin_alone={}),
    # Surer than 1 - e.
    "exo_pair": Promise(
        margin_alone={},
        monotone=NotMonotone({"beta": 1.0}, (4.0, -4.0)),
        at_the_reference=-LN2 - 0.5 * (math.log(0.999) + math.log(0.001)),
    ),
    # The ridge between its two losses.
    "discopop": Promise(
        margin_alone={},
        monotone=NotMonotone({"beta": 0.05}, (0.0, 0.0), (1.0, -1.0)),
        at_the_reference=0.5 * LN2 + 0.5,
    ),
    "r_dpo": Promise(margin_alone={}, at_the_reference=None),
    "hinge": Promise(margin_alone={}, at_the_reference=1.0),
    # Beyond its target.
    "ipo": Promise(
        margin_alone={"reduction": "sum"},
        scaling=2,
        monotone=NotMonotone({"beta": 0.5}, (2.0, 0.0)),
        at_the_reference=IPO_TARGET**2,
    ),
    # More than its anchor asks of the chosen side.
    "nca_pair": Promise(monotone=NotMonotone({"beta": 1.0}, (2.0, -9.0)), at_the_reference=2 * LN2),
    "bco_pair": Promise(at_the_reference=2 * LN2),
    "sppo_hard": Promise(
        scaling=2, monotone=NotMonotone({"beta": 0.5}, (1.0, -1.0)), at_the_reference=2 * IPO_TARGET**2
    ),
    "apo_zero": Promise(at_the_reference=1.0),
    # The chosen side falls.
    "apo_down": Promise(monotone=NotMonotone({"beta": 1.0}, (0.0, -9.0)), at_the_reference=1.0),
    "cal_dpo": Promise(
        scaling=None, monotone=NotMonotone({"beta": 0.5}, (3.0, -3.0)), at_the_reference=LN2 + IPO_TARGET**2
    ),
    "alphapo": Promise(scaling=None),
    "cpo": Promise(margin_alone={"sft_weight": 0.0}, scaling=None),
    "orpo": Promise(scaling=None),
    "slic": Promise(margin_alone={"sft_weight": 0.0}, scaling=None),
    "sft": Promise(scaling=1),
    "rpo": Promise(margin_alone={"sft_weight": 0.0}, scaling=None, at_the_reference=None),
    # A pair may change its rank, but none of the sorted differences falls.
    "aot": Promise(margin_alone={}, monotone="batch"),
    "aot_unpaired": Promise(margin_alone={}, monotone="batch"),
    # Other pairs raise the beta of the batch.
    "beta_dpo": Promise(margin_alone={}, monotone="has its own test"),
}

NAMES = sorted(LOSSES)
VARIANTS = [(name, numbers) for name in NAMES for numbers in variants(name)]
each_loss = pytest.mark.parametrize("name", NAMES)


def promise(name: str) -> Promise:
    return PROMISES.get(name, Promise())


def states_of(name: str) -> States:
    """The state of beta_dpo, without which its beta is that of no batch."""
    return STATES if name == "beta_dpo" else {}


# the catalogue


def test_the_catalogue_is_what_is_implemented() -> None:
    assert CATALOGUE.keys() == LOSSES.keys() >= PROMISES.keys()
    assert {name for name, spec in CATALOGUE.items() if spec.stateful} == NEXT_STATE.keys()
    assert {name for name, loss in LOSSES.items() if loss.__name__ != name} == set()
    assert ON.keys() == {modifier.name for modifier in MODIFIERS}
    assert [name for name, spec in CATALOGUE.items() if spec.beta is None] == ["sft"]
    assert close(LOSSES["sft"](random_logps(), beta=7.0).losses, LOSSES["sft"](random_logps()).losses)


def test_the_catalogue_declares_the_keywords_of_the_functions() -> None:
    for name, spec in CATALOGUE.items():
        (logps, *keywords) = inspect.signature(LOSSES[name]).parameters.values()
        assert logps.name == "logps", name
        assert all(keyword.kind is inspect.Parameter.KEYWORD_ONLY for keyword in keywords), name
        # Of sft, beta is the only one with a default: it is not used.
        beta = inspect.Parameter.empty if spec.beta is not None else 1.0
        expected = {"beta": beta} | spec.defaults | ({"state": None} if spec.stateful else {})
        assert {keyword.name: keyword.default for keyword in keywords} == expected, name
    for name, next_state in NEXT_STATE.items():
        assert inspect.signature(next_state).parameters.keys() == {"logps", "state", "beta", *CATALOGUE[name].defaults}


@each_loss
def test_every_number_changes_something(name: str) -> None:
    logps, states = random_logps(), states_of(name)
    plain = losses_of(name, logps, states)
    if CATALOGUE[name].beta is not None:
        assert not close(losses_of(name, logps, beta=0.4), losses_of(name, logps), 1e-6)
    for numbers in variants(name)[1:]:
        if "beta_dpo_momentum" in numbers:  # it acts on the state alone
            ours, others = (next_states(choice_of(name, **given), logps, states)[name] for given in (numbers, {}))
            assert ours["mean"] != others["mean"]
        else:
            assert ((losses_of(name, logps, states, **numbers) - plain).abs() > 1e-6).any(), numbers


# what a loss needs


@each_loss
def test_what_a_loss_needs_is_what_it_reads(name: str) -> None:
    """Columns that it does not need may be absent or NaN, and other pairs too, unless it needs the whole batch."""
    logps, states = random_logps(), states_of(name)
    absent: dict[str, Any] = dict.fromkeys(("reference_chosen", "reference_rejected"))
    nan = torch.full((PAIRS,), math.nan, dtype=torch.float64)
    for numbers in variants(name):
        choice = choice_of(name, **numbers)
        names = LogpColumns.by(choice.needs, has_reference=choice.needs_reference).names
        needed = {column: values for column, values in logps.columns().items() if column in names}
        expected = compute(choice, logps)
        others_are_nan = replace(logps, **{column: nan for column in logps.columns() if column not in names})
        for found in (compute(choice, PairLogps(**absent | needed)), compute(choice, others_are_nan)):
            for field in ("losses", "chosen_rewards", "rejected_rewards"):
                assert getattr(found, field).shape == (PAIRS,), numbers
                assert torch.equal(getattr(found, field), getattr(expected, field)), numbers
        for column in needed.keys() - LogpColumns().names:
            removed: dict[str, Any] = {column: None}
            with pytest.raises((AssertionError, TypeError)):
                compute(choice, replace(logps, **removed))
        alone = [compute(choice, permuted(logps, torch.tensor([pair])), states).losses for pair in range(PAIRS)]
        assert close(compute(choice, logps, states).losses, torch.cat(alone)) != choice.is_whole_batch, numbers


def test_delta_none_leaves_no_need_of_the_whole_batch() -> None:
    for numbers in ({}, {"delta": "none"}, {"delta": "running"}):
        assert (Need.WHOLE_BATCH in choice_of("bco_pair", **numbers).needs) == (numbers != {"delta": "none"})


# rewards


@each_loss
def test_rewards_are_what_the_catalogue_declares(name: str) -> None:
    logps, declared = random_logps(), CATALOGUE[name].reward
    assert str(declared).startswith("beta x ") == declared.times_beta
    assert ("mean" in str(declared), "log-ratio" in str(declared)) == (declared.per_token, declared.log_ratio)
    for numbers in variants(name):
        output = output_of(name, learned(logps), **numbers)
        assert output.losses.requires_grad, numbers
        assert not output.chosen_rewards.requires_grad, numbers
        assert not output.rejected_rewards.requires_grad, numbers
    if name == "alphapo":  # they are bent by its alpha: see the next test
        return
    for numbers in own_variants(name):
        output = output_of(name, logps, **numbers)
        per_token = declared.per_token and not (name == "ipo" and numbers.get("reduction") == "sum")
        for rewards, policy, reference, tokens in (
            (output.chosen_rewards, logps.policy_chosen, logps.reference_chosen, logps.chosen_tokens),
            (output.rejected_rewards, logps.policy_rejected, logps.reference_rejected, logps.rejected_tokens),
        ):
            expected = policy - optional(reference) if declared.log_ratio else policy
            expected = expected / tokens if per_token else expected
            assert close(rewards, 0.3 * expected if declared.times_beta else expected), numbers


def test_rewards_of_alphapo_rise_with_the_mean_logp() -> None:
    logps = random_logps(pairs=40)
    means = torch.cat([logps.policy_chosen / logps.chosen_tokens, logps.policy_rejected / logps.rejected_tokens])
    for alpha in (0.25, -0.5, 0.0):
        output = output_of("alphapo", logps, alphapo_alpha=alpha)
        rewards = torch.cat([output.chosen_rewards, output.rejected_rewards])
        assert torch.equal(rewards.argsort(), means.argsort()), alpha
        # At a certain answer the slope is beta, whatever alpha is.
        near_zero = replace(logps, policy_chosen=-1e-6 * logps.chosen_tokens.double())
        slopes = output_of("alphapo", near_zero, alphapo_alpha=alpha).chosen_rewards / -1e-6
        assert close(slopes, torch.full_like(slopes, 0.3), 1e-5), alpha


# gradients

LEARNED = ("policy_chosen", "policy_rejected", "policy_chosen_tail", "policy_rejected_tail")
WEIGHTS = torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0, 1.0, 3.0], dtype=torch.float64)


@each_loss
def test_gradients_by_finite_differences(name: str) -> None:
    """Along random directions through all pairs and columns, for random sums of the pairs' losses.

    beta_dpo without a state has the base beta; bco_pair's shift is held by one.
    """
    logps, step = random_logps(), 1e-6
    generator = torch.Generator().manual_seed(0)
    states = {"bco_pair": STATES["bco_pair"]}
    columns = [optional(getattr(logps, column)) for column in LEARNED]

    def loss(sums: list[Tensor], numbers: Numbers, weights: Tensor) -> Tensor:
        chosen, rejected, chosen_tail, rejected_tail = sums
        tails = {"policy_chosen_tail": chosen_tail, "policy_rejected_tail": rejected_tail}
        return weights @ losses_of(name, replace(with_policy(logps, chosen, rejected), **tails), states, **numbers)

    for numbers in variants(name):
        for _ in range(3):
            weights, *direction = torch.randn(5, PAIRS, generator=generator, dtype=torch.float64)
            leaves = [column.clone().requires_grad_() for column in columns]
            found = torch.autograd.grad(loss(leaves, numbers, weights), leaves, allow_unused=True)
            ahead, behind = (
                loss([column + sign * way for column, way in zip(columns, direction, strict=True)], numbers, weights)
                for sign in (step, -step)
            )
            slope = sum(float(one @ way) for one, way in zip(found, direction, strict=True) if one is not None)
            assert float(ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-6, abs=1e-7), numbers


def test_the_gradient_of_a_batch_in_two_steps() -> None:
    """First with respect to the log-probs of all pairs, then from the log-probs on, micro-batch by micro-batch."""
    logps = random_logps()
    for name, numbers in VARIANTS:
        choice = choice_of(name, **numbers)
        leaves = {column: optional(getattr(logps, column)).clone().requires_grad_() for column in LEARNED}
        whole = batch_loss(compute(choice, replace(logps, **leaves), STATES).losses, WEIGHTS)
        expected = torch.autograd.grad(whole, list(leaves.values()), allow_unused=True)
        found = batch_gradient(choice, logps, WEIGHTS, STATES)
        assert found.keys() == leaves.keys()
        for column, gradient in zip(LEARNED, expected, strict=True):
            assert close(found[column], torch.zeros(PAIRS).double() if gradient is None else gradient), (name, numbers)
        for part in (torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5, 6])):
            of_part = {column: values[part] for column, values in found.items()}
            torch.autograd.backward(with_gradient(permuted(replace(logps, **leaves), part), of_part))
        for column, leaf in leaves.items():
            assert close(optional(leaf.grad), found[column]), (name, numbers)


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
    assert close(output.chosen_rewards, 0.3 * log_ratios[0])  # the base beta
    # Without a state the batch is what is usual; and beta stays above zero.
    assert close(losses_of("beta_dpo", random_logps()), losses_of("dpo", random_logps()))
    far = with_log_ratios(-20.0, 20.0)
    assert close(losses_of("beta_dpo", far, STATES), losses_of("dpo", far, beta=1e-3))


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


# invariances

CONSTANTS = torch.tensor([0.7, -1.3, 2.0, 0.1, -0.4, 3.0, -2.5], dtype=torch.float64)
ONE_CONSTANT = torch.full((PAIRS,), 0.7, dtype=torch.float64)
ZEROS = torch.zeros(PAIRS, dtype=torch.float64)


def test_only_the_log_ratio_to_the_reference_counts() -> None:
    """The same constant added to policy and reference."""
    logps, wrong = random_logps(), []
    for name in NAMES:
        has_reference = CATALOGUE[name].needs_reference
        # aot sorts the margins of policy and reference apart: only the same constant for all pairs changes nothing.
        constants = ONE_CONSTANT if name == "aot" else CONSTANTS
        for side, added in (("chosen", (constants, ZEROS)), ("rejected", (ZEROS, constants))):
            same = close(losses_of(name, moved(logps, *added, reference=has_reference)), losses_of(name, logps))
            # rpo and sft raise the likelihood of the chosen answer itself.
            if same != (side == "rejected" if name in ("rpo", "sft") else has_reference):
                wrong.append((name, side))
    assert wrong == []


def test_only_the_margin_counts() -> None:
    """The same constant added to both sides of the policy."""
    logps, wrong = random_logps(), []
    for name in NAMES:
        margin_alone = promise(name).margin_alone
        # aot_unpaired sorts the two sides apart: only the same constant for all pairs changes nothing.
        constants = ONE_CONSTANT if name == "aot_unpaired" else CONSTANTS
        for numbers in ({}, margin_alone or {}):
            shifted, plain = (
                losses_of(name, given, STATES, **numbers) for given in (moved(logps, constants, constants), logps)
            )
            if close(shifted, plain) != (numbers == margin_alone):
                wrong.append((name, numbers))
    assert wrong == []


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_sorted_apart_pairs_do_not_keep_together(name: str) -> None:
    logps = random_logps()
    both_sides = moved(logps, CONSTANTS, CONSTANTS)
    assert close(losses_of(name, both_sides), losses_of(name, logps)) == (name == "aot")
    both_models = moved(logps, CONSTANTS, ZEROS, reference=True)
    assert close(losses_of(name, both_models), losses_of(name, logps)) == (name == "aot_unpaired")


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_aot_by_hand(name: str) -> None:
    """The k-th smallest of the one against the k-th smallest of the other; a loss belongs to the pair of rank k."""
    logps = random_logps()
    chosen, rejected = logps.policy_chosen, logps.policy_rejected
    reference_chosen, reference_rejected = optional(logps.reference_chosen), optional(logps.reference_rejected)
    if name == "aot":
        first, second = (chosen - rejected).tolist(), (reference_chosen - reference_rejected).tolist()
    else:
        first, second = (chosen - reference_chosen).tolist(), (rejected - reference_rejected).tolist()
    expected = [math.log1p(math.exp(-0.3 * (mine - sorted(second)[sorted(first).index(mine)]))) for mine in first]
    assert close(losses_of(name, logps), torch.tensor(expected, dtype=torch.float64))


SCALE = 2.5


def scaled(logps: PairLogps) -> PairLogps:
    return replace(
        with_policy(logps, SCALE * logps.policy_chosen, SCALE * logps.policy_rejected),
        reference_chosen=SCALE * optional(logps.reference_chosen),
        reference_rejected=SCALE * optional(logps.reference_rejected),
    )


def test_only_beta_times_the_log_probs_counts() -> None:
    logps, wrong = random_logps(), []
    for name in NAMES:
        power = promise(name).scaling
        numbers = {} if CATALOGUE[name].beta is None else {"beta": 0.3 / SCALE}
        expected = SCALE ** (power or 0) * losses_of(name, logps)
        if close(losses_of(name, scaled(logps), **numbers), expected) != (power is not None):
            wrong.append(name)
    assert wrong == []


def test_losses_of_more_than_beta_times_the_log_probs_scale_with_their_other_numbers() -> None:
    logps = random_logps()
    for name, own in (("rpo", "sft_weight"), ("cpo", "sft_weight"), ("alphapo", "alphapo_alpha")):
        numbers = {own: float(CATALOGUE[name].defaults[own]) / SCALE}
        assert close(losses_of(name, scaled(logps), beta=0.3 / SCALE, **numbers), losses_of(name, logps)), name
    assert close(losses_of("slic", scaled(logps), beta=0.3 * SCALE), SCALE * losses_of("slic", logps))


def test_permuting_the_pairs_permutes_losses_and_rewards() -> None:
    order = torch.tensor([3, 0, 6, 2, 5, 1, 4])
    for name, numbers in VARIANTS:
        straight = output_of(name, random_logps(), STATES, **numbers)
        shuffled = output_of(name, permuted(random_logps(), order), STATES, **numbers)
        for field in ("losses", "chosen_rewards", "rejected_rewards"):
            assert close(getattr(shuffled, field), getattr(straight, field)[order]), (name, field, numbers)
        assert len(set(straight.losses.tolist())) == PAIRS or name in ("hinge", "simpo_hinge", "slic"), name


# chosen up and rejected down


@pytest.mark.parametrize("name", [name for name in NAMES if name != "beta_dpo"])
def test_chosen_up_and_rejected_down(name: str) -> None:
    monotone = promise(name).monotone
    if isinstance(monotone, NotMonotone):
        (chosen, rejected), (up, down) = monotone.start, monotone.move
        assert up > 0 > down
        before, after = (
            losses_of(name, with_log_ratios(*at), **monotone.numbers)
            for at in ((chosen, rejected), (chosen + up, rejected + down))
        )
        assert float(after) > float(before) + 1e-6
        return
    for seed in range(3):
        logps, generator = random_logps(seed, pairs=30), torch.Generator().manual_seed(seed)
        higher, lower = 3 * torch.rand(2, 30, generator=generator, dtype=torch.float64) ** 2
        # A probability is at most 1.
        further = with_policy(logps, (logps.policy_chosen + higher).clamp(max=0.0), logps.policy_rejected - lower)
        losses, then = losses_of(name, logps, STATES), losses_of(name, further, STATES)
        if monotone == "batch":
            losses, then = losses.sum(), then.sum()
        assert (then <= losses + 1e-12).all(), seed
        assert (then < losses).any(), seed


def test_beta_dpo_is_not_monotone_where_others_raise_the_beta_of_the_batch() -> None:
    logps = random_logps()
    reference_margin = optional(logps.reference_chosen) - optional(logps.reference_rejected)
    wrong = int((logps.policy_chosen - logps.policy_rejected - reference_margin).argmin())
    up = torch.full((PAIRS,), 5.0, dtype=torch.float64)
    up[wrong] = 0.01
    raised = losses_of("beta_dpo", moved(logps, up, ZEROS), STATES)
    assert (raised > losses_of("beta_dpo", logps, STATES))[wrong]


# extremes

EXTREME_MODIFIERS: tuple[Numbers, ...] = (
    {"ld_alpha": 0.0},
    {"f_divergence": "forward_kl"},
    {"f_divergence": "js"},
    {"f_divergence": "alpha", "f_alpha": 0.1},
    {"f_divergence": "alpha", "f_alpha": 0.9},
    {"weighting": "wpo"},
)


@each_loss
def test_values_rewards_and_gradients_stay_finite_at_extremes(name: str) -> None:
    """Margins of ±1000 nats at log-probs of -10,000, and a policy that is certain; the paper's beta.

    Sums are float64, but the log-probs of tokens, to which the gradient goes, are float32.
    """
    modifiers = [given for given in EXTREME_MODIFIERS if given.keys() <= CATALOGUE[name].accepts.keys()]
    for dtype in (torch.float32, torch.float64):
        for numbers in own_variants(name) + modifiers:
            leaves, logps = extreme_logps(dtype)
            output = compute(LossChoice.of(name, numbers), logps)
            for values in (output.losses, output.chosen_rewards, output.rejected_rewards):
                assert values.isfinite().all(), (dtype, numbers)
                assert values.dtype == dtype, (dtype, numbers)
            found = torch.autograd.grad(output.losses.sum(), leaves, allow_unused=True)
            assert found[0] is not None
            assert (found[0] != 0).any(), (dtype, numbers)
            for gradient in found:
                assert gradient is None or gradient.isfinite().all(), (dtype, numbers)


def extreme_logps(dtype: torch.dtype) -> tuple[list[Tensor], PairLogps]:
    """float32 leaves of the columns that are learned, and pairs of them."""

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
    return leaves, PairLogps(
        *(chosen, rejected, reference_chosen, reference_rejected, count + 2, count),
        *(column(*[-5.0] * 8), column(*[-1e4] * 8)),
        *(*tails, column(*[-40.0] * 8), column(*[0.0] * 8)),
    )


def test_orpo_of_a_certain_answer() -> None:
    for tokens in (1, 1000):
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


def test_sums_that_have_a_name() -> None:
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


def test_at_the_reference_no_loss_sees_a_margin() -> None:
    logps = at_the_reference(random_logps())
    of_the_pair = {
        "wpo": LN2 * wpo_weights(logps),
        "rpo": LN2 - logps.policy_chosen / logps.chosen_tokens,
        "r_dpo": -F.logsigmoid(0.01 * (logps.chosen_tokens - logps.rejected_tokens).double()),
    }
    for name in (name for name in NAMES if CATALOGUE[name].needs_reference):
        output, constant = output_of(name, logps), promise(name).at_the_reference
        assert (output.chosen_rewards == 0).all(), name
        assert (output.rejected_rewards == 0).all(), name
        expected = of_the_pair[name] if constant is None else torch.full_like(output.losses, constant)
        assert close(output.losses, expected), name


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
