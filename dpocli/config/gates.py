"""`--require "reward_accuracy>=0.65"`: a figure with its bound. If it does not hold, the command ends with exit 6."""

import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_OPERATORS: Mapping[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_FORM = re.compile(r"\s*([^<>=\s]+)\s*(>=|<=|>|<)\s*([+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?)\s*")


@dataclass(frozen=True, slots=True)
class Gate:
    """One requirement."""

    text: str
    name: str
    operator: str
    bound: float

    @classmethod
    def of(cls, text: str) -> "Gate":
        """Parse `NAME>=NUMBER`. Raises ValueError where the text has another form."""
        match = _FORM.fullmatch(text)
        if not match:
            raise ValueError(
                f'{text!r} is no requirement; write a figure, >=, >, <= or <, and a number: "reward_accuracy>=0.65"'
            )
        return cls(text, match[1], match[2], float(match[3]))

    def holds(self, value: float | None) -> bool:
        """Whether a value is as required. An undefined one is not."""
        return value is not None and _OPERATORS[self.operator](value, self.bound)
