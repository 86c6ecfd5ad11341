"""The sentences follow from the figures."""

import pytest

from dpocli.config.loss_expression import LossChoice
from dpocli.report.tables import figure_lines, gate_lines, model_lines
from dpocli.report.wording import between, headline, models_in_order, number, percent, points, points_beside_0
from tests.support.reports import made_up_report, made_up_table

TABLE = made_up_table()


def words(**more):
    return headline(made_up_report(TABLE, **more))


@pytest.mark.parametrize(
    ("interval", "verdict", "sentence"),
    [
        ([0.52, 0.58], "better", "better than a coin"),
        ([0.5002, 0.58], "better", "the whole interval, 50.02% to 58.0%, lies above 50%"),
        ([0.5, 0.58], "open", "cannot be distinguished from tossing a coin"),
        ([0.42, 0.48], "worse", "worse than a coin"),
        (None, "open", "No interval"),
    ],
)
def test_accuracy_is_judged_by_its_interval(interval, verdict, sentence):
    found = words(**{"rewards/accuracies_ties_half_interval": interval})
    assert found.verdict == verdict
    assert sentence in found.may[0]


def test_ties_are_no_reason_to_call_a_model_worse():
    """35% right, 20% wrong, 45% ties: with a tie as half right it is better than a coin."""
    ties = {"rewards/ties": 0.45, "rewards/accuracies": 0.35, "rewards/accuracies_interval": [0.31, 0.39]}
    found = words(**ties, **{"rewards/accuracies_ties_half_interval": [0.53, 0.62]})
    assert found.verdict == "better"
    assert "with a tie as half right" in found.may[0]


@pytest.mark.parametrize(
    ("figures", "words_of_it"),
    [({"rewards/ties": 1.0}, "ties"), ({"rewards/within_noise": 0.9}, "90.0% of the margins lie within the rounding")],
)
def test_where_margins_are_rounding_there_is_nothing_to_conclude(figures, words_of_it):
    found = words(**figures, **{"rewards/accuracies_ties_half_interval": [0.45, 0.6]})
    assert found.verdict == "open"
    assert words_of_it in found.may[0]
    assert "nothing to conclude" in found.may[0]
    assert not any("always picking" in sentence or "displacement" in sentence for sentence in found.may)


def test_rounding_does_not_put_most_margins_on_one_side():
    found = words(**{"rewards/within_noise": 0.6, "rewards/accuracies_ties_half_interval": [0.76, 0.9]})
    assert found.verdict == "better"
    assert any("How 60.0% of the pairs are ranked" in sentence for sentence in found.may_not)


def test_a_model_that_ties_has_no_accuracy_to_show():
    found = words(**{"rewards/ties": 1.0})
    assert (found.accuracy, found.interval) == ("ties", "")


def test_after_the_first_the_models_of_a_run_are_shown_in_order_of_step():
    report = made_up_report(TABLE)
    report["models"][1:] = report["models"][:0:-1]
    report["comparisons"].reverse()
    assert [model["step"] for model in report["models"]] == [300, 200, 100]
    ordered = models_in_order(report)
    assert [model["step"] for model, _ in ordered] == [300, 100, 200]
    assert [entry.get("against") for _, entry in ordered] == [
        None,
        "run/checkpoints/step-100",
        "run/checkpoints/step-200",
    ]


@pytest.mark.parametrize(
    ("interval", "of_accuracy", "sentence"),
    [
        (
            [0.01, 0.13],
            [0.6, 0.7],
            "It does better than always picking the longer answer, which is right in 57.0%: +7.0",
        ),
        ([-0.01, 0.13], [0.6, 0.7], "Length alone is not ruled out as the reason"),
        ([-0.01, 0.13], [0.45, 0.6], ""),
        ([-0.13, -0.01], [0.45, 0.6], "It does worse than always picking"),
    ],
)
def test_accuracy_is_held_against_length(interval, of_accuracy, sentence):
    over = {"rule": "longer", "rule_accuracy": 0.57, "value": 0.07, "interval": interval}
    found = words(over_length=over, comparisons=[], **{"rewards/accuracies_ties_half_interval": of_accuracy})
    assert sentence in found.may[1]
    assert sentence or "length" not in " ".join(found.may)


def test_displacement_says_only_what_is_so():
    assert "rejected ones fell further" in " ".join(words().may)
    simpo = LossChoice.of("simpo").model_dump()
    for more in (
        {"logratios/rejected": -0.3},
        {"logratios/chosen": 0.4, "logratios/rejected": 0.1},
        {"loss_choice": simpo},
    ):
        told = " ".join(words(**more).may)
        assert "less likely in 61.0% of the pairs (likelihood displacement)." in told


def test_small_and_noisy_evaluations_say_so():
    assert any("of 12 prompts even the interval" in sentence for sentence in words(prompts=12).may_not)
    one = words(prompts=1, pairs=1)
    assert "in 64.4% of 1 pair." in one.sentence
    assert any("of 1 pair even" in sentence for sentence in one.may_not)
    assert any("20.0% of the pairs" in sentence for sentence in words(**{"rewards/within_noise": 0.2}).may_not)
    usual = words(**{"rewards/within_noise": 0.0}).may_not
    assert not any("rough" in sentence or "rounding" in sentence for sentence in usual)


def test_rewards_without_a_reference_are_called_what_they_are():
    found = words(loss_choice=LossChoice.of("simpo").model_dump())
    assert "higher reward, which looks at no reference" in found.sentence
    assert "than its reference" in words().sentence


def test_models_are_compared_by_the_interval_of_their_difference():
    told = " ".join(words().may)
    assert "step-300 ranks more pairs right than run/checkpoints/step-200: +2.0 points" in told
    assert "step-300 cannot be distinguished from run/checkpoints/step-100" in told
    lines = model_lines(made_up_report(TABLE))
    assert [line["verdict"] for line in lines] == ["", "not distinguishable", "better"]


def test_a_model_that_is_its_reference_is_called_that():
    report = made_up_report(TABLE)
    report["models"][1]["rewards/ties"] = 1.0
    assert "step-100, which ties as the reference itself does" in " ".join(headline(report).may)


def test_models_of_other_losses_are_compared_by_accuracy_alone():
    report = made_up_report(TABLE)
    report["comparisons"][0] |= {"margin_difference": None, "margin_interval": None, "why_no_margin": "other losses"}
    line = model_lines(report)[1]
    assert (line["difference"], line["margin_difference"], line["why_no_margin"]) == ("+4.0", "", "other losses")


def test_what_was_required_is_told():
    outcome = {"require": "loss<=0.5", "value": None, "holds": False}
    assert gate_lines(made_up_report(TABLE, requirements=[outcome])) == [outcome | {"value": "–"}]
    assert gate_lines(made_up_report(TABLE)) == []


def test_figures_are_spelled_for_people():
    assert (percent(0.6721), percent(None), percent(float("nan"))) == ("67.2%", "–", "–")
    assert (number(-0.12345), number(12345), number(None), points(0.021)) == ("−0.123", "12,345", "–", "+2.1")
    assert (points_beside_0(-0.00024), points_beside_0(0.042), points_beside_0(0.0)) == ("-0.02", "+4.2", "+0.0")
    assert between([0.1, 0.25], percent) == "10.0% to 25.0%"
    assert between([None, 0.25]) == between(None) == between([float("nan"), 1.0]) == ""


def test_the_table_has_accuracy_first_and_every_figure_that_is_there():
    lines = figure_lines(made_up_report(TABLE))
    assert lines[0]["name"] == "Reward accuracy"
    assert len(lines) == 21
    assert all(line["meaning"] for line in lines)


def test_a_second_reference_has_its_lines():
    second = {
        "cache": "ref-b",
        "pairs": 120,
        "accuracy": {"value": 0.52, "interval": [0.4, 0.6]},
        "rewards/accuracies": 0.7,
    }
    lines = {line["name"]: line for line in figure_lines(made_up_report(TABLE, second_reference=second))}
    assert lines["Against the second reference"]["value"] == "70.0%"
    assert "ref-b, over the 120 pairs" in lines["Against the second reference"]["meaning"]
    assert lines["Accuracy of the second reference"]["interval"] == "40.0% to 60.0%"
