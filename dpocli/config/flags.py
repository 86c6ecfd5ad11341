"""The options of a command as flat names: flags for Typer, keys for YAML, values of a finished model."""

import difflib
import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from dpocli.config.commands import EvaluateOptions, PrecomputeOptions, TrainOptions
from dpocli.config.options import Options, Panel, Section
from dpocli.config.other_tools import foreign_option

OptionsModel = TypeVar("OptionsModel", bound=Options)

COMMANDS: Mapping[str, type[Options]] = {
    "precompute": PrecomputeOptions,
    "train": TrainOptions,
    "evaluate": EvaluateOptions,
}

METAVARS: Mapping[Any, str] = {int: "INT", float: "FLOAT", Path: "PATH", str: "TEXT", date: "YYYY-MM-DD"}


@dataclass(frozen=True, slots=True)
class Option:
    """One option as users write it."""

    path: tuple[str, ...]
    """Attributes from the command's options to the value: ("optimizer", "learning_rate")."""
    key: str
    """Name in YAML, with underscores."""
    info: FieldInfo

    def value_of(self, options: Options) -> Any:
        """The value in a command's options."""
        return getattr(self._section_of(options), self.path[-1])

    def is_given(self, options: Options) -> bool:
        """Whether the value was given, on the command line or in a file."""
        return self.path[-1] in self._section_of(options).model_fields_set

    def _section_of(self, options: Options) -> Section:
        section: Section = options
        for name in self.path[:-1]:
            section = getattr(section, name)
        return section

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
    def metavar(self) -> str:
        """What `--help` shows for the value; choices are in the help text, where there is room for them."""
        if self.is_switch:
            return ""
        if self.choices:
            return "NAME"
        return METAVARS[get_args(self.kind)[0] if self.is_list else self.kind]

    @property
    def choices(self) -> tuple[str, ...]:
        """The values that are allowed, where they are listed."""
        return get_args(self.kind) if get_origin(self.kind) is Literal else ()

    @property
    def help(self) -> str:
        """Description and default; brackets are escaped, since rich reads them as markup."""
        text = self.info.description or ""
        if self.choices:
            text += f": {', '.join(self.choices)}"
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
    panels = list(Panel)
    return sorted(_declared(model), key=lambda option: (panels.index(option.panel), not option.info.is_required()))


def _declared(model: type[Section], path: tuple[str, ...] = ()) -> Iterator[Option]:
    for name, info in model.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Section):
            yield from _declared(info.annotation, (*path, name))
        else:
            yield Option((*path, name), info.alias or name, info)


def build_options(model: type[OptionsModel], /, **values: Any) -> OptionsModel:
    """The options of a command from flat values, by key.

    Raises:
        pydantic.ValidationError: a value is missing, unknown or impossible.
    """
    sections = {option.key: option.path[0] for option in options_of(model) if len(option.path) > 1}
    nested: dict[str, Any] = {section: {} for section in sections.values()}
    for key, value in values.items():
        (nested[sections[key]] if key in sections else nested)[key] = value
    return model.model_validate(nested)


def values_of(options: Options) -> dict[str, Any]:
    """The values of a command's options by key, as JSON has them."""
    return {option.key: to_jsonable_python(option.value_of(options)) for option in options_of(type(options))}


def given_keys(options: Options) -> list[str]:
    """Keys of the options that were given, on the command line or in a file."""
    return [option.key for option in options_of(type(options)) if option.is_given(options)]


def signature_of(model: type[Options]) -> inspect.Signature:
    """A keyword-only parameter for each option, and `config`, as Typer reads them. Absent flags arrive as None.

    All values are text, switches included (`--merge=true`): pydantic parses them.
    """
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
        kind = list[str] if option.is_list else str
        parameters.append(_parameter(option.key, kind, option.flag, option.metavar, option.help, option.panel))
    return inspect.Signature(parameters)


def _parameter(
    name: str, kind: Any, flags: str, metavar: str | None, help_text: str, panel: Panel
) -> inspect.Parameter:
    declared = typer.Option(flags, metavar=metavar, help=help_text, rich_help_panel=panel.value, show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, declared]
    )


def explain_unknown(name: str, model: type[Options]) -> str:
    """Answer to an unknown option: its equivalent here, the commands that have it, or the nearest name."""
    key = name.strip("-").replace("-", "_").lower()
    if hint := foreign_option(key) or foreign_option(key.removeprefix("no_")):
        return f"this is a name from another tool. Here, {hint}."
    if users := [command for command, other in COMMANDS.items() if any(key == o.key for o in options_of(other))]:
        return f"this is no option of this command; it belongs to {' and '.join(users)}."
    known = {option.key: option.flag if name.startswith("-") else option.key for option in options_of(model)}
    near = difflib.get_close_matches(key, known, n=1)
    return "there is no such option" + (f"; did you mean {known[near[0]]}?" if near else ".")
