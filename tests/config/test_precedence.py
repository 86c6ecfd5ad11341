"""A flag wins over a file: over the same option there, and over what says the same thing otherwise."""

from itertools import combinations
from pathlib import Path

import pytest

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import values_of
from dpocli.config.parsing import load_options
from dpocli.config.precedence import ALTERNATIVES
from dpocli.errors import UsageError

GIVEN = {"model": "m", "out": "o"}


def load(tmp_path: Path, lines: str, **flags: str) -> TrainOptions:
    (file := tmp_path / "run.yaml").write_text(lines)
    return load_options(TrainOptions, GIVEN | {"config": str(file)} | flags)


@pytest.mark.parametrize(
    ("lines", "flags", "gone"),
    [
        ("reference: r\nwarmup_steps: 150", {"warmup_ratio": "0.2"}, {"warmup_steps": None}),
        ("reference: r\nwarmup_ratio: 0.2", {"warmup_steps": "5"}, {"warmup_ratio": 0.1}),
        ("reference: r\nepochs: 3", {"max_steps": "5"}, {"epochs": None}),
        ("reference: r\nmax_steps: 5", {"epochs": "3"}, {"max_steps": None}),
        ("data: [a.jsonl]\nmax_length: 99", {"reference": "r"}, {"data": [], "max_length": 2048}),
        ("reference: r", {"data": ["a.jsonl"], "loss": "simpo"}, {"reference": None}),
        ("reference: r\neval_reference: e", {"eval_fraction": "0.1"}, {"eval_reference": None}),
        ("reference: r\neval_fraction: 0.1", {"eval_reference": "e"}, {"eval_fraction": 0.0}),
        (
            "reference: r\nlora_rank: 8\nlora_variant: dora",
            {"adapter": "a"},
            {"lora_rank": None, "lora_variant": "lora"},
        ),
        ("reference: r\nadapter: a", {"lora_rank": "8"}, {"adapter": None}),
        ("reference: r\nadam_beta1: 0.8", {"optimizer": "rmsprop"}, {"adam_beta1": 0.9}),
        ("reference: r\nadam_beta1: 0.8", {"optimizer": "adamw-8bit"}, {"adam_beta1": 0.8}),
        ("reference: r\nloss: simpo\nbeta: 2\ngamma: 1", {"loss": "dpo"}, {"beta": None, "gamma": None}),
        ("reference: r\nloss: simpo\nbeta: 2\ngamma: 1", {"loss": "simpo"}, {"beta": 2, "gamma": 1}),
        ("reference: r\nloss: simpo\nbeta: 2", {"loss": "dpo", "beta": "0.3"}, {"beta": 0.3}),
        ("reference: r\nbeta: 0.3", {"loss": "ipo"}, {"beta": 0.3}),
        ("reference: r\nloss: dpo\nbeta: 0.01", {"loss": "1.0*dpo"}, {"beta": 0.01}),
        ("reference: r\nloss: dpo\nbeta: 0.01", {"loss": "DPO "}, {"beta": 0.01}),
        ("reference: r\nloss: dpo\nbeta: 0.01", {"loss": "dpo + 0.2*sft"}, {"beta": 0.01}),
        ("reference: r\nloss: dpo + sft\nbeta: 0.01", {"loss": "0.2*sft + dpo"}, {"beta": 0.01}),
        ("reference: r\nloss: dpo + sft\nbeta: 0.01", {"loss": "dpo"}, {"beta": 0.01}),
        ("reference: r\nloss: dpo\nbeta: 0.01", {"loss": "ipo + dpo"}, {"beta": None}),
        ("reference: r\nloss: dpo+simpo\nbeta: 2\ngamma: 1", {"loss": "dpo"}, {"beta": 2, "gamma": None}),
    ],
)
def test_a_flag_replaces_its_alternative(
    lines: str, flags: dict[str, str], gone: dict[str, object], tmp_path: Path
) -> None:
    options = load(tmp_path, lines, **flags)
    values = values_of(options)
    assert {name: values[name] for name in gone} == gone
    assert all(values[name] for name in flags)


@pytest.mark.parametrize(("one", "other"), [pair for choice in ALTERNATIVES for pair in combinations(choice, 2)])
def test_two_of_one_place_stay_an_error(one: tuple[str, object], other: tuple[str, object], tmp_path: Path) -> None:
    values = {
        name: ["1"] if name == "data" else "0.5" if name.endswith(("ratio", "fraction")) else "1"
        for name, _ in (one, other)
    }
    rest = {} if "reference" in values else {"reference": "r"}
    for lines, flags in (("seed: 1", values), ("\n".join(f"{name}: {value}" for name, value in values.items()), {})):
        with pytest.raises(UsageError, match=r"not both|give one of"):
            load(tmp_path, lines, **rest, **flags)


def test_a_number_that_the_loss_has_not_is_told_by_its_place(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"run\.yaml:2: gamma: dpo does not use it"):
        load(tmp_path, "reference: r\ngamma: 1", loss="dpo")
    with pytest.raises(UsageError, match=r"^--gamma: dpo does not use it"):
        load(tmp_path, "reference: r\nloss: simpo\ngamma: 1", loss="dpo", gamma="2")
    with pytest.raises(UsageError, match=r"run\.yaml:2: loss dppo: there is no loss dppo"):
        load(tmp_path, "reference: r\nloss: dppo")
