"""What `--require` takes as text."""

import pytest

from dpocli.config.commands import EvaluateOptions
from dpocli.config.gates import Gate
from dpocli.config.parsing import load_options
from dpocli.errors import UsageError


@pytest.mark.parametrize(
    ("text", "value", "holds"),
    [
        ("x>=0.65", 0.65, True),
        ("x>0.65", 0.65, False),
        ("x <= 1e-3", 0.001, True),
        ("x<.5", 0.5, False),
        ("x>-1", -0.5, True),
        ("reward_margin_q05>0", 1.0, True),
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
