"""The grammar of `--loss`: text of losses and weighted sums to terms, and terms to text."""

import difflib
import re
from collections.abc import Mapping

from dpocli.config.hyperparameters import Value
from dpocli.config.losses import CATALOGUE, MIXTURES
from dpocli.config.other_tools import answers
from dpocli.errors import UsageError

_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"

_TERM = re.compile(
    rf"\s*(?:(?P<weight>{_NUMBER})\s*\*)?\s*(?P<name>[A-Za-z]\w*(?:-[A-Za-z]\w*)*)\s*(?:\((?P<values>[^()]*)\))?\s*"
)

_FORM = "a loss, or a weighted sum such as dpo+0.2*sft or 0.8*dpo(beta=0.1)+0.2*bco_pair(delta=none)"


def split_list(text: str) -> list[str]:
    """Split `dpo,simpo(beta=2.5, gamma=1)` at the commas outside parentheses."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", text)]


def names_in(text: str) -> list[str]:
    """The losses in a list of sums, in their order; none where it cannot be read, which is reported elsewhere."""
    try:
        return [name for part in split_list(text) for _, name, _ in parse(part)]
    except UsageError:
        return []


def parse(text: str) -> list[tuple[float, str, dict[str, Value]]]:
    """Weight, name and own numbers of each term of a sum.

    Raises:
        UsageError: it cannot be read, or a name is unknown or given twice.
    """
    terms: list[tuple[float, str, dict[str, Value]]] = []
    position = 0
    expanded = MIXTURES.get(text.strip().lower(), text)
    while match := _TERM.match(expanded, position):
        name = match["name"].replace("-", "_").lower()
        _check_name(text, name)
        weight = float(match["weight"] or 1)
        if not 0 < weight < float("inf"):
            raise UsageError(f"--loss {text}: the weight of {name} must be above 0.")
        if any(name == other for _, other, _ in terms):
            raise UsageError(f"--loss {text}: {name} is given twice.")
        terms.append((weight, name, _own_numbers(text, name, match["values"])))
        position = match.end()
        if position == len(expanded):
            return terms
        if expanded[position] != "+":
            break
        position += 1
    raise UsageError(f"--loss {text}: cannot be read from {expanded[position:] or 'its end'!r} on. It takes {_FORM}.")


def _own_numbers(text: str, name: str, inside: str | None) -> dict[str, Value]:
    """The numbers in the parentheses of a term."""
    values: dict[str, Value] = {}
    accepts = CATALOGUE[name].accepts
    entries = (inside or "").split(",")
    if not entries[-1].strip():  # nothing, or a comma at the end
        entries.pop()
    for entry in entries:
        key, equals, value = (part.strip() for part in entry.partition("="))
        key = key.replace("-", "_")
        if not equals or not value:
            raise UsageError(f"--loss {text}: {entry.strip()!r} should be of the form name=value.")
        if key not in accepts:
            raise UsageError(f"--loss {text}: {name} does not use {key}. It takes {', '.join(accepts)}.")
        if key in values:
            raise UsageError(f"--loss {text}: {key} is given twice for {name}.")
        values[key] = value
    return values


def _check_name(text: str, name: str) -> None:
    if name in CATALOGUE:
        return
    if reason := answers("refused_losses").get(name):
        raise UsageError(f"--loss {text}: {name} {reason}.")
    hint = ""
    if name in MIXTURES:
        hint = f"it is a sum itself, {MIXTURES[name]}, and is given alone. "
    elif elsewhere := answers("losses").get(name):
        hint = f"{elsewhere}. "
    elif near := difflib.get_close_matches(name, CATALOGUE, n=1):
        hint = f"did you mean {near[0]}? "
    there = ", ".join((*CATALOGUE, *MIXTURES))
    raise UsageError(f"--loss {text}: there is no loss {name}. {hint[:1].upper()}{hint[1:]}There are {there}.")


def text_of_terms(terms: object) -> str:
    """The text of a sum in YAML: a mapping with `name`, `weight` and numbers, or a list of such mappings.

    Raises:
        ValueError: it has another form.
    """
    texts = []
    for term in terms if isinstance(terms, list) else [terms]:
        if not isinstance(term, Mapping) or "name" not in term:
            raise ValueError("each term is a mapping with a name, such as {name: dpo, weight: 0.8, beta: 0.1}")
        for key, value in term.items():
            if not isinstance(value, str):
                raise ValueError(f"{key} takes one value")
            if key == "name" and not re.fullmatch(r"[A-Za-z][\w-]*", value):
                raise ValueError(f"name: {value!r} is not the name of one loss; a sum has a term for each")
            if key == "weight" and not re.fullmatch(_NUMBER, value):
                raise ValueError(f"weight: {value!r} is not a number above 0")
            if re.search(r"[,()+=]", value) and "e+" not in value:
                raise ValueError(f"{key}: {value!r} is not one value")
        values = {key: value for key, value in term.items() if key not in ("name", "weight")}
        texts.append(text_of(term["name"], term.get("weight", ""), values))
    return "+".join(texts)


def text_of(name: str, weight: str, values: Mapping[str, Value]) -> str:
    """The text of one term; `parse` reads it back."""
    inside = ", ".join(f"{key}={shortest(value)}" for key, value in values.items())
    weighted = f"{weight}*{name}" if weight else name
    return f"{weighted}({inside})" if inside else weighted


def shortest(value: Value) -> str:
    """The shortest text that reads back as the same value."""
    return value if isinstance(value, str) else repr(value).removesuffix(".0")
