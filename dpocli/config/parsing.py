"""Options from flags and a YAML file, and the `config.yaml` that reproduces them.

Flags and YAML both arrive as text, and pydantic alone parses them: one place for bounds, one wording for errors.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from dpocli import __version__
from dpocli.config.commands import EvaluateOptions, TrainOptions
from dpocli.config.flags import Option, OptionsModel, build_options, explain_unknown, given_keys, options_of, values_of
from dpocli.config.loss_expression import names_in, numbers_of, text_of_terms
from dpocli.config.options import NUMBERS_OF_LOSSES, DataOptions, Options
from dpocli.config.training_options import ADAMW_SETTINGS, LoraOptions
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
    """The options of a command: defaults < `--config` < flags, which also replace what says the same thing otherwise.

    Args:
        model: which command's.
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
        gone = replaced(_texts(entries), _texts(file))
        entries = {name: entry for name, entry in file.items() if name not in gone} | entries
    for entry in entries.values():
        if entry.value == "" or (isinstance(entry.value, list) and "" in entry.value):
            raise UsageError(f"{entry.place}: the value is empty (a shell variable that is not set?).")
    try:
        options = build_options(model, **{key: entry.value for key, entry in entries.items()})
    except ValidationError as error:
        told = [_describe(detail, model, entries) for detail in error.errors()]
        raise UsageError("\n".join(dict.fromkeys(told))) from error
    _check_loss(options, entries)
    return options


@dataclass(frozen=True, slots=True)
class _Entry:
    """A value that was given, and where."""

    option: Option
    value: Text
    place: str
    """How an error about it begins: the flag, or file, line and key."""


def _texts(entries: Mapping[str, _Entry]) -> dict[str, Text]:
    return {name: entry.value for name, entry in entries.items()}


def _check_loss(options: Options, entries: Mapping[str, _Entry]) -> None:
    """Raises UsageError where a loss is named that is none, or has not these numbers; what a file gives, by its place."""
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
    """One of pydantic's errors as a sentence that begins with where the value was given."""
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
    """The options in a YAML file. Numbers stay text, so that 5e-7, which YAML 1.1 takes for a string, is one too."""
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
    """The file of `--config`: one that is there, else a recipe of the package."""
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
    """The text of a loss that is written out term by term."""
    for term in node.value if isinstance(node, yaml.SequenceNode) else [node]:
        keys = [key.value for key, _ in term.value] if isinstance(term, yaml.MappingNode) else []
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise UsageError(f"{place}: {twice[0]} is given twice in one term; leave one of them.")
    try:
        return text_of_terms(yaml.load(yaml.serialize(node), Loader=yaml.BaseLoader))
    except (ValueError, yaml.YAMLError) as error:
        raise UsageError(f"{place}: {' '.join(str(error).split())}.") from None


def dump_yaml(options: Options, command: str) -> str:
    """The `config.yaml` of a command. Given back with --config, it reproduces the command.

    The defaults are written out below what was given, since those of a later version may be others.
    """
    values = {key: value for key, value in values_of(options).items() if value is not None and key != COMMAND_LINE_ONLY}
    given = given_keys(options)
    return (
        f"# dpocli {command}, version {__version__}. To do the same again: dpocli {command} --config THIS_FILE\n"
        + _as_yaml({key: value for key, value in values.items() if key in given})
        + "\n# Left at their defaults:\n"
        + _as_yaml({key: value for key, value in values.items() if key not in given and value != []})
    )


def _as_yaml(values: Mapping[str, Any]) -> str:
    return str(yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, width=1000)) if values else ""


_ENCODING = frozenset(DataOptions.model_fields) - {"files", "scratch"}
"""Of --data alone: a cache holds encoded pairs."""

_LORA = frozenset(f"lora_{name}" for name in LoraOptions.model_fields if name not in ("rank", "merge"))
"""Describe the adapter that `--lora-rank` asks for."""

ALTERNATIVES: tuple[tuple[tuple[str, frozenset[str]], ...], ...] = (
    (("warmup_ratio", frozenset()), ("warmup_steps", frozenset())),
    (("epochs", frozenset()), ("max_steps", frozenset())),
    (("reference", frozenset()), ("data", _ENCODING)),
    (("eval_reference", frozenset()), ("eval_fraction", frozenset())),
    (("adapter", frozenset()), ("lora_rank", _LORA)),
)
"""Each a choice between options: the option, and what has a meaning with it alone."""


def replaced(flags: Mapping[str, object], file: Mapping[str, object]) -> set[str]:
    """The keys of a file that are replaced by flags.

    A loss takes the numbers of the file's own loss with it, less those of a term that stays the first; where the file
    names none, its numbers are meant for any.

    Args:
        flags: what was given on the command line: key → text.
        file: what was given in the file: key → text.
    """
    gone: set[str] = set()
    for choice in ALTERNATIVES:
        for (name, _), (other, settings) in permutations(choice, 2):
            if name in flags and other in file:
                gone |= {other, *settings}
    if "loss" in flags and "loss" in file:
        gone |= _numbers_of_another_loss(str(flags["loss"]), str(file["loss"]))
    if flags.get("optimizer") == "rmsprop":
        gone |= set(ADAMW_SETTINGS)
    return gone & file.keys() - flags.keys()


def _numbers_of_another_loss(flag: str, file: str) -> set[str]:
    """Those that a file gives for its own loss, and that mean nothing for the one of the flag."""
    now, before = names_in(flag), names_in(file)
    if flag == file or (now and set(now) == set(before)):
        return set()
    # `sft` only goes with a loss that compares the sides, wherever it stands.
    first, first_before = ([name for name in names if name != "sft"] or names for names in (now, before))
    kept = numbers_of(first[0]) if first and first_before and first[0] == first_before[0] else set()
    return set(NUMBERS_OF_LOSSES) - kept
