"""The text after `--loss`: a loss, or a weighted sum such as `0.8*dpo+0.2*bco_pair(delta=none)+sft`, with every number."""

from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, model_serializer, model_validator

from dpocli.config.hyperparameters import Need, Value
from dpocli.config.loss_grammar import parse, shortest, text_of
from dpocli.config.losses import CATALOGUE, LossSpec, losses_using
from dpocli.errors import UsageError


class LossTerm(BaseModel):
    """One loss of a sum, with its weight and every number filled in."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    weight: float = 1.0
    beta: float | None = None
    hyperparameters: dict[str, Value] = {}
    """Modifiers are here only where they are on."""

    @property
    def spec(self) -> LossSpec:
        return CATALOGUE[self.name]

    @property
    def needs(self) -> frozenset[Need]:
        return self.spec.needs(self.hyperparameters)

    @property
    def numbers(self) -> dict[str, Value]:
        """The keywords of the loss function: beta, where the formula has one, and its own hyperparameters."""
        return {name: value for name, value in self._values.items() if name not in self.modifiers}

    @property
    def modifiers(self) -> dict[str, Value]:
        """The modifiers that are on."""
        return {name: value for name, value in self.hyperparameters.items() if name not in self.spec.defaults}

    @property
    def _values(self) -> dict[str, Value]:
        return ({} if self.beta is None else {"beta": self.beta}) | self.hyperparameters

    def __str__(self) -> str:
        return text_of(self.name, "" if self.weight == 1 else shortest(self.weight), self._values)


class LossChoice(BaseModel):
    """A loss, or a weighted sum of several.

    In `dpocli.json` beside a trained model, a single loss is `{"name", "beta", "hyperparameters"}`, a sum
    `{"terms": [...]}`.
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
        if not self.is_single:
            return written
        return {key: value for key, value in written["terms"][0].items() if key != "weight"}

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
        """The term whose rewards are the rewards of the sum: the first that compares the sides."""
        return next((term for term in self.terms if term.name != "sft"), self.terms[0])

    @property
    def label(self) -> str:
        """Names and weights, without the other numbers."""
        return "+".join(f"{'' if term.weight == 1 else shortest(term.weight) + '*'}{term.name}" for term in self.terms)

    def __str__(self) -> str:
        return " + ".join(map(str, self.terms))

    @classmethod
    def of(
        cls, text: str, given: Mapping[str, Value] | None = None, default: "LossChoice | None" = None
    ) -> "LossChoice":
        """Read one loss or sum. Arguments and errors as for `choices_of`."""
        (choice,) = choices_of([text], given or {}, default)
        return choice


def choices_of(texts: Sequence[str], given: Mapping[str, Value], default: LossChoice | None = None) -> list[LossChoice]:
    """Read losses, with every number filled in.

    Args:
        texts: each a loss or a weighted sum; a term may carry its own numbers.
        given: numbers for every term that uses them; each must be used by one at least.
        default: a term of the same name takes its numbers from here before the paper's.

    Raises:
        UsageError: a text cannot be read, a name is unknown, or a number is not used or not allowed.
    """
    known = {term.name: term for term in default.terms} if default else {}
    if unknown := sorted(known.keys() - CATALOGUE.keys()):
        raise _newer_model(f"the loss {unknown[0]}")
    parsed = [parse(text) for text in texts]
    names = list(dict.fromkeys(name for terms in parsed for _, name, _ in terms))
    for number in given:
        if not any(number in CATALOGUE[name].accepts for name in names):
            users = "all but sft" if number == "beta" else ", ".join(losses_using(number))
            raise UsageError(f"{_flag(number)}: {', '.join(names)} does not use it. Losses that do: {users}.")
    choices = [
        LossChoice(terms=tuple(_term(name, weight, given, own, known.get(name)) for weight, name, own in terms))
        for terms in parsed
    ]
    if "f_alpha" in given and not any("f_alpha" in term.hyperparameters for choice in choices for term in choice.terms):
        raise UsageError(_F_ALPHA_ALONE)
    return choices


_F_ALPHA_ALONE = "--f-alpha: only the alpha divergence uses it; give --f-divergence alpha with it."


def _term(
    name: str, weight: float, given: Mapping[str, Value], own: Mapping[str, Value], known: LossTerm | None
) -> LossTerm:
    """Fill in every number: the term's own before `given`, before the numbers of `known`, before the paper's."""
    spec = CATALOGUE[name]
    before = known.hyperparameters if known else {}
    if unknown := sorted(before.keys() - spec.accepts.keys()):
        raise _newer_model(f"{name} and {', '.join(unknown)}")
    values: dict[str, Value] = {}
    for key, value in {**given, **own}.items():
        if parameter := spec.accepts.get(key):
            try:
                values[key] = parameter.parse(value)
            except ValueError as error:
                place = f"--loss {name}({key}={value})" if key in own else f"{_flag(key)} {value}"
                raise UsageError(f"{place}: {error} for {name}.") from None
    beta = values.pop("beta", (known.beta if known else None) or spec.beta)
    numbers = spec.defaults | before | values
    for modifier in spec.modifiers:  # one that is off is no setting
        if numbers.get(modifier.name) == modifier.off:
            numbers.pop(modifier.name, None)
    if numbers.get("f_divergence") == "alpha":
        numbers.setdefault("f_alpha", spec.accepts["f_alpha"].default)
    elif numbers.pop("f_alpha", None) is not None and "f_alpha" in own:
        raise UsageError(_F_ALPHA_ALONE)
    return LossTerm(name=name, weight=weight, beta=None if beta is None else float(beta), hyperparameters=numbers)


def _newer_model(what: str) -> UsageError:
    return UsageError(
        f"The model's dpocli.json: it was trained with {what}, which this dpocli does not know. Update dpocli."
    )


def named(choices: Sequence[LossChoice]) -> dict[str, LossChoice]:
    """The losses by label, or, where two share one, by label and numbers.

    Raises:
        UsageError: two are the same.
    """
    labels = [choice.label for choice in choices]
    names = [label if labels.count(label) == 1 else str(choice) for label, choice in zip(labels, choices, strict=True)]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UsageError(f"--loss: {twice[0]} is given twice.")
    return dict(zip(names, choices, strict=True))


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")
