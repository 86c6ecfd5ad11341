"""Options from flags and a YAML file, and the `config.yaml` that reproduces them.

Flags and YAML both arrive as text, and pydantic alone parses them: one place for bounds, one wording for errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dpocli import __version__
from dpocli.config.commands import EvaluateOptions, TrainOptions
from dpocli.config.flags import Option, OptionsModel, build_options, explain_unknown, given_keys, options_of, values_of
from dpocli.config.loss_expression import text_of_terms
from dpocli.config.options import Options
from dpocli.config.precedence import replaced_keys
from dpocli.errors import UsageError

Text = str | bool | list[str]
"""A value as flags and YAML give it."""

RECIPES = Path(__file__).parents[1] / "recipes"
"""Published settings that come with the package: `--config recipes/NAME.yaml`."""

COMMAND_LINE_ONLY = "json"
"""How a result is printed does not change it, so this option is not in `config.yaml`."""

EXPECTED: Mapping[str, str] = {
    "int_parsing": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "date_from_datetime_parsing": "must be a date such as 2025-01-31",
    "date_parsing": "must be a date such as 2025-01-31",
    "string_pattern_mismatch": "not understood; {description}",
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "literal_error": "is not one of {expected}",
}
"""pydantic's kinds of errors in our words; kinds not listed keep pydantic's own."""


def load_options(model: type[OptionsModel], flags: Mapping[str, Text | None]) -> OptionsModel:
    """Options of a command: defaults < `--config` < flags, which also replace their alternatives in the file.

    Args:
        model: options model of the command.
        flags: key → text; None where a flag was not given; `config` is the YAML file.

    Raises:
        UsageError: something is missing, unknown or impossible; a line for each.
    """
    entries = {
        option.key: _Entry(option, value, option.flag)
        for option in options_of(model)
        if (value := flags.get(option.key)) not in (None, [])
    }
    if (config := flags.get("config")) is not None:
        file = _read_yaml(_config_file(str(config)), model)
        dropped = replaced_keys(_texts(entries), _texts(file))
        entries = {key: entry for key, entry in file.items() if key not in dropped} | entries
    for entry in entries.values():
        if entry.value == "" or (isinstance(entry.value, list) and "" in entry.value):
            raise UsageError(f"{entry.place}: the value is empty (a shell variable that is not set?).")
    try:
        options = build_options(model, **{key: entry.value for key, entry in entries.items()})
    except ValidationError as error:
        problems = [_describe(detail, model, entries) for detail in error.errors()]
        raise UsageError("\n".join(dict.fromkeys(problems))) from error
    _check_loss(options, entries)
    return options


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value as given, and its place."""

    option: Option
    value: Text
    place: str
    """How an error about it begins: the flag, or file, line and key."""


def _texts(entries: Mapping[str, _Entry]) -> dict[str, Text]:
    return {name: entry.value for name, entry in entries.items()}


def _check_loss(options: Options, entries: Mapping[str, _Entry]) -> None:
    """Raise UsageError for an unknown loss or a hyperparameter that it does not have, naming the place in a file."""
    if not isinstance(options, TrainOptions | EvaluateOptions) or not options.loss.name:
        return
    try:
        options.loss.loss_choices()
    except UsageError as error:
        for entry in entries.values():
            flag, message = entry.option.flag, str(error)
            if message.startswith((f"{flag}:", f"{flag} ")):
                raise UsageError(entry.place + message.removeprefix(flag)) from error
        raise


def _describe(detail: ErrorDetails, model: type[Options], entries: Mapping[str, _Entry]) -> str:
    """Sentence for one of pydantic's errors; it begins with the place of the value."""
    options = {option.key: option for option in options_of(model)}
    context = detail.get("ctx", {})
    if detail["type"] == "value_error":  # a validator of a section, whose message begins with the key
        key, _, what = str(context["error"]).partition(": ")
        return f"{entries[key].place if key in entries else options[key].flag}: {what}."
    option = options[next(name for name in reversed(detail["loc"]) if isinstance(name, str))]
    if detail["type"] == "missing":
        return f"{option.flag}: missing; give the {(option.info.description or '').partition(';')[0]}."
    expected = EXPECTED.get(detail["type"])
    what = expected.format(**context, description=option.info.description) if expected else detail["msg"]
    return f"{entries[option.key].place} {detail['input']}: {what}."


def _read_yaml(path: Path, model: type[Options]) -> dict[str, _Entry]:
    """Options of a YAML file. Numbers stay text: YAML 1.1 reads 5e-7 as a string."""
    root = _parse_yaml(path)
    if not isinstance(root, yaml.MappingNode):
        raise UsageError(f"--config {path}: holds no options; it must be lines of the form `batch_size: 64`.")
    options = {option.key: option for option in options_of(model)}
    entries: dict[str, _Entry] = {}
    seen: dict[str, int] = {}
    for key_node, value_node in root.value:
        key = str(key_node.value).replace("-", "_")
        place = f"{path}:{key_node.start_mark.line + 1}: {key}"
        if key not in options:
            raise UsageError(f"{place}: {explain_unknown(key, model)}")
        if key in seen:
            raise UsageError(f"{place}: given twice, first in line {seen[key]}; leave one of them.")
        seen[key] = key_node.start_mark.line + 1
        if key == "loss" and not isinstance(value_node, yaml.ScalarNode):
            value: Text | None = _loss_of_terms(value_node, place)
        else:
            value = _yaml_value(value_node, options[key], place)
        if value is not None:
            entries[key] = _Entry(options[key], value, place)
    return entries


def _config_file(given: str) -> Path:
    """File of `--config`: an existing one, else a recipe of the package."""
    path = Path(given)
    if path.parent != Path("recipes") or path.exists():
        return path
    recipe = RECIPES / path.name
    if not recipe.is_file():
        names = ", ".join(sorted(f"recipes/{file.name}" for file in RECIPES.glob("*.yaml")))
        raise UsageError(f"--config {given}: there is neither such a file nor such a recipe. There are {names}.")
    return recipe


def _parse_yaml(path: Path) -> yaml.Node | None:
    try:
        return yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UsageError(f"--config {path}: cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"--config {path}: is not UTF-8 text, so it is no YAML file.") from error
    except yaml.MarkedYAMLError as error:
        line = f":{error.problem_mark.line + 1}" if error.problem_mark else ""
        raise UsageError(f"{path}{line}: is not valid YAML: {error.problem}.") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path}: is not valid YAML: {error}.") from error


def _yaml_value(node: yaml.Node, option: Option, place: str) -> Text | None:
    """The text of a value; None for null, which leaves an option at its default."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag == "tag:yaml.org,2002:null":
            return None
        return [str(node.value)] if option.is_list else str(node.value)
    items = node.value if option.is_list and isinstance(node, yaml.SequenceNode) else [node]
    if all(isinstance(item, yaml.ScalarNode) for item in items):
        return [str(item.value) for item in items]
    takes = "a value or a list of values" if option.is_list else "one value"
    raise UsageError(f"{place}: takes {takes}.")


def _loss_of_terms(node: yaml.Node, place: str) -> str:
    """Text of a loss that YAML lists term by term."""
    for term in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        keys = [key.value for key, _ in term.value] if isinstance(term, yaml.MappingNode) else []
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UsageError(f"{place}: {twice[0]} is given twice in one term; leave one of them.")
    try:
        return text_of_terms(yaml.load(yaml.serialize(node), Loader=yaml.BaseLoader))
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{place}: {' '.join(str(error).split())}.") from None


def dump_yaml(options: Options, command: str) -> str:
    """The `config.yaml` of a command, which reproduces it with --config.

    Defaults are written out too, below the given options, since a later version may have other defaults.
    """
    values = {key: value for key, value in values_of(options).items() if value is not None and key != COMMAND_LINE_ONLY}
    given = given_keys(options)
    return (
        f"# dpocli {command}, version {__version__}. To reproduce: dpocli {command} --config THIS_FILE\n"
        + _as_yaml({key: value for key, value in values.items() if key in given})
        + "\n# Left at their defaults:\n"
        + _as_yaml({key: value for key, value in values.items() if key not in given and value != []})
    )


def _as_yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)) if values else ""
