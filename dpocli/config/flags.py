"""One declaration of the options (`config.models`) serves the flags, `--config FILE.yaml`, `--help` and `config.yaml`.

Flags and YAML both arrive here as text and pydantic alone parses them: one place for bounds, one wording for errors.
"""

import difflib
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo

from dpocli.config.commands import EvaluateOptions, PrecomputeOptions, TrainOptions
from dpocli.config.options import Options, Panel
from dpocli.config.other_tools import foreign_option

COMMANDS: Mapping[str, type[Options]] = {
    "precompute": PrecomputeOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
}

METAVARS: Mapping[Any, str] = {int: "INTEGER", float: "FLOAT", Path: "PATH", str: "TEXT", date: "YYYY-MM-DD"}


@dataclass(frozen=True, slots=True)
class Option:
    """One option as users write it."""

    field: str
    key: str
    """Name in YAML, with underscores."""
    info: FieldInfo

    @property
    def flag(self) -> str:
        return "--" + self.key.replace("_", "-")

    @property
    def flags(self) -> tuple[str, ...]:
        return (self.flag, self.flag.replace("--", "--no-", 1)) if self.is_switch else (self.flag,)

    @property
    def kind(self) -> Any:
        """The type less `| None`."""
        annotation = self.info.annotation
        if get_origin(annotation) in (Union, UnionType):
            (annotation,) = (kind for kind in get_args(annotation) if kind is not NoneType)
        return annotation

    @property
    def is_switch(self) -> bool:
        return self.kind is bool

    @property
    def is_list(self) -> bool:
        return get_origin(self.kind) is list

    @property
    def metavar(self) -> str | None:
        if self.is_switch:
            return None
        if get_origin(self.kind) is Literal:
            return "|".join(get_args(self.kind))
        return METAVARS[get_args(self.kind)[0] if self.is_list else self.kind]

    @property
    def help(self) -> str:
        """Description and default; brackets would be taken for markup by rich."""
        text = self.info.description or ""
        if self.info.is_required():
            text += " (required)"
        elif self.info.default not in (None, []) and self.info.default is not False:
            text += f" (default: {self.info.default})"
        return text.replace("[", r"\[")

    @property
    def panel(self) -> Panel:
        extra = self.info.json_schema_extra
        assert isinstance(extra, dict)
        return Panel(str(extra["panel"]))


def options_of(model: type[Options]) -> list[Option]:
    """Every option of a command, by panel; in each the required ones come first, then as declared."""
    declared = [Option(name, info.alias or name, info) for name, info in model.model_fields.items()]
    return sorted(declared, key=lambda option: (list(Panel).index(option.panel), not option.info.is_required()))


def signature_of(model: type[Options]) -> inspect.Signature:
    """What Typer needs to know: a keyword-only parameter per option, and `config`. Absent flags arrive as None."""
    parameters = [
        _parameter(
            "config",
            str,
            "--config",
            "PATH",
            "YAML file with options, or recipes/NAME.yaml of the package; flags override it",
            Panel.MAIN,
        )
    ]
    for option in options_of(model):
        kind = bool if option.is_switch else list[str] if option.is_list else str
        parameters.append(
            _parameter(option.field, kind, "/".join(option.flags), option.metavar, option.help, option.panel)
        )
    return inspect.Signature(parameters)


def _parameter(
    name: str, kind: Any, flags: str, metavar: str | None, help_text: str, panel: Panel
) -> inspect.Parameter:
    declared = typer.Option(flags, metavar=metavar, help=help_text, rich_help_panel=panel.value, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def explain_unknown(name: str, model: type[Options]) -> str:
    """What to say about an option that `model` has not: its equivalent here, whose it is, or the nearest name."""
    key = name.strip("-").replace("-", "_").lower()
    if hint := foreign_option(key) or foreign_option(key.removeprefix("no_")):
        return f"this is a name from another tool. Here, {hint}."
    if users := [command for command, other in COMMANDS.items() if any(key == o.key for o in options_of(other))]:
        return f"this is no option of this command; it belongs to {' and '.join(users)}."
    known = {option.key: option.flag if name.startswith("-") else option.key for option in options_of(model)}
    near = difflib.get_close_matches(key, known, n=1)
    return "there is no such option" + (f"; did you mean {known[near[0]]}?" if near else ".")
