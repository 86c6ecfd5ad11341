"""The losses against the numbers of the public implementations, case by case."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dpocli.config.loss_expression import LossChoice
from dpocli.errors import UsageError
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LOSSES, compute
from dpocli.objective.losses.modifiers import length_desensitized, wpo_weights
from dpocli.objective.metrics import pair_metrics
from tests.objective.golden_cases import (
    GOLDENS,
    MISMATCHES,
    Case,
    Ours,
    column,
    difference,
    logps_named,
    nearest,
    ours,
    reward_difference,
    tolerance,
)

CASES: list[Case] = GOLDENS["cases"]
MATCHED = [(case, made) for case in CASES if isinstance(made := ours(case), Ours)]
OTHERS = [(case, reason) for case in CASES if isinstance(reason := ours(case), str)]


def name_of(value: Any) -> str:
    if not isinstance(value, dict):
        return "" if isinstance(value, Ours) else str(value).split(":")[0].replace(" ", "_")
    source = value["source"].split("/")[1].split(":")[0]
    return f"{value['variant']}-{source}-{value['input_set']}-" + ",".join(
        f"{key}={given}" for key, given in value["params"].items()
    )


# what we match


@pytest.mark.parametrize(("case", "made"), MATCHED, ids=name_of)
def test_losses_and_rewards_are_those_of_the_source(case: Case, made: Ours) -> None:
    assert difference(case, made) <= tolerance(case)
    difference_of_rewards = reward_difference(case, made)
    assert difference_of_rewards is None or difference_of_rewards <= tolerance(case)


def test_nothing_that_is_compared_is_infinite_or_no_number() -> None:
    for case, made in MATCHED:
        output = made.output(case["input_set"])
        for values in (output.losses, output.chosen_rewards, output.rejected_rewards, column(case["losses"])):
            assert values.isfinite().all(), name_of(case)


@pytest.mark.parametrize("wrong", [1e-8, -1e-8])
def test_the_comparison_sees_a_small_difference(wrong: float) -> None:
    case, made = next((case, made) for case, made in MATCHED if made.loss == "dpo" and case["dtype"] == "float64")
    off = {**case, "losses": [*case["losses"][:-1], case["losses"][-1] + wrong]}
    assert difference(off, made) > tolerance(case)
    off = {**case, "rejected_rewards": [*case["rejected_rewards"][:-1], case["rejected_rewards"][-1] + wrong]}
    found = reward_difference(off, made)
    assert found is not None
    assert found > tolerance(case)


def test_every_loss_has_public_numbers_but_the_one_without_public_code() -> None:
    seen = {term.name for _, made in MATCHED for term in LossChoice.of(made.loss).terms}
    assert seen == LOSSES.keys() - {"r_dpo"}


def test_the_rewards_of_most_losses_are_compared_too() -> None:
    seen = {
        term.name
        for case, made in MATCHED
        if reward_difference(case, made) is not None
        for term in LossChoice.of(made.loss).terms
    }
    # Where no source reports what the loss ranks by, test_losses holds the rewards against their definition alone.
    assert seen == LOSSES.keys() - {"cal_dpo", "dpo_reference_free", "dpop", "r_dpo"}


def test_r_dpo_by_hand() -> None:
    """Margin 2 nats; 20 tokens more on the chosen side: sigmoid(0.1 * 2 + 0.01 * 20)."""
    logps = PairLogps(
        column([-10.0]), column([-12.0]), column([-11.0]), column([-11.0]), torch.tensor([30]), torch.tensor([10])
    )
    output = compute(LossChoice.of("r_dpo", {"beta": 0.1, "r_dpo_alpha": 0.01}), logps)
    torch.testing.assert_close(output.losses, column([0.5130152523999526]), rtol=0, atol=1e-12)
    torch.testing.assert_close(output.chosen_rewards, column([0.1]))
    torch.testing.assert_close(output.rejected_rewards, column([-0.1]))


# what we deliberately do not match


def test_every_deliberate_mismatch_is_of_some_case() -> None:
    assert MISMATCHES.keys() == {
        key for key in MISMATCHES for case, _ in OTHERS if key[0] == case["variant"] and key[1] in case["source"]
    }


def is_ours(loss: str) -> bool:
    try:
        return bool(LossChoice.of(loss))
    except UsageError:
        return False


DIFFERENT: list[tuple[Case, str, Ours]] = []
ABSENT: list[tuple[Case, str, str]] = []
for _case, _reason in OTHERS:
    _made = nearest(_case)
    if isinstance(_made, Ours) and is_ours(_made.loss):
        # The sums of main8 hold no per-token values, so our WPO cannot be computed on them.
        if _case["variant"] != "wpo_open_instruct" or _case["input_set"] == "tokens4":
            DIFFERENT.append((_case, _reason, _made))
    else:
        ABSENT.append((_case, _reason, _made if isinstance(_made, str) else _made.loss))


@pytest.mark.parametrize(("case", "reason", "made"), DIFFERENT, ids=name_of)
def test_a_deliberate_mismatch_differs(case: Case, reason: str, made: Ours) -> None:
    assert difference(case, made) > 1e3 * tolerance(case)


def test_what_is_absent_is_refused_or_of_no_paper() -> None:
    assert {case["variant"] for case, _, _ in ABSENT} == (
        {"kto", "kto_pair", "tdpo1", "tdpo2", "cpo_hinge", "cpo_ipo", "fdiv_alpha_sigmoid", "fdiv_alpha_hinge"}
    )
    for case, reason, name in ABSENT:
        if reason.startswith("refused"):
            with pytest.raises(UsageError, match=r"; nearest here (is|are) "):
                LossChoice.of(name)
        elif reason.startswith("no such loss"):
            with pytest.raises(UsageError, match=f"there is no loss {name}"):
                LossChoice.of(name)
        else:
            with pytest.raises(UsageError, match="must be above 0 for dpo"):
                LossChoice.of("dpo", {"f_divergence": "alpha", "f_alpha": case["params"]["trl0_alpha"]})


def loss_as_they_have_it(case: Case, reason: str) -> Tensor | None:
    """What a reason says that the source computes, from our parts; None where these do not suffice."""
    logps, beta = logps_named(case["input_set"]), float(case["params"]["beta"])

    def of(loss: str, **given: float) -> Tensor:
        return compute(LossChoice.of(loss, {"beta": beta, **given}), logps).losses

    if reason == "ignores label smoothing under its plain sigmoid loss":
        return of("dpo")
    if reason == "computes the sigmoid loss":  # of log-probs that it has averaged, where it was asked for ipo
        return of("dpo_norm" if case["variant"] == "ipo" else "dpo")
    if reason.startswith("one mean over all tokens of the micro-batch"):
        likelihood = -logps.policy_chosen.sum() / logps.chosen_tokens.sum()
        if case["variant"] == "sft":
            return likelihood.expand(len(logps))
        if case["variant"] == "mpo":
            return of("0.8*dpo+0.2*bco_pair") + likelihood
        return of("dpo") + float(case["params"]["rpo_alpha"]) * likelihood
    if reason.startswith("alpha on the policy only"):
        bent = length_desensitized(logps, ld_alpha=case["params"]["ld_alpha"])
        half_bent = replace(bent, reference_chosen=logps.reference_chosen, reference_rejected=logps.reference_rejected)
        return LOSSES["dpo"](half_bent, beta=beta).losses
    if reason == "takes sums for means":
        smoothing = case["params"].get("label_smoothing", 0.0)
        weights = torch.exp(logps.policy_chosen + logps.policy_rejected)
        return weights * of("dpo", label_smoothing=smoothing)
    if reason.startswith("does not clamp the weight"):
        weights = column(case["weights_chosen"]) * column(case["weights_rejected"])
        torch.testing.assert_close(weights.clamp(max=1), wpo_weights(logps))
        made = nearest(case)
        assert isinstance(made, Ours)
        return compute(LossChoice.of(made.loss, made.numbers), logps).losses / wpo_weights(logps) * weights
    return None


REASONED = [(case, reason) for case, reason in OTHERS if loss_as_they_have_it(case, reason) is not None]


@pytest.mark.parametrize(("case", "reason"), REASONED, ids=name_of)
def test_a_deliberate_mismatch_is_for_the_stated_reason(case: Case, reason: str) -> None:
    theirs = loss_as_they_have_it(case, reason)
    assert theirs is not None
    torch.testing.assert_close(theirs, column(case["losses"]), rtol=tolerance(case), atol=tolerance(case))


def test_most_reasons_are_checked() -> None:
    unchecked = {reason for _, reason, _ in DIFFERENT} - {reason for _, reason in REASONED}
    assert unchecked == {
        "counts positions from the start of the prompt",
        "off by one token",
        "takes the prompt's tokens into the likelihood",
    }


# the tutorial


def test_the_tutorials_four_pairs() -> None:
    logps, expected = logps_named("seed_blog"), GOLDENS["tutorial"]
    weights = torch.ones(4, dtype=torch.float64)
    metrics = pair_metrics(compute(LossChoice.of("dpo", {"beta": 0.1}), logps), logps, weights)
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=5e-5)
    assert metrics["rewards/accuracies"] == expected["accuracy"]
    assert metrics["rewards/ties"] == 0.25
    assert metrics["rewards/margins"] / 0.1 == pytest.approx(expected["margin"])
    assert metrics["logratios/margins"] == pytest.approx(expected["margin"])
    smoothed = compute(LossChoice.of("dpo", {"beta": 0.1, "label_smoothing": 0.1}), logps)
    assert pair_metrics(smoothed, logps, weights)["loss"] == pytest.approx(expected["loss_smoothing_0p1"], abs=5e-5)
