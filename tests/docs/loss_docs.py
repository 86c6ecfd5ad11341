"""The parts of a loss's docstring, for the documents that are generated from it."""

import inspect
import re
from dataclasses import dataclass

from dpocli.objective.losses import LOSSES

_SECTIONS = "Args|Returns|Other implementations|References"


@dataclass(frozen=True)
class LossDoc:
    """What the docstring of a loss says, each part in one line without its last period."""

    summary: str
    formula: str
    when: str
    """Completes "Use it"."""
    notes: str
    disagreement: str
    """Where other implementations differ; may be empty."""
    paper: str

    @classmethod
    def of(cls, name: str) -> "LossDoc":
        """Read a docstring.

        Raises:
            ValueError: it has not one paragraph that begins with "Use it".
            KeyError: it has no section "References".
        """
        body, *rest = re.split(rf"\n\n({_SECTIONS}):\n", inspect.getdoc(LOSSES[name]) or "")
        sections = dict(zip(rest[::2], rest[1::2], strict=True))
        summary, formula, *paragraphs = body.split("\n\n")
        (when,) = (text for text in paragraphs if text.startswith("Use it "))
        return cls(
            summary=_line(summary),
            formula=_line(formula),
            when=_line(when.removeprefix("Use it ")),
            notes=_line(" ".join(text for text in paragraphs if text != when)),
            disagreement=_line(sections.get("Other implementations", "")),
            paper=_line(sections["References"]),
        )


def _line(text: str) -> str:
    return " ".join(text.split()).removesuffix(".")
