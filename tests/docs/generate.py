"""Write the generated parts of `docs/` from the declarations: `python -m tests.docs.generate`.

`losses.md` comes from the catalogue of losses and their docstrings, `cli.md` from the declared options.
"""

from collections.abc import Callable, Iterator, Mapping

from dpocli.config.flags import COMMANDS, Option, options_of
from dpocli.config.hyperparameters import MODIFIERS, Hyperparameter, Need, Value
from dpocli.config.losses import CATALOGUE, LossSpec, losses_using
from tests.docs.loss_docs import LossDoc
from tests.docs.pages import PAGES, Page

# losses.md


def losses() -> Iterator[str]:
    """A row for each loss: what to choose by."""
    yield "| `--loss` | when | beta | other options | needs |"
    yield "|---|---|---|---|---|"
    for spec in CATALOGUE.values():
        own = ", ".join(f"{_flag(parameter)} {_shown(parameter.default)}" for parameter in spec.hyperparameters)
        yield f"| [`{spec.name}`](#{spec.name}) | {_cell(LossDoc.of(spec.name).when)} | {_beta(spec)} | {own} | {_needs(spec)} |"


def modifiers() -> Iterator[str]:
    """A row for each modifier."""
    yield "| modifier | | losses |"
    yield "|---|---|---|"
    for parameter in MODIFIERS:
        values = ", ".join(parameter.choices) or f"default {_shown(parameter.default)}"
        users = ", ".join(f"`{name}`" for name in losses_using(parameter.name))
        yield f"| {_flag(parameter)} | {parameter.help} ({values}) | {users} |"


def details() -> Iterator[str]:
    """A section for each loss: formula, reward, paper, and where implementations differ."""
    for number, spec in enumerate(CATALOGUE.values()):
        yield from [""] * bool(number)
        yield f"### {spec.name}"
        yield ""
        doc = LossDoc.of(spec.name)
        yield f"{doc.summary}."
        yield ""
        yield f"- Loss of a pair: `{doc.formula}`"
        yield f"- Reward: {spec.reward}"
        yield f"- Paper: {doc.paper}"
        if doc.notes:
            yield f"- {doc.notes}."
        if doc.disagreement:
            yield f"- Other implementations: {doc.disagreement}."


def _beta(spec: LossSpec) -> str:
    return "none" if spec.beta is None else f"{spec.beta:g}"


def _needs(spec: LossSpec) -> str:
    names = {Need.REFERENCE: "reference", Need.COLLISION: "vocabulary sums", Need.WHOLE_BATCH: "whole batch"}
    needs = spec.needs(spec.defaults)
    return ", ".join(name for need, name in names.items() if need in needs) or "policy only"


def _flag(parameter: Hyperparameter) -> str:
    return f"`--{parameter.name.replace('_', '-')}`"


def _shown(value: Value) -> str:
    return value if isinstance(value, str) else f"{value:g}"


# cli.md


def options() -> dict[str, list[Option]]:
    """The options of each command, in the order of `--help`."""
    return {name: options_of(model) for name, model in COMMANDS.items()}


def flags() -> set[str]:
    """Every flag of every command."""
    return {"--config"} | {flag for given in options().values() for option in given for flag in option.flags}


def commands() -> Iterator[str]:
    """A table for each panel of options of each command."""
    for name, given in options().items():
        yield from [""] * (name != next(iter(options())))
        yield f"## {name}"
        panel: object = None
        for option in given:
            if option.panel != panel:
                panel = option.panel
                yield from ("", f"### {name}: {panel}", "", "| option | value | |", "|---|---|---|")
            spelled = " ".join(f"`{flag}`" for flag in option.flags)
            yield f"| {spelled} | {option.metavar} | {_cell(option.help.replace(chr(92) + '[', '['))} |"


def _cell(text: str) -> str:
    """Text inside a table, where a bar would end the cell."""
    return text.replace("|", "\\|")


PARTS: Mapping[str, Mapping[str, Callable[[], Iterator[str]]]] = {
    "losses": {"losses": losses, "modifiers": modifiers, "details": details},
    "cli": {"commands": commands},
}


def generated(page: Page) -> str:
    """The page with everything between its markers written again."""
    text = page.text
    for name, lines in PARTS[page.path.stem].items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->\n"
        head, _, rest = text.partition(start)
        _, _, tail = rest.partition(end)
        assert end in text, f"{page} has no markers {start.strip()} and {end.strip()}"
        text = f"{head}{start}\n{''.join(line + chr(10) for line in lines())}\n{end}{tail}"
    return text


if __name__ == "__main__":
    for stem in PARTS:
        PAGES[stem].path.write_text(generated(PAGES[stem]), encoding="utf-8")
