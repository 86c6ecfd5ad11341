"""The sentences follow from the figures."""

import pytest

from dpocli.artifacts.page_tables import figure_lines, model_lines
from dpocli.artifacts.page_words import between, headline, number, percent, points
from dpocli.config.loss_choice import LossChoice
from tests.reports import made_up_report, made_up_table

TABLE = made_up_table()


def words(**more):
    return headline(made_up_report(TABLE, **more))


@pytest.mark.parametrize(
    ("interval", "verdict", "sentence"),
    [
        ([0.52, 0.58], "better", "better than a coin"),
        ([0.5, 0.58], "open", "cannot be told from tossing a coin"),
        ([0.42, 0.48], "worse", "worse than a coin"),
        (None, "open", "No interval"),
    ],
)
def test_accuracy_is_judged_by_its_interval(interval, verdict, sentence):
    found = words(**{"rewards/accuracies_interval": interval})
    assert found.verdict == verdict
    assert sentence in found.may[0]


def test_a_model_that_is_its_reference_is_not_called_worse():
    found = words(**{"rewards/accuracies_interval": [0.0, 0.0], "rewards/accuracies": 0.0, "rewards/ties": 1.0})
    assert found.verdict == "open"
    assert "nothing to conclude" in found.may[0]


@pytest.mark.parametrize(
    ("longer", "sentence"),
    [
        (0.55, "does not explain"),
        (0.45, "picking the shorter answer is right in 55.0%"),
        (0.65, "not ruled out"),
        (0.75, "no use"),
    ],
)
def test_accuracy_is_held_against_length(longer, sentence):
    found = words(accuracies={"pick_the_longer": {"value": longer}}, **{"rewards/accuracies_interval": [0.6, 0.7]})
    assert sentence in found.may[1]


def test_small_and_noisy_evaluations_say_so():
    assert any("only 12 prompts" in sentence for sentence in words(prompts=12).may_not)
    assert any("20.0% of the pairs" in sentence for sentence in words(**{"rewards/within_noise": 0.2}).may_not)
    usual = words(**{"rewards/within_noise": 0.0}).may_not
    assert not any("only" in sentence or "rounding" in sentence for sentence in usual)


def test_rewards_without_a_reference_are_called_what_they_are():
    found = words(loss_choice=LossChoice.of("simpo").model_dump())
    assert "more likely than the rejected" in found.sentence
    assert "than its reference" in words().sentence


def test_models_are_compared_by_the_interval_of_their_difference():
    told = " ".join(words().may)
    assert "step-200 ranks more pairs right than run/checkpoints/step-100: +2.0 points" in told
    assert "step-300 cannot be told from" in told
    lines = model_lines(made_up_report(TABLE))
    assert [line["verdict"] for line in lines] == ["", "better", "not told apart"]


def test_nothing_is_held_against_a_model_that_is_its_reference():
    """It ranks no pair right: +63 points would look like a leap."""
    report = made_up_report(TABLE, **{"rewards/ties": 1.0})
    report["models"][0]["rewards/ties"] = 1.0
    told = " ".join(headline(report).may)
    assert "cannot be held" in told
    assert "points on" not in told
    assert [line["difference"] for line in model_lines(report)] == ["", "", ""]
    turned = made_up_report(TABLE)
    turned["models"][1]["rewards/ties"] = 1.0
    assert "step-200" not in " ".join(headline(turned).may)
    assert [bool(line["difference"]) for line in model_lines(turned)] == [False, False, True]


def test_models_of_other_losses_are_compared_by_accuracy_alone():
    report = made_up_report(TABLE)
    report["comparisons"][0] |= {"margin_difference": None, "margin_interval": None}
    line = model_lines(report)[1]
    assert (line["difference"], line["margin_difference"]) == ("+2.0", "")


def test_figures_are_spelled_for_people():
    assert (percent(0.6721), percent(None), percent(float("nan"))) == ("67.2%", "–", "–")
    assert (number(-0.12345), number(12345), number(None), points(0.021)) == ("−0.123", "12,345", "–", "+2.1")
    assert between([0.1, 0.25], percent) == "10.0% to 25.0%"
    assert between([None, 0.25]) == between(None) == between([float("nan"), 1.0]) == ""


def test_the_table_has_accuracy_first_and_every_figure_that_is_there():
    lines = figure_lines(made_up_report(TABLE))
    assert lines[0].name == "Reward accuracy"
    assert len(lines) == 17
    assert all(line.meaning for line in lines)


def test_a_second_reference_has_its_lines():
    second = {
        "cache": "ref-b",
        "pairs": 120,
        "accuracy": {"value": 0.52, "interval": [0.4, 0.6]},
        "rewards/accuracies": 0.7,
    }
    lines = {line.name: line for line in figure_lines(made_up_report(TABLE, second_reference=second))}
    assert lines["Against the second reference"].value == "70.0%"
    assert "ref-b, over the 120 pairs" in lines["Against the second reference"].meaning
    assert lines["Accuracy of the second reference"].interval == "40.0% to 60.0%"
