"""What `--loss` says: a loss, or a weighted sum such as `0.8*dpo+0.2*bco_pair(delta=none)+sft`, with every number."""

import difflib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from dpocli.config.hyperparameters import BETA, Need, Value
from dpocli.config.losses import CATALOGUE, MIXTURES, LossSpec, losses_using
from dpocli.config.other_tools import answers
from dpocli.errors import UsageError

_NUMBER = r"(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?"

_TERM = re.compile(
    rf"\s*(?:(?P<weight>{_NUMBER})\s*\*)?\s*(?P<name>[A-Za-z]\w*(?:-[A-Za-z]\w*)*)\s*(?:\((?P<values>[^()]*)\))?\s*"
)

_F_ALPHA_ALONE = "--f-alpha: only the alpha divergence uses it; give --f-divergence alpha with it."

_FORM = "a loss, or a weighted sum such as dpo+0.2*sft or 0.8*dpo(beta=0.1)+0.2*bco_pair(delta=none)"


class LossTerm(BaseModel):
    """One loss of a sum, with its weight and every number filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weight: float = 1.0
    beta: float | None = None
    hyperparameters: dict[str, Value] = {}
    """Modifiers stand here only where they are on."""

    @property
    def spec(self) -> LossSpec:
        return CATALOGUE[self.name]

    @property
    def needs(self) -> frozenset[Need]:
        return self.spec.needs(self.hyperparameters)

    @property
    def numbers(self) -> dict[str, Value]:
        """The keywords of the loss function: beta, where the formula has one, and its own hyperparameters."""
        beta = {} if self.beta is None else {"beta": self.beta}
        return beta | {name: value for name, value in self.hyperparameters.items() if name in self.spec.defaults}

    @property
    def modifiers(self) -> dict[str, Value]:
        """Those that are on."""
        return {name: value for name, value in self.hyperparameters.items() if name not in self.spec.defaults}

    def __str__(self) -> str:
        values = ({} if self.beta is None else {"beta": self.beta}) | self.hyperparameters
        inside = ", ".join(f"{name}={_spelled(value)}" for name, value in values.items())
        weight = "" if self.weight == 1 else f"{_spelled(self.weight)}*"
        return f"{weight}{self.name}" + (f"({inside})" if inside else "")


class LossChoice(BaseModel):
    """A loss, or a weighted sum of several. Stands in `dpocli.json` beside a trained model.

    A single loss is written as `{"name", "beta", "hyperparameters"}`, a sum as `{"terms": [...]}`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    terms: tuple[LossTerm, ...]

    @model_validator(mode="before")
    @classmethod
    def _from_single(cls, value: Any) -> Any:
        return {"terms": [value]} if isinstance(value, Mapping) and "name" in value else value

    @model_serializer(mode="wrap")
    def _as_single(self, handler: Any) -> Any:
        written = handler(self)
        return _without_weight(written["terms"][0]) if self.is_single else written

    @property
    def is_single(self) -> bool:
        return len(self.terms) == 1 and self.terms[0].weight == 1

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset().union(*(term.needs for term in self.terms))

    @property
    def needs_reference(self) -> bool:
        return Need.REFERENCE in self.needs

    @property
    def is_whole_batch(self) -> bool:
        return Need.WHOLE_BATCH in self.needs

    @property
    def ranked_by(self) -> LossTerm:
        """The term whose rewards are those of the sum: the first that compares the sides."""
        return next((term for term in self.terms if term.name != "sft"), self.terms[0])

    @property
    def label(self) -> str:
        """Short: names and weights, without the other numbers."""
        return "+".join(f"{'' if term.weight == 1 else _spelled(term.weight) + '*'}{term.name}" for term in self.terms)

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))

    @classmethod
    def of(
        cls, text: str, given: Mapping[str, Value] | None = None, default: "LossChoice | None" = None
    ) -> "LossChoice":
        """The loss that `text` names, with every number filled in.

        Args:
            text: a loss or a weighted sum; a term may carry numbers of its own.
            given: numbers for every term that uses them.
            default: a term of the same name takes its numbers from here before the paper's.

        Raises:
            UsageError: it cannot be read, a name is not known, or a number is not used or not allowed.
        """
        (choice,) = choices_of([text], given or {}, default)
        return choice


def choices_of(texts: Sequence[str], given: Mapping[str, Value], default: LossChoice | None = None) -> list[LossChoice]:
    """The losses that `texts` name. Arguments and errors as for `LossChoice.of`; what is given must be used somewhere."""
    for term in default.terms if default else ():
        if term.name not in CATALOGUE:
            raise UsageError(
                f"The model's dpocli.json: it was trained with the loss {term.name}, which this dpocli does not know. Update "
                "dpocli."
            )
    parsed = [_parse(text) for text in texts]
    known = {term.name: term for term in default.terms} if default else {}
    for name in given:
        if not any(_takes(CATALOGUE[term], name) for terms in parsed for _, term, _ in terms):
            names = ", ".join(dict.fromkeys(term for terms in parsed for _, term, _ in terms))
            users = ", ".join(losses_using(name)) or "all but sft"
            raise UsageError(f"{_flag(name)}: {names} does not use it. Losses that do: {users}.")
    choices = [
        LossChoice(
            terms=tuple(
                _term(
                    name,
                    weight,
                    {key: value for key, value in given.items() if _takes(CATALOGUE[name], key)},
                    own,
                    known.get(name),
                )
                for weight, name, own in terms
            )
        )
        for terms in parsed
    ]
    if "f_alpha" in given and not any("f_alpha" in term.hyperparameters for choice in choices for term in choice.terms):
        raise UsageError(_F_ALPHA_ALONE)
    return choices


def named(choices: Sequence[LossChoice]) -> dict[str, LossChoice]:
    """The losses by their short names, or, where two share one, by name and numbers.

    Raises:
        UsageError: two are the same.
    """
    labels = [choice.label for choice in choices]
    names = [label if labels.count(label) == 1 else str(choice) for label, choice in zip(labels, choices, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--loss: {twice[0]} is given twice.")
    return dict(zip(names, choices, strict=True))


def split_list(text: str) -> list[str]:
    """The losses of a list such as `dpo,simpo(beta=2.5, gamma=1)`: commas inside parentheses do not part them."""
    return [part.strip() for part in re.split(r",(?![^()]*\))", text)]


def names_in(text: str) -> list[str]:
    """The losses that a list of sums names, in their order; none where it cannot be read, which is told elsewhere."""
    try:
        return [name for part in split_list(text) for _, name, _ in _parse(part)]
    except UsageError:
        return []


def numbers_of(name: str) -> set[str]:
    """The numbers that a loss takes: beta, where the formula has one, its hyperparameters and modifiers."""
    spec = CATALOGUE[name]
    return ({"beta"} if spec.beta is not None else set()) | set(spec.accepts)


def text_of_terms(terms: object) -> str:
    """The text of a sum written out in YAML: a mapping with `name`, `weight` and numbers, or a list of such.

    Raises:
        ValueError: it is not of that form; the message says what is wrong.
    """
    texts = []
    for term in terms if isinstance(terms, list) else [terms]:
        if not isinstance(term, Mapping) or "name" not in term:
            raise ValueError("each term is a mapping with a name, such as {name: dpo, weight: 0.8, beta: 0.1}")
        values = {key: value for key, value in term.items() if key not in ("name", "weight")}
        if wrong := [key for key, value in term.items() if not isinstance(value, str)]:
            raise ValueError(f"{wrong[0]} takes one value")
        inside = ", ".join(f"{key}={value}" for key, value in values.items())
        if not re.fullmatch(r"[A-Za-z][\w-]*", term["name"]):
            raise ValueError(f"name: {term['name']!r} is not the name of one loss; a sum has a term for each")
        if wrong := [key for key, value in term.items() if re.search(r"[,()+=]", value) and "e+" not in value]:
            raise ValueError(f"{wrong[0]}: {term[wrong[0]]!r} is not one value")
        if "weight" in term and not re.fullmatch(_NUMBER, term["weight"]):
            raise ValueError(f"weight: {term['weight']!r} is not a number above 0")
        weight = f"{term['weight']}*" if "weight" in term else ""
        texts.append(f"{weight}{term['name']}" + (f"({inside})" if inside else ""))
    return "+".join(texts)


_Parsed = list[tuple[float, str, dict[str, Value]]]


def _parse(text: str) -> _Parsed:
    """Weight, name and own numbers of each term."""
    terms: _Parsed = []
    position = 0
    expanded = MIXTURES.get(text.strip().lower(), text)
    while match := _TERM.match(expanded, position):
        name = match["name"].replace("-", "_").lower()
        _check_name(text, name)
        weight = float(match["weight"] or 1)
        if not 0 < weight < float("inf"):
            raise UsageError(f"--loss {text}: the weight of {name} must be above 0.")
        if any(name == other for _, other, _ in terms):
            raise UsageError(f"--loss {text}: {name} stands there twice.")
        terms.append((weight, name, _own_values(text, name, match["values"])))
        position = match.end()
        if position == len(expanded):
            return terms
        if expanded[position] != "+":
            break
        position += 1
    raise UsageError(f"--loss {text}: cannot be read from {expanded[position:] or 'its end'!r} on. It takes {_FORM}.")


def _own_values(text: str, name: str, inside: str | None) -> dict[str, Value]:
    values: dict[str, Value] = {}
    entries = (inside or "").split(",")
    if not entries[-1].strip():  # nothing, or a comma at the end
        entries.pop()
    for entry in entries:
        key, equals, value = (part.strip() for part in entry.partition("="))
        key = key.replace("-", "_")
        if not equals or not value:
            raise UsageError(f"--loss {text}: {entry.strip()!r} should be of the form name=value.")
        if not _takes(CATALOGUE[name], key):
            takes = ", ".join((["beta"] if CATALOGUE[name].beta is not None else []) + list(CATALOGUE[name].accepts))
            raise UsageError(f"--loss {text}: {name} does not use {key}. It takes {takes}.")
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
        hint = f"it is a sum itself, {MIXTURES[name]}, and stands alone. "
    elif elsewhere := answers("losses").get(name):
        hint = f"{elsewhere}. "
    elif near := difflib.get_close_matches(name, CATALOGUE, n=1):
        hint = f"did you mean {near[0]}? "
    there = ", ".join((*CATALOGUE, *MIXTURES))
    raise UsageError(f"--loss {text}: there is no loss {name}. {hint[:1].upper()}{hint[1:]}There are {there}.")


def _takes(spec: LossSpec, name: str) -> bool:
    return spec.beta is not None if name == "beta" else name in spec.accepts


def _term(
    name: str, weight: float, given: Mapping[str, Value], own: Mapping[str, Value], known: LossTerm | None
) -> LossTerm:
    """The term with every number: its own before those given for all, before those of `known`, before the paper's."""
    spec = CATALOGUE[name]
    if known and (unknown := sorted(known.hyperparameters.keys() - spec.accepts.keys())):
        raise UsageError(
            f"The model's dpocli.json: it was trained with {name} and {', '.join(unknown)}, which this dpocli does not "
            "know. Update dpocli."
        )
    values: dict[str, Value] = {}
    for key, value in {**given, **own}.items():
        parameter = BETA if key == "beta" else spec.accepts[key]
        try:
            values[key] = parameter.parse(value)
        except ValueError as error:
            place = f"--loss {name}({key}={value})" if key in own else f"{_flag(key)} {value}"
            raise UsageError(f"{place}: {error} for {name}.") from None
    beta = values.pop("beta", (known.beta if known else None) or spec.beta)
    numbers = spec.defaults | (dict(known.hyperparameters) if known else {}) | values
    for modifier in spec.modifiers:  # one that is off is no setting
        if numbers.get(modifier.name) == modifier.off:
            numbers.pop(modifier.name, None)
    if numbers.get("f_divergence") == "alpha":
        numbers.setdefault("f_alpha", spec.accepts["f_alpha"].default)
    elif numbers.pop("f_alpha", None) is not None and "f_alpha" in own:
        raise UsageError(_F_ALPHA_ALONE)
    return LossTerm(name=name, weight=weight, beta=None if beta is None else float(beta), hyperparameters=numbers)


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _spelled(value: Value) -> str:
    """The shortest text that reads back as the same value."""
    return value if isinstance(value, str) else repr(value).removesuffix(".0")


def _without_weight(term: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in term.items() if key != "weight"}
