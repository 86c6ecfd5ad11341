"""The tables of losses in the README, made from the catalogue. `python -m tests.readme_tables` writes them."""

from collections.abc import Iterator
from pathlib import Path

from dpocli.config.hyperparameters import MODIFIERS, Hyperparameter, Need, Value
from dpocli.config.losses import CATALOGUE, LossSpec, losses_using

README = Path(__file__).parent.parent / "README.md"
MODIFIER_NAMES = [parameter.name for parameter in MODIFIERS]


def losses() -> Iterator[str]:
    """A row for each loss."""
    yield "| `--loss` | loss of a pair | beta | own options | needs | rewards | when, and paper |"
    yield "|---|---|---|---|---|---|---|"
    for spec in CATALOGUE.values():
        beta = "none" if spec.beta is None else f"{spec.beta:g}"
        own = ", ".join(f"{_flag(parameter)} {_shown(parameter.default)}" for parameter in spec.hyperparameters)
        yield (
            f"| `{spec.name}` | `{spec.formula}` | {beta} | {own} | {_needs(spec)} | {spec.reward} | "
            f"{spec.when}; {spec.paper} |"
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
    """Where implementations differ, and what was chosen."""
    yield "| loss | chosen here, and what others do |"
    yield "|---|---|"
    for spec in CATALOGUE.values():
        if spec.disagreement:
            yield f"| `{spec.name}` | {spec.disagreement} |"


def _needs(spec: LossSpec) -> str:
    names = {Need.REFERENCE: "reference", Need.COLLISION: "vocabulary sums", Need.WHOLE_BATCH: "whole batch"}
    needs = spec.needs(spec.defaults)
    return ", ".join(name for need, name in names.items() if need in needs) or "policy only"


def _flag(parameter: Hyperparameter) -> str:
    return f"`--{parameter.name.replace('_', '-')}`"


def _shown(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


TABLES = {"losses": losses, "modifiers": modifiers, "disagreements": disagreements}


def with_tables(text: str) -> str:
    """The README with every table between its markers made anew."""
    for name, rows in TABLES.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        assert tail, f"the README has no markers {start.strip()} and {end.strip()}"
        text = f"{head}{start}\n{''.join(row + chr(10) for row in rows())}\n{end}{tail}"
    return text


if __name__ == "__main__":
    README.write_text(with_tables(README.read_text()))
