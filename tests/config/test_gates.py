"""What `--require` takes, and which figures it knows."""

import pytest

from dpocli.config.commands import EvaluateOptions
from dpocli.config.gates import ALIASES, Gate, check_names, outcomes, scalars
from dpocli.config.parsing import load_options
from dpocli.errors import UsageError
from dpocli.evaluation.report import report_of
from tests.evaluation.scored_tables import evaluated, with_margins


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("x>=0.65", 0.65, True),
        ("x>0.65", 0.65, False),
        ("x <= 1e-3", 0.001, True),
        ("x<.5", 0.5, False),
        ("x>-1", -0.5, True),
        ("rewards/margins_quantiles/0.5>0", 1.0, True),
        ("x>0", None, False),
    ],
)
def test_gates_hold_or_do_not(text: str, value: float | None, holds: bool) -> None:
    assert Gate.of(text).holds(value) is holds


@pytest.mark.parametrize(
    "text", ["x", "x=1", "x==1", ">=1", "x>=", "x>=y", "x>=1%", "x=>1", "x>=1 y>=2", "x>=nan", "x>=inf"]
)
def test_what_is_no_requirement_is_an_error_of_the_command_line(text: str) -> None:
    with pytest.raises(UsageError, match=r"--require: .*is no requirement"):
        load_options(EvaluateOptions, {"model": "m", "out": "o", "reference": "r", "require": [text]})


def test_figures_go_by_alias_and_by_path() -> None:
    models = [evaluated(with_margins([1.0, -1.0, 1.0, 1.0]), name=name) for name in "ab"]
    report = report_of(models)
    known = scalars(report)
    assert known["reward_accuracy"] == known["rewards/accuracies"] == 0.75
    assert (known["reward_accuracy_low"], known["reward_accuracy_high"]) == tuple(report["rewards/accuracies_interval"])
    assert known["policy_accuracy_low"] == report["accuracies"]["policy"]["interval"][0]
    assert known["accuracy_difference"] == known["comparisons/0/accuracy_difference"] == 0
    assert known["accuracy_difference_high"] == report["comparisons"][0]["accuracy_interval"][1]
    assert known["models/1/calibration/brier"] == known["brier"]
    assert known["reward_length_correlation"] is None
    assert not [name for name in known if "slices" in name or "bins" in name]
    for alias in ALIASES:
        assert alias in known, alias


def test_an_unknown_figure_is_told_with_its_neighbour() -> None:
    known = scalars(report_of([evaluated(with_margins([1.0, -1.0]))]))
    check_names([Gate.of("reward_margin_high<3")], known)
    with pytest.raises(UsageError, match=r"no figure reward_acuracy here; did you mean reward_accuracy\?"):
        check_names([Gate.of("reward_acuracy>0")], known)
    with pytest.raises(UsageError, match="no figure accuracy_difference here"):
        check_names([Gate.of("accuracy_difference>0")], known)  # there is one model


def test_outcomes_say_what_was_found() -> None:
    report = report_of([evaluated(with_margins([1.0, -1.0]))])
    gates = [Gate.of("reward_accuracy>=0.5"), Gate.of("reward_length_correlation<0.9")]
    assert outcomes(gates, report) == [
        {"require": "reward_accuracy>=0.5", "value": 0.5, "holds": True},
        {"require": "reward_length_correlation<0.9", "value": None, "holds": False},
    ]
