"""What the tests of commands leave out of every command: it decides no result, and other tests look at it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch

from dpocli.commands import evaluate, example_pairs, reference, train_setup
from dpocli.scoring import throughput
from dpocli.scoring.layout import Layout
from dpocli.scoring.layout_check import choose_layout, window_of
from dpocli.scoring.scorer import PairScorer
from dpocli.training import monitor, step0

FEWER = {"train": ("--save-every", "1000"), "evaluate": ("--show-pairs", "0")}
"""Without them a short run saves a checkpoint after every step, and an evaluation scores its 20 extreme pairs again."""
STEP0_PAIRS = 4

_layouts: dict[object, tuple[Layout, bool]] = {}
_rates: dict[torch.dtype, float] = {}
_measure_rate = throughput.matmul_rate


def shortened(arguments: Sequence[object]) -> list[str]:
    """A command line that saves and shows little, where it does not itself say how much."""
    words = [str(argument) for argument in arguments]
    fewer = FEWER.get(words[0] if words else "", ())
    return [words[0], *fewer, *words[1:]] if fewer and fewer[0] not in words else words


@contextmanager
def shortcuts() -> Iterator[None]:
    """Nothing is drawn, and what is found of a model (its layout, the rate of products) is found once in a process."""
    with (
        mock.patch.object(monitor, "draw_curves"),
        mock.patch.object(example_pairs, "write_html_report"),
        mock.patch.object(throughput, "matmul_rate", _rate),
        mock.patch.object(step0, "NUM_DRAWN", STEP0_PAIRS),
        mock.patch.object(train_setup, "choose_layout", _choose_layout),
        mock.patch.object(evaluate, "choose_layout", _choose_layout),
        mock.patch.object(reference, "choose_layout", _choose_layout),
    ):
        yield


def forget_layouts() -> None:
    """So that the next command compares layouts as it does for a user."""
    _layouts.clear()


def _choose_layout(
    scorer: PairScorer, pairs: Any, asked: str, processes: Any, log: Any, *more: Any, **named: Any
) -> None:
    """Compare layouts on a model of a kind that was not met before, or of which there was something to say."""
    model = scorer.model
    shapes = tuple((name, weight.shape, weight.dtype) for name, weight in model.named_parameters())
    kind = (model.config.to_json_string(), shapes, scorer.compute_dtype, asked, bool(more), *named.values())
    if kind in _layouts:
        layout, flex = _layouts[kind]
        scorer.lay_out(layout, flex=flex)
        return
    logged: list[str] = []
    choose_layout(scorer, pairs, asked, processes, logged.append, *more, **named)
    for line in logged:
        log(line)
    if not logged and not window_of(scorer):
        _layouts[kind] = scorer.packing.layout, scorer.uses_flex


def _rate(scorer: PairScorer) -> float:
    if scorer.compute_dtype not in _rates:
        _rates[scorer.compute_dtype] = _measure_rate(scorer)
    return _rates[scorer.compute_dtype]
