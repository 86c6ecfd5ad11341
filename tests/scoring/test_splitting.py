"""Memory that runs out in the middle: the pass is made in two, the values are the same, and it is told."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dpocli.cli import run_command_line
from dpocli.console.console import Console
from dpocli.console.progress import Progress
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes
from dpocli.errors import ExitCode, PreemptedError
from dpocli.scoring import frozen
from dpocli.scoring.passes import reference_logps
from dpocli.scoring.scorer import PairScorer
from dpocli.scoring.throughput import Throughput
from tests.commands.conftest import MODEL, TRAIN
from tests.support.caches import assert_same_values, pairs_in
from tests.support.pairs import random_pairs
from tests.support.tiny_models import build

BUDGET = 400
ENOUGH = 130
"""Tokens, padding included, for which the memory is enough: more than a pair takes in any layout."""

GPU = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
CPU = RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory")
HOST = MemoryError()
ALONE = Processes(0, 1, torch.device("cpu"))


def short_of_memory(model: nn.Module, limit: int, error: BaseException, sizes: list[int] | None = None) -> list[int]:
    """Lets every pass of more than `limit` tokens fail; gives the sizes of all passes."""
    sizes = [] if sizes is None else sizes

    def look(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        sizes.append(options["input_ids"].numel())
        if sizes[-1] > limit:
            raise error.with_traceback(None)

    model.get_decoder().register_forward_pre_hook(look, with_kwargs=True)
    return sizes


@pytest.fixture
def pairs() -> list[EncodedPair]:
    return random_pairs(40, masked=True)


def new_scorer(layout: Layout, model: str = "llama-untied") -> PairScorer:
    scorer = PairScorer(build(model), token_budget=BUDGET)
    scorer.lay_out(layout)
    return scorer


def scored(
    scorer: PairScorer, pairs: list[EncodedPair], check_stop: Callable[[], None] = lambda: None
) -> tuple[list[EncodedPair], Progress]:
    with Console(rank=1).progress(len(pairs), "score") as progress:
        return reference_logps(scorer, pairs, progress, check_stop, ALONE), progress


@pytest.mark.parametrize("error", [GPU, CPU, HOST], ids=["on a GPU", "on a CPU", "of the host"])
@pytest.mark.parametrize("layout", list(Layout))
def test_the_values_are_the_same(layout: Layout, error: BaseException, pairs: list[EncodedPair]) -> None:
    undisturbed = new_scorer(layout)
    expected, _ = scored(undisturbed, pairs)
    assert undisturbed.tally.splits == 0
    scorer = new_scorer(layout)
    sizes = short_of_memory(scorer.model, ENOUGH, error)
    found, progress = scored(scorer, pairs)
    assert_same_values(found, expected)
    assert [replace(pair, reference=None) for pair in found] == pairs
    failed = [size for size in sizes if size > ENOUGH]
    assert scorer.tally.splits == len(failed) > 1
    assert len(sizes) > len(failed)
    assert progress.pairs == 40, "each pair counts once"
    assert progress.tokens == sum(len(ids) for pair in pairs for ids in pair.all_ids)


def test_a_pass_is_split_as_often_as_it_takes(pairs: list[EncodedPair]) -> None:
    scorer = PairScorer(build("llama-untied"), token_budget=100_000)
    scorer.lay_out(Layout.SHARED)
    sizes = short_of_memory(scorer.model, max(sum(map(len, pair.all_ids)) for pair in pairs), GPU)
    found, _ = scored(scorer, pairs)
    assert_same_values(found, scored(new_scorer(Layout.SHARED), pairs)[0])
    assert scorer.tally.splits > 6
    assert sizes[0] == sum(len(ids) for pair in pairs for ids in pair.all_ids)


@pytest.mark.parametrize("error", [GPU, CPU, HOST], ids=["on a GPU", "on a CPU", "of the host"])
def test_a_pair_that_does_not_fit_alone_is_an_error(error: BaseException, pairs: list[EncodedPair]) -> None:
    scorer = new_scorer(Layout.SHARED)
    sizes = short_of_memory(scorer.model, 3, error)
    with pytest.raises(type(error)) as raised:
        scored(scorer, pairs)
    assert raised.value is error
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] <= 3 * 12, "a single pair"


@pytest.mark.parametrize(
    "error",
    [RuntimeError("CUDA error: an illegal memory access was encountered"), ValueError("shape"), KeyboardInterrupt()],
)
def test_an_error_of_another_kind_is_raised_at_once(error: BaseException, pairs: list[EncodedPair]) -> None:
    scorer = new_scorer(Layout.PADDED)
    sizes = short_of_memory(scorer.model, ENOUGH, error)
    with pytest.raises(type(error)) as raised:
        scored(scorer, pairs)
    assert raised.value is error
    assert len(sizes) == 1
    assert scorer.tally.splits == 0


def test_a_stop_is_asked_for_before_every_half(pairs: list[EncodedPair]) -> None:
    scorer = new_scorer(Layout.SHARED)
    sizes = short_of_memory(scorer.model, ENOUGH, GPU)
    asked = []
    scored(scorer, pairs, lambda: asked.append(len(sizes)))
    assert asked == list(range(len(sizes)))

    def stop() -> None:
        if len(sizes) == asked[-1]:
            raise PreemptedError("told")

    sizes.clear()
    asked = [3]
    with pytest.raises(PreemptedError):
        scored(scorer, pairs, stop)
    assert len(sizes) == 3


def figures(pairs: list[EncodedPair], limit: int) -> dict[str, Any]:
    scorer = new_scorer(Layout.SHARED)
    throughput = Throughput(scorer)
    short_of_memory(scorer.model, limit, GPU)
    with throughput.clock():
        scored(scorer, pairs)
    return throughput.summary()


def test_the_summary_counts_the_passes_that_were_split(pairs: list[EncodedPair]) -> None:
    assert figures(pairs, BUDGET)["passes_split"] == 0
    assert figures(pairs, ENOUGH)["passes_split"] > 1


def test_tokens_of_a_pass_that_did_not_fit_are_not_counted(pairs: list[EncodedPair]) -> None:
    assert figures(pairs, ENOUGH)["tokens_unique"] == figures(pairs, BUDGET)["tokens_unique"]


def precompute(out: Path, *more: object) -> int:
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 24, "--out", out, *more)
    return run_command_line([str(word) for word in line])


@pytest.fixture
def loaded_short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Lets every model that is loaded from now on lack memory; gives the sizes of all passes."""

    def lack(limit: int) -> list[int]:
        sizes: list[int] = []
        plain = frozen.load_model

        def load(*arguments: Any) -> Any:
            model = plain(*arguments)
            short_of_memory(model, limit, GPU, sizes)
            return model

        monkeypatch.setattr(frozen, "load_model", load)
        return sizes

    return lack


@pytest.mark.parametrize("scoring", ["auto", "padded"])
def test_precompute_and_verify_go_on_where_memory_runs_out(
    scoring: str,
    tmp_path: Path,
    loaded_short_of_memory: Callable[[int], list[int]],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """In the trial before the first pass too."""
    line = ("--token-budget", 4000, "--scoring", scoring)
    assert precompute(tmp_path / "undisturbed", *line) == 0
    sizes = loaded_short_of_memory(400)
    assert precompute(tmp_path / "short", *line) == 0
    assert_same_values(pairs_in(tmp_path / "short"), pairs_in(tmp_path / "undisturbed"))
    splits = [
        json.loads((tmp_path / name / "summary.json").read_text())["scoring"]["passes_split"]
        for name in ("undisturbed", "short")
    ]
    assert splits[0] == 0 < splits[1]
    said = capsys.readouterr().err
    assert f"Memory ran out in {splits[1]} passes, made in two instead" in said
    assert said.count("Memory ran out") == 1, "the undisturbed run does not say it"
    sizes.clear()
    assert precompute(tmp_path / "short", *line, "--verify", 24) == 0
    assert "over 24 pairs" in capsys.readouterr().out
    assert max(sizes) > 400


def test_a_pair_too_large_ends_precompute_with_its_own_code(
    tmp_path: Path, loaded_short_of_memory: Callable[[int], list[int]], capsys: pytest.CaptureFixture[str]
) -> None:
    loaded_short_of_memory(20)
    assert precompute(tmp_path / "out") == ExitCode.RESOURCES
    err = capsys.readouterr().err
    assert "Out of memory: CUDA out of memory." in err
    assert "Traceback" not in err
    assert not list((tmp_path / "out").glob("rows-*"))
