"""The figures of a report by name, and the gates that name them."""

import pytest

from dpocli.commands.gates import available_in, check_gates, judge_gates
from dpocli.config.gates import Gate
from dpocli.errors import UsageError
from dpocli.evaluation.figures import DIFFERENCES, FIGURES, gate_values
from dpocli.evaluation.report import report_of
from tests.evaluation.scored_tables import evaluated, with_margins


def test_gates_know_every_figure_by_name_and_its_interval() -> None:
    report = report_of([evaluated(with_margins([1.0, -1.0, 1.0, 1.0]), name=name) for name in "ab"])
    values = gate_values(report)
    assert values["reward_accuracy"] == report["rewards/accuracies"] == 0.75
    assert [values["reward_accuracy_low"], values["reward_accuracy_high"]] == report["rewards/accuracies_interval"]
    assert values["policy_accuracy_low"] == report["accuracies"]["policy"]["interval"][0]
    assert values["accuracy_difference"] == report["comparisons"][0]["accuracy_difference"] == 0
    assert values["accuracy_difference_high"] == report["comparisons"][0]["accuracy_interval"][1]
    assert values["reward_margin_q05"] == report["rewards/margins_quantiles"]["0.05"]
    assert values["brier"] == report["calibration"]["brier"]
    assert values["reward_length_correlation"] is None
    undefined = {name for name, value in values.items() if value is None}
    assert {name for name in undefined if "second_reference" not in name} == {"reward_length_correlation"}


def test_every_figure_has_a_name_of_its_own_and_is_described() -> None:
    figures = [*FIGURES, *DIFFERENCES]
    for kind in ("name", "label", "path"):
        assert len({getattr(figure, kind) for figure in figures}) == len(figures), kind
    assert all(figure.meaning.endswith(".") for figure in figures)


@pytest.mark.parametrize(
    ("gate", "words"),
    [
        ("reward_acuracy>0", r"no figure reward_acuracy; did you mean reward_accuracy or"),
        ("displacement_low>0", r"no figure displacement_low; did you mean displacement"),
        ("rewards/margins_quantiles/0.5>0", r"no figure rewards/margins_quantiles/0.5; did you mean"),
        ("zzz>0", r"no figure zzz; there are reward_accuracy, reward_accuracy_ties_half,"),
        ("accuracy_difference_low>0", "it takes a second --model"),
        ("second_reference_accuracy>0", "it takes --second-reference"),
    ],
)
def test_a_figure_that_is_not_there_is_refused(gate: str, words: str) -> None:
    report = report_of([evaluated(with_margins([1.0, -1.0]))])
    check_gates([Gate.of("reward_margin_high<3"), Gate.of("displacement<=1")], [], available_in(report))
    with pytest.raises(UsageError, match=words):
        check_gates([Gate.of(gate)], [], available_in(report))


def test_outcomes_say_what_was_found() -> None:
    report = report_of([evaluated(with_margins([1.0, -1.0]))])
    failed = judge_gates([Gate.of("reward_accuracy>=0.5"), Gate.of("reward_length_correlation<0.9")], report)
    assert "--require reward_length_correlation<0.9: it is undefined here" in str(failed)
    assert report["requirements"] == [
        {"require": "reward_accuracy>=0.5", "value": 0.5, "holds": True},
        {"require": "reward_length_correlation<0.9", "value": None, "holds": False},
    ]
