"""Names of other tools: every answer leads to something that exists, and every name gets its answer."""

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from dpocli.config import other_tools
from dpocli.config.flags import COMMANDS, explain_unknown, options_of
from dpocli.config.loss_expression import LossChoice
from dpocli.config.losses import CATALOGUE, MIXTURES
from dpocli.config.other_tools import answers
from dpocli.errors import UsageError

ENTRIES: dict[str, list[dict[str, object]]] = yaml.safe_load(
    Path(other_tools.__file__).with_suffix(".yaml").read_text(encoding="utf-8")
)
OPTIONS = [option for command in COMMANDS.values() for option in options_of(command)]
THEIRS = {name for kind in ("options", "losses") for name in answers(kind)}
FLAGS = {flag for option in OPTIONS for flag in option.flags}


def unknown_names(answer: str) -> set[str]:
    """The options and losses that an answer names and that do not exist."""
    losses = re.findall(r"(?:--loss |it is (?:called )?|\d\*)(\w+)|\b([a-z]+_\w+)", answer)
    named = {name for pair in losses for name in pair if name}
    return (set(re.findall(r"--[a-z0-9-]+", answer)) - FLAGS) | (named - CATALOGUE.keys() - THEIRS)


def test_every_answer_leads_to_what_exists_and_every_name_gets_its_answer() -> None:
    wrong = []
    assert ENTRIES.keys() == {"options", "losses", "refused_losses"}
    names = {kind: Counter(name for entry in entries for name in entry["names"]) for kind, entries in ENTRIES.items()}
    ours = {"options": {option.key for option in OPTIONS}, "losses": {*CATALOGUE, *MIXTURES, *names["refused_losses"]}}
    ours["refused_losses"] = ours["losses"] - names["refused_losses"].keys()
    for kind, counts in names.items():
        wrong += [f"{kind}: {name} is listed twice" for name, count in counts.items() if count > 1]
        wrong += [f"{kind}: {name} is one of ours" for name in counts.keys() & ours[kind]]
        wrong += [f"{kind}: {name} is never looked up" for name in counts if not re.fullmatch(r"[a-z]\w*", name)]
    for kind, entries in ENTRIES.items():
        for entry in entries:
            wrong += [f"{kind}: {name} does not exist: {entry}" for name in unknown_names(str(entry["answer"]))]
    for name, answer in answers("options").items():
        expected = f"this is a name from another tool. Here, {answer}."
        for given in ("--" + name.replace("_", "-"), f"--no_{name}", name):
            if explain_unknown(given, COMMANDS["train"]) != expected:
                wrong.append(f"options: {given} is not recognised")
    for name, answer in answers("losses").items():
        if f"there is no loss {name}. {answer[0].upper()}{answer[1:]}. There are dpo," not in refusal(name):
            wrong.append(f"losses: {name} is not recognised")
    wrong += [
        f"refused_losses: {name} is not refused"
        for name, answer in answers("refused_losses").items()
        if refusal(name) != f"--loss {name}: {name} {answer}."
    ]
    assert wrong == []


def refusal(loss: str) -> str:
    with pytest.raises(UsageError) as caught:
        LossChoice.of(loss)
    return str(caught.value)


def test_unknown_names_are_seen() -> None:
    assert unknown_names("use --beta or --no-such, --loss simpo, --loss nope") == {"--no-such", "nope"}
    assert unknown_names("it is called dpop here; it is nope; it is called nil") == {"nope", "nil"}
    assert unknown_names("--loss dpo+0.2*nope; nearest here are bco_pair and such_loss") == {"nope", "such_loss"}
