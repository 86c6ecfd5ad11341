"""The losses against what the public implementations give, and against what their formulas promise."""

import inspect
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dpocli.config.catalogue import CATALOGUE
from dpocli.config.models import HYPERPARAMETER_FIELDS, LossChoice, TrainOptions
from dpocli.errors import UsageError
from dpocli.objective.logps import PairLogps
from dpocli.objective.losses import LOSSES, compute
from dpocli.objective.metrics import MetricSums

GOLDENS = json.loads((Path(__file__).parent / "goldens.json").read_text())
TOLERANCE = {"rtol": 1e-9, "atol": 1e-9}


def column(values: Any) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def from_sums(inputs: dict[str, Any]) -> PairLogps:
    policy_chosen = column(inputs["policy_chosen_logps"])
    ones = [1] * len(policy_chosen)
    return PairLogps(
        policy_chosen,
        column(inputs["policy_rejected_logps"]),
        column(inputs["ref_chosen_logps"]),
        column(inputs["ref_rejected_logps"]),
        torch.tensor(inputs.get("chosen_lengths", ones)),
        torch.tensor(inputs.get("rejected_lengths", ones)),
    )


def from_tokens(inputs: dict[str, Any]) -> PairLogps:
    """The same from whole logits: rows 0-3 are the chosen sides, rows 4-7 the rejected."""
    ids, mask = torch.tensor(inputs["input_ids"])[:, 1:], torch.tensor(inputs["labels"])[:, 1:] != -100
    policy = torch.log_softmax(column(inputs["policy_logits"]), -1)[:, :-1]
    reference = torch.log_softmax(column(inputs["ref_logits"]), -1)[:, :-1]

    def sums(per_token: Tensor) -> tuple[Tensor, Tensor]:
        summed = (per_token * mask).sum(1)
        return summed[:4], summed[4:]

    def picked(log_probs: Tensor) -> Tensor:
        return log_probs.gather(-1, ids[..., None])[..., 0]

    counts = mask.sum(1)
    return PairLogps(
        *sums(picked(policy)), *sums(picked(reference)), counts[:4], counts[4:], *sums(torch.logsumexp(2 * policy, -1))
    )


def inputs_named(name: str) -> PairLogps:
    inputs = GOLDENS["inputs"][name]
    return from_tokens(inputs) if name == "tokens4" else from_sums(inputs)


def case_name(case: dict[str, Any]) -> str:
    return f"{case['loss']}-{case['inputs']}-" + ",".join(f"{k}={v}" for k, v in case["params"].items())


@pytest.mark.parametrize("case", GOLDENS["cases"], ids=case_name)
def test_golden_numbers(case: dict[str, Any]) -> None:
    output = LOSSES[case["loss"]](inputs_named(case["inputs"]), **case["params"])
    torch.testing.assert_close(output.losses, column(case["losses"]), **TOLERANCE)
    if "chosen_rewards" in case:
        torch.testing.assert_close(output.chosen_rewards, column(case["chosen_rewards"]), **TOLERANCE)
        torch.testing.assert_close(output.rejected_rewards, column(case["rejected_rewards"]), **TOLERANCE)


def test_every_loss_has_golden_numbers() -> None:
    assert {case["loss"] for case in GOLDENS["cases"]} == set(LOSSES)


def test_the_tutorials_four_pairs() -> None:
    logps, expected = inputs_named("seed_blog"), GOLDENS["tutorial"]
    output = LOSSES["dpo"](logps, beta=0.1)
    metrics = MetricSums.of(output, logps, torch.ones(4, dtype=torch.float64)).means()
    assert metrics["loss"] == pytest.approx(expected["loss"], abs=5e-5)
    assert metrics["rewards/accuracies"] == expected["accuracy"]
    assert metrics["rewards/ties"] == 0.25
    assert metrics["rewards/margins"] / 0.1 == pytest.approx(expected["margin"])
    smoothed = LOSSES["dpo"](logps, beta=0.1, label_smoothing=0.1).losses.mean().item()
    assert smoothed == pytest.approx(expected["loss_smoothing_0p1"], abs=5e-5)


def test_catalogue_and_implementation_agree() -> None:
    assert set(CATALOGUE) == set(LOSSES)
    for name, spec in CATALOGUE.items():
        keywords = {
            parameter.name: parameter.default
            for parameter in inspect.signature(LOSSES[name]).parameters.values()
            if parameter.kind is inspect.Parameter.KEYWORD_ONLY and parameter.name != "beta"
        }
        assert keywords == spec.defaults, name
        assert set(keywords) <= set(HYPERPARAMETER_FIELDS), name
    assert set(HYPERPARAMETER_FIELDS) == {p.name for spec in CATALOGUE.values() for p in spec.hyperparameters}


def test_what_a_loss_needs_is_what_it_reads() -> None:
    everything = inputs_named("tokens4")
    for name, spec in CATALOGUE.items():
        logps = PairLogps(
            everything.policy_chosen,
            everything.policy_rejected,
            everything.reference_chosen if spec.needs_reference else None,
            everything.reference_rejected if spec.needs_reference else None,
            everything.chosen_tokens,
            everything.rejected_tokens,
            everything.policy_chosen_collision if spec.needs_collision else None,
            everything.policy_rejected_collision if spec.needs_collision else None,
        )
        assert LOSSES[name](logps, beta=0.3).losses.shape == (4,)


def random_logps(scale: float, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: -scale * torch.rand(6, generator=generator, dtype=torch.float64)
        for name in ("policy_chosen", "policy_rejected", "reference_chosen", "reference_rejected")
    }


def pair_logps_of(columns: dict[str, Tensor]) -> PairLogps:
    return PairLogps(
        **columns,
        chosen_tokens=torch.tensor([3, 5, 8, 2, 9, 4]),
        rejected_tokens=torch.tensor([4, 4, 1, 7, 5, 6]),
        policy_chosen_collision=columns["policy_chosen"].detach() * 0.5,
        policy_rejected_collision=columns["policy_rejected"].detach() * 0.5,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_by_finite_differences(name: str) -> None:
    columns = random_logps(10.0)
    weights = pair_logps_of(columns)

    def loss(chosen: Tensor, rejected: Tensor) -> Tensor:
        moved = pair_logps_of(columns | {"policy_chosen": chosen, "policy_rejected": rejected})
        if name == "wpo":  # its weight takes no gradient, so it must not move with the difference either
            fixed = {
                f: getattr(weights, f) - columns[f[: -len("_collision")]]
                for f in ("policy_chosen_collision", "policy_rejected_collision")
            }
            moved = PairLogps(
                chosen,
                rejected,
                moved.reference_chosen,
                moved.reference_rejected,
                moved.chosen_tokens,
                moved.rejected_tokens,
                chosen.detach() + fixed["policy_chosen_collision"],
                rejected.detach() + fixed["policy_rejected_collision"],
            )
        return LOSSES[name](moved, beta=0.3).losses

    leaves = tuple(columns[side].clone().requires_grad_() for side in ("policy_chosen", "policy_rejected"))
    assert torch.autograd.gradcheck(loss, leaves)


@pytest.mark.parametrize("name", LOSSES)
def test_chosen_up_and_rejected_down_never_raises_a_monotone_loss(name: str) -> None:
    if name == "ipo":
        pytest.skip("a square is not monotone")
    columns = random_logps(10.0)
    before = LOSSES[name](pair_logps_of(columns), beta=0.3).losses
    moved = columns | {
        "policy_chosen": columns["policy_chosen"] + 0.1,
        "policy_rejected": columns["policy_rejected"] - 0.1,
    }
    logps = pair_logps_of(moved)
    if name == "wpo":  # keep the weight
        logps = PairLogps(
            *(
                getattr(logps, f)
                for f in (
                    "policy_chosen",
                    "policy_rejected",
                    "reference_chosen",
                    "reference_rejected",
                    "chosen_tokens",
                    "rejected_tokens",
                )
            ),
            pair_logps_of(columns).policy_chosen_collision + 0.1,
            pair_logps_of(columns).policy_rejected_collision - 0.1,
        )
    assert (LOSSES[name](logps, beta=0.3).losses <= before + 1e-12).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("margin", [1e3, -1e3])
def test_values_and_gradients_stay_finite_at_extremes_in_float32(name: str, margin: float) -> None:
    chosen = torch.tensor([-1e4 + max(margin, 0)], requires_grad=True)
    rejected = torch.tensor([-1e4 - min(margin, 0)], requires_grad=True)
    reference, count = torch.tensor([-1e4]), torch.tensor([10])
    logps = PairLogps(chosen, rejected, reference, reference, count, count, torch.tensor([-5.0]), torch.tensor([-5.0]))
    output = LOSSES[name](logps, beta=CATALOGUE[name].beta)
    output.losses.sum().backward()
    for tensor in (output.losses, output.chosen_rewards, output.rejected_rewards, chosen.grad, rejected.grad):
        assert torch.isfinite(tensor).all()


@pytest.mark.parametrize("name", [name for name, spec in CATALOGUE.items() if spec.needs_reference])
def test_at_the_reference_every_loss_sees_no_margin(name: str) -> None:
    columns = random_logps(10.0)
    columns |= {"reference_chosen": columns["policy_chosen"], "reference_rejected": columns["policy_rejected"]}
    output = LOSSES[name](pair_logps_of(columns), beta=0.5)
    assert (output.chosen_rewards == 0).all()
    expected = {"hinge": 1.0, "ipo": 1.0}.get(name, math.log(2))
    if name != "wpo":
        torch.testing.assert_close(output.losses, torch.full_like(output.losses, expected))


def options(**given: object) -> TrainOptions:
    return TrainOptions.model_validate({"model": "m", "out": "o", "reference": "r"} | given)


def test_choosing_a_loss_fills_in_the_papers_numbers() -> None:
    choice = LossChoice.from_options(options(loss="simpo", gamma=1.5))
    assert (choice.beta, choice.hyperparameters) == (2.0, {"gamma": 1.5, "label_smoothing": 0.0})
    logps = inputs_named("main8")
    torch.testing.assert_close(compute(choice, logps).losses, LOSSES["simpo"](logps, beta=2.0, gamma=1.5).losses)


def test_a_hyperparameter_that_the_loss_does_not_use_is_an_error() -> None:
    with pytest.raises(UsageError, match=r"--gamma: dpo does not use it\. Losses that do: simpo"):
        LossChoice.from_options(options(gamma=1.0))
    with pytest.raises(UsageError, match="there is no such loss"):
        LossChoice.from_options(options(loss="dpoo"))
