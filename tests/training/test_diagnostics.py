"""Warnings from synthetic runs: those that must come, when, once; and healthy runs, which are left in peace."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from dpocli.config.loss_expression import LossChoice
from dpocli.training.diagnostics import WINDOW, Diagnostics, RunWarning, truncation, warnings_of
from dpocli.training.schedule import Schedule

DPO = LossChoice.of("dpo")
Row = dict[str, Any]


def schedule(num_steps: int, batch_size: int = 32, steps_per_epoch: int | None = None) -> Schedule:
    return Schedule((steps_per_epoch or num_steps) * batch_size, batch_size, num_steps, seed=0)


def run(
    num_steps: int,
    *,
    margin: float = 10.0,
    chosen: float = 0.0,
    noise: float = 0.3,
    beta: float = 0.1,
    seed: int = 0,
    steps_per_epoch: int | None = None,
    held_out_every: int = 0,
    **columns: Any,
) -> list[Row]:
    """Rows of a run at whose end the policy has moved by so many nats, with batches that differ.

    Args:
        num_steps: rows.
        margin: of the summed log-ratios, at the end.
        chosen: log-ratio of the chosen side, at the end.
        noise: standard deviation of both between batches, as a share of what they have become.
        beta: of the rewards.
        seed: of the noise.
        steps_per_epoch: default: one epoch.
        held_out_every: steps between evaluations.
        columns: further figures: numbers, or functions of the step.
    """
    rng = np.random.default_rng(seed)
    rows: list[Row] = [_held_out({"step": 0}, 0.0, 0.0)] if held_out_every else []
    for step in range(1, num_steps + 1):
        done = (step - 1) / num_steps
        moved, fallen = (value * done * (1 + noise * rng.normal()) for value in (margin, chosen))
        row: Row = {
            "step": step,
            "epoch": step / (steps_per_epoch or num_steps),
            "loss": math.log1p(math.exp(-beta * moved)),
            "rewards/margins": beta * moved,
            "rewards/accuracies": min(0.97, 0.5 + 0.4 * done + 0.05 * rng.normal()),
            "logps/chosen": -300 + fallen + 40 * rng.normal(),
            "logps/rejected": -300 + fallen - moved + 40 * rng.normal(),
            "logratios/chosen": fallen,
            "logratios/margins": moved,
            "grad_norm": math.exp(0.4 * rng.normal()),
        }
        row |= {name.replace("__", "/"): value(step) if callable(value) else value for name, value in columns.items()}
        if held_out_every and step % held_out_every == 0:
            row = _held_out(row, chosen * done, margin * done)
        rows.append(row)
    return rows


def _held_out(row: Row, chosen: float, margin: float) -> Row:
    return row | {"eval/loss": 0.6, "eval/logps/chosen": -290 + chosen, "eval/logps/rejected": -290 + chosen - margin}


def said(rows: list[Row], loss: LossChoice = DPO, **plan: Any) -> list[RunWarning]:
    return warnings_of(rows, loss, schedule(plan.pop("num_steps", int(rows[-1]["step"])), **plan))


def kinds(rows: list[Row], loss: LossChoice = DPO, **plan: Any) -> list[str]:
    return [warning.kind for warning in said(rows, loss, **plan)]


# runs that are healthy


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("margin", "chosen"), [(12.0, 0.5), (25.0, -3.0), (6.0, 2.0)])
def test_a_healthy_run_is_left_in_peace(margin: float, chosen: float, seed: int) -> None:
    assert kinds(run(400, margin=margin, chosen=chosen, seed=seed, noise=1.0, held_out_every=40)) == []


def test_a_run_of_thousands_of_noisy_steps_is_left_in_peace() -> None:
    """Each step is a chance to be wrong: batches of four pairs, whose figures jump, and gradients with a heavy tail."""
    rng = np.random.default_rng(1)
    tail = (0.5 * rng.pareto(2.5, size=5001) + 0.5).tolist()
    rows = run(5000, margin=15.0, chosen=-2.0, noise=2.0, grad_norm=lambda step: min(tail[step], 50.0))
    for row in rows:
        row["rewards/accuracies"] = float(rng.binomial(4, 0.7)) / 4
    assert kinds(rows, batch_size=4) == []


def test_few_steps_say_nothing() -> None:
    """Whatever they hold."""
    bad = run(2 * WINDOW - 1, margin=40, chosen=-90, grad_norm=lambda step: 10.0**step, loss=math.log(2))
    assert kinds(bad) == []
    assert kinds(run(2 * WINDOW - 1, loss=0.0)) == []


def test_rows_with_holes_are_read() -> None:
    rows = [{"step": 0}, {"step": 1, "loss": None}, {"step": 2, "loss": 0.7}, {"step": 3, "eval/loss": 0.6}]
    rows += [{"step": step, "loss": 0.6, "grad_norm": None} for step in range(4, 60)]
    assert kinds(rows) == []


@pytest.mark.parametrize("loss", ["bco_pair", "nca_pair", "ipo", "aot(label_smoothing=0.1)", "sppo_hard", "exo_pair"])
def test_losses_that_begin_or_end_elsewhere_are_not_held_to_dpos_figures(loss: str) -> None:
    """Two sides of ln 2 each, squares that go to 0, a mean over ranks: small and constant losses mean nothing there."""
    choice = LossChoice.of(loss)
    assert kinds(run(200, loss=0.001, rewards__margins=0.5), choice) == []
    if not loss.startswith("aot"):
        assert kinds(run(200, loss=math.log(2), rewards__margins=0.0), choice) == []


# likelihood displacement


def test_chosen_answers_that_fall_while_margins_rise() -> None:
    (warning,) = said(run(200, margin=40, chosen=-30))
    assert warning.kind == "likelihood displacement"
    assert '--loss "dpo+0.2*sft"' in warning.text
    assert "--loss dpop" in warning.text
    # 5 of the 30 nats are lost after a sixth of the run; half a window later the median knows.
    assert 200 / 6 < warning.step < 200 / 6 + 2 * WINDOW


def test_a_fall_that_is_small_beside_the_margin_is_none() -> None:
    assert kinds(run(200, margin=40, chosen=-8)) == []


def test_a_fall_of_both_sides_without_a_margin_is_something_else() -> None:
    assert kinds(run(200, margin=-5, chosen=-30, loss=0.7)) == []


def test_without_a_reference_the_held_out_pairs_tell() -> None:
    choice = LossChoice.of("simpo")
    rows = run(200, margin=40, chosen=-30, held_out_every=20, loss=1.0)
    for row in rows:
        row.pop("logratios/chosen", None)
        row.pop("logratios/margins", None)
    (warning,) = said(rows, choice)
    assert (warning.kind, warning.step) == ("likelihood displacement", 40)
    assert "held-out" in warning.text
    assert "dpop" not in warning.text
    assert kinds([row for row in rows if "eval/loss" not in row], choice) == []  # training batches differ too much


def test_a_policy_that_began_far_from_the_reference_is_judged_by_held_out_pairs() -> None:
    rows = run(200, margin=3, chosen=1)
    for row in rows:
        row["logratios/chosen"] -= 50.0
        row["logratios/margins"] += 20.0
    assert kinds(rows) == []


@pytest.mark.parametrize(
    ("loss", "advice"),
    [("dpo+0.2*sft", "larger weight"), ("rpo", "larger weight"), ("r_dpo", "r_dpo+0.2*sft"), ("apo_down", None)],
)
def test_the_advice_fits_the_loss(loss: str, advice: str | None) -> None:
    found = said(run(200, margin=40, chosen=-30, loss=1.0), LossChoice.of(loss))
    assert [advice in warning.text for warning in found] == ([True] if advice else [])


# accuracy 1.0 from the start


def test_accuracy_of_1_from_the_start() -> None:
    certain = {"rewards__accuracies": lambda step: 0.0 if step == 1 else 1.0}
    (warning,) = said(run(100, **certain))
    assert (warning.kind, warning.step) == ("accuracy 1.0 from the start", 5)  # 4 batches of 32 after the first
    assert kinds(run(100, **certain), batch_size=4) == ["accuracy 1.0 from the start"]  # after 25 batches


@pytest.mark.parametrize("mistake_at", [2, 4])
def test_a_single_mistake_at_the_start_is_enough(mistake_at: int) -> None:
    rows = run(100, rewards__accuracies=lambda step: 31 / 32 if step == mistake_at else float(step > 1))
    assert kinds(rows) == []


def test_pairs_that_come_again_may_all_be_right() -> None:
    """Ten pairs, over and over: nothing of it is the first time."""
    rows = run(100, steps_per_epoch=2, rewards__accuracies=lambda step: float(step > 1))
    assert kinds(rows, batch_size=5, steps_per_epoch=2) == []


# loss stuck at ln 2

STUCK: dict[str, Any] = {"margin": 0.02, "noise": 1.0}


def test_a_loss_that_stays_at_ln_2() -> None:
    (warning,) = said(run(200, **STUCK))
    assert (warning.kind, warning.step) == ("loss stuck at ln 2", 50)  # once a quarter of the run is done
    assert "--learning-rate" in warning.text


def test_a_slow_start_is_none() -> None:
    assert kinds(run(200, margin=3.0, beta=0.1)) == []
    assert kinds(run(40, **STUCK), num_steps=1000) == []


def test_of_a_sum_the_term_counts() -> None:
    choice = LossChoice.of("dpo+0.2*sft")
    stuck = run(200, **STUCK)
    assert kinds([row | {"loss/dpo": row["loss"], "loss": row["loss"] + 0.4} for row in stuck], choice) == [
        "loss stuck at ln 2"
    ]
    assert kinds(stuck, LossChoice.of("dpo(weighting=wpo)")) == []


# gradient norm


def test_a_gradient_norm_that_explodes() -> None:
    rows = run(200, grad_norm=lambda step: 1.0 + 0.1 * (step % 7) if step < 100 else 1.5 ** (step - 95))
    (warning,) = said(rows)
    assert warning.kind == "gradient norm exploding"
    assert 100 <= warning.step <= 106


def test_a_single_spike_is_none_unless_it_is_enormous() -> None:
    assert kinds(run(200, grad_norm=lambda step: 40.0 if step in (70, 80, 81, 120) else 1.0)) == []
    assert kinds(run(200, grad_norm=lambda step: 140.0 if step == 120 else 1.0)) == ["gradient norm exploding"]


def test_a_hard_batch_among_vanished_gradients_is_none() -> None:
    rows = run(200, grad_norm=lambda step: 1.0 if step < 50 or step % 40 < 4 else 1e-3)
    assert kinds(rows) == []


# margins


def test_margins_that_saturate() -> None:
    (warning,) = said(run(200, margin=120.0, noise=0.1))
    assert warning.kind == "margins saturating"
    # σ(0.1 · 0.6 · 120) is 0.9993, σ(0.1 · 0.3 · 120) is 0.97.
    assert 0.3 * 200 < warning.step < 0.6 * 200
    assert "--label-smoothing" in warning.text


def test_smoothed_labels_do_not_saturate() -> None:
    assert kinds(run(200, margin=120.0, noise=0.1), LossChoice.of("dpo(label_smoothing=0.1)")) == []


# once


def all_at_once() -> list[Row]:
    return run(
        300, margin=150, chosen=-120, noise=0.1, held_out_every=20,
        rewards__accuracies=lambda step: float(step > 1), grad_norm=lambda step: 1.0 if step < 200 else 1e4,
    )  # fmt: skip


def test_each_is_said_once() -> None:
    found = kinds(all_at_once())
    assert sorted(found) == sorted(set(found))
    assert set(found) == {
        "likelihood displacement", "accuracy 1.0 from the start", "gradient norm exploding", "margins saturating",
    }  # fmt: skip


def starts(rows: list[Row], kill_every: int) -> Iterator[tuple[Diagnostics, list[Row], list[Row]]]:
    """What the starts of a run that is killed every so many rows read again, and what they add."""
    for begin in range(0, len(rows), kill_every):
        yield Diagnostics(DPO, schedule(300)), rows[:begin], rows[begin : begin + kill_every]


@pytest.mark.parametrize("kill_every", [1, 7, 50])
def test_a_run_that_is_killed_says_the_same(kill_every: int) -> None:
    rows, told = all_at_once(), []
    for watch, before, after in starts(rows, kill_every):
        for row in before:
            watch.see(row)
        told += [warning for row in after for warning in watch.see(row)]
    assert told == said(rows)


def test_an_evaluation_that_was_cut_short_and_made_later_changes_nothing() -> None:
    rows = all_at_once()
    watch, told = Diagnostics(DPO, schedule(300)), []
    for row in rows:
        if "loss" in row and "eval/loss" in row:  # the row as it stood when the run was stopped
            told += watch.see({name: value for name, value in row.items() if not name.startswith("eval/")})
        told += watch.see(row)
    assert told == said(rows)


# truncation


def test_many_truncated_pairs() -> None:
    found = truncation(20, 100, 2048)
    assert found
    assert found.step == 0
    assert "20 of 100" in found.text
    assert "2,048" in found.text
    assert truncation(10, 100, 2048) is None
    assert truncation(0, 0, None) is None
