"""The tables of losses in the README, generated from the catalogue and the docstrings of the losses.

`python -m tests.readme_tables` writes them.
"""

import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from dpocli.config.hyperparameters import MODIFIERS, Hyperparameter, Need, Value
from dpocli.config.losses import CATALOGUE, LossSpec, losses_using
from dpocli.objective.losses import LOSSES

README = Path(__file__).parent.parent / "README.md"
MODIFIER_NAMES = [parameter.name for parameter in MODIFIERS]

SECTIONS = ("Args", "Returns", "Other implementations", "References")


@dataclass(frozen=True)
class LossDoc:
    """The parts of a loss's docstring."""

    summary: str
    formula: str
    use: str
    """When to use it; completes "Use it"."""
    notes: str
    sections: dict[str, str]

    @classmethod
    def of(cls, name: str) -> "LossDoc":
        text = inspect.getdoc(LOSSES[name]) or ""
        body, *rest = re.split(rf"\n\n({'|'.join(SECTIONS)}):\n", text)
        sections = {title: inspect.cleandoc(content) for title, content in zip(rest[::2], rest[1::2], strict=True)}
        summary, formula, *paragraphs = body.split("\n\n")
        (use,) = (" ".join(text.split()) for text in paragraphs if text.startswith("Use it "))
        notes = "\n\n".join(text for text in paragraphs if not text.startswith("Use it "))
        formula = re.sub(r"\s+", " ", formula).strip()
        return cls(summary, formula, use.removeprefix("Use it ").rstrip("."), notes, sections)

    def section(self, title: str) -> str:
        """The text of a section in one line, without its last period."""
        return " ".join(self.sections.get(title, "").split()).rstrip(".")


def losses() -> Iterator[str]:
    """A row for each loss."""
    yield "| `--loss` | loss of a pair | beta | own options | needs | rewards | when, and paper |"
    yield "|---|---|---|---|---|---|---|"
    for spec in CATALOGUE.values():
        doc = LossDoc.of(spec.name)
        beta = "none" if spec.beta is None else f"{spec.beta:g}"
        own = ", ".join(f"{_flag(parameter)} {_shown(parameter.default)}" for parameter in spec.hyperparameters)
        yield (
            f"| `{spec.name}` | `{_cell(doc.formula)}` | {beta} | {own} | {_needs(spec)} | {spec.reward} | "
            f"{_cell(doc.use)}; {_cell(doc.section('References'))} |"
        )


def modifiers() -> Iterator[str]:
    """A row for each modifier."""
    yield "| modifier | | of |"
    yield "|---|---|---|"
    for parameter in MODIFIERS:
        values = ", ".join(parameter.choices) or f"default {_shown(parameter.default)}"
        users = ", ".join(f"`{name}`" for name in losses_using(parameter.name))
        yield f"| {_flag(parameter)} | {parameter.help} ({values}) | {users} |"


def disagreements() -> Iterator[str]:
    """Where other implementations differ."""
    yield "| loss | other implementations |"
    yield "|---|---|"
    for name in CATALOGUE:
        if elsewhere := LossDoc.of(name).section("Other implementations"):
            yield f"| `{name}` | {_cell(elsewhere)} |"


def _needs(spec: LossSpec) -> str:
    names = {Need.REFERENCE: "reference", Need.COLLISION: "vocabulary sums", Need.WHOLE_BATCH: "whole batch"}
    needs = spec.needs(spec.defaults)
    return ", ".join(name for need, name in names.items() if need in needs) or "policy only"


def _cell(text: str) -> str:
    """Text inside a table: a bar would end the cell."""
    return text.replace("|", r"\|")


def _flag(parameter: Hyperparameter) -> str:
    return f"`--{parameter.name.replace('_', '-')}`"


def _shown(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


TABLES = {"losses": losses, "modifiers": modifiers, "disagreements": disagreements}


def with_tables(text: str) -> str:
    """The README with every table between its markers generated again."""
    for name, rows in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        assert tail, f"the README has no markers {start.strip()} and {end.strip()}"
        text = f"{head}{start}\n{''.join(row + chr(10) for row in rows())}\n{end}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
