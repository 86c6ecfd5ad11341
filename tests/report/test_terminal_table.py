"""The tables on the terminal: what comes from data does no harm there, and different things look different."""

import io
import re

import pytest

from dpocli.config.loss_expression import LossChoice
from dpocli.console.console import Printer
from dpocli.report.terminal_table import render
from tests.support.reports import made_up_report

HOSTILE = [
    "\x1b]0;title\x07\x1b[31mred",
    "nul \x00",
    "turned \u202egnp.exe",
    "two\nlines\r\nor\x0bthree",
    "half \ud83d",
]


def rendered(**more):
    stream = io.StringIO()
    render(Printer(stream), made_up_report(**more))
    return stream.getvalue()


@pytest.mark.parametrize("hostile", HOSTILE)
def test_labels_of_the_data_are_harmless_and_break_no_row(hostile):
    usual = made_up_report()
    report = {"model": hostile, "slices": {hostile: [entry | {"name": hostile} for entry in usual["slices"]["source"]]}}
    report["models"] = [model | {"name": hostile, "rewards/ties": 0.9} for model in usual["models"]]
    report["comparisons"] = [found | {"model": hostile, "why_no_margin": "why"} for found in usual["comparisons"]]
    shown = rendered(**report)
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\ud800-\udfff]", shown)
    names = [f"⟨U+{ord(character):04X}⟩" for character in hostile if not character.isprintable() and character != "\n"]
    assert all(name in shown for name in names)
    harmless = report | {"slices": {"x": report["slices"][hostile]}} | {"model": "x"}
    harmless["slices"] = {"x": [entry | {"name": "x"} for entry in harmless["slices"]["x"]]}
    harmless["models"] = [model | {"name": "x"} for model in report["models"]]
    harmless["comparisons"] = [found | {"model": "x"} for found in report["comparisons"]]
    assert shown.count("\n") == rendered(**harmless).count("\n")


def test_losses_that_differ_in_a_number_are_distinct_labels():
    losses = [LossChoice.of(text) for text in ("dpo(beta=0.1)", "dpo(beta=1)")]
    figures = made_up_report()["models"][0]
    shown = rendered(by_loss={str(loss): figures | {"loss_choice": loss.model_dump()} for loss in losses})
    assert "\ndpo(beta=0.1, label_smoothing=0) " in shown
    assert "\ndpo(beta=1, label_smoothing=0) " in shown


def test_long_names_keep_both_ends_and_stay_apart():
    usual = made_up_report()
    entry = usual["slices"]["source"][0]
    names = [f"{10**40 + place} to {10**41 + place}" for place in (1, 2)]
    middles = [
        "topics of all kinds: trees, and what else there is",
        "topics of all kinds: rocks, and what else there is",
    ]
    models = [model | {"name": f"runs/{'x' * 40}/checkpoints/step-{model['step']}"} for model in usual["models"]]
    slices = {"number": [entry | {"name": name} for name in (*names, *middles)]}
    shown = rendered(slices=slices, models=models)
    assert re.search(r"10000\d*…\d+1 ", shown)
    assert re.search(r"10000\d*…\d+2 ", shown)
    assert re.search(r"topics of all.*there is ", shown)
    assert re.search(r"topics of al.*there is \(2\)|topics of.* \(2\)", shown)
    assert all(re.search(rf"^runs/x*….*step-{step} ", shown, re.MULTILINE) for step in (100, 200, 300))


def test_a_wide_interval_is_uncertain_however_many_pairs_there_are():
    assert "too uncertain to tell" in rendered()
