"""Memory that runs out in training: the step is made again in smaller passes, ends in the same numbers, and is told once."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dpocli.training.gradients import Gradients, Step
from dpocli.training.trainer import Trainer
from tests.commands.conftest import MODEL, Run, metrics_of, start
from tests.commands.ranks import TORCHRUN

ERRORS = {
    "on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "on a CPU": RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory"
    ),
    "of the host": MemoryError(),
}
PLACES = ("before the first layer", "in the last layer", "in the backward pass")
BUDGET = 100_000
LIMIT = 400
"""Tokens of a pass for which the memory is enough: a batch takes more, a pair less."""

Fail = Callable[[int], None]


def fail_at(place: str, model: nn.Module, fail: Fail) -> None:
    """Calls `fail` with the tokens of every pass, at a place where it goes through the model."""
    tokens = 0

    def look(_: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal tokens
        tokens = options["input_ids"].numel()
        if place == PLACES[0]:
            fail(tokens)

    def in_forward(*_: object) -> None:
        fail(tokens)

    def in_backward(_: nn.Module, arguments: object, output: torch.Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda _: fail(tokens))

    decoder: Any = model.get_decoder()  # type: ignore[operator]
    decoder.register_forward_pre_hook(look, with_kwargs=True)
    if place == PLACES[1]:
        decoder.layers[-1].register_forward_pre_hook(in_forward)
    elif place == PLACES[2]:
        decoder.layers[0].register_forward_hook(in_backward)


@pytest.fixture
def short_of_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """From the first step on, lets every pass of more than so many tokens fail; gives the sizes of those that did."""

    def install(limit: int = LIMIT, place: str = PLACES[1], error: Exception = ERRORS["on a GPU"]) -> list[int]:
        failed: list[int] = []

        def fail(tokens: int) -> None:
            if tokens > limit:
                failed.append(tokens)
                raise error.with_traceback(None)

        step = Trainer.step

        def first_step(trainer: Trainer, number: int) -> Any:
            if not getattr(trainer, "_is_short", False):
                trainer._is_short = True  # type: ignore[attr-defined]
                fail_at(place, trainer.policy.scorer.model, fail)
            return step(trainer, number)

        monkeypatch.setattr(Trainer, "step", first_step)
        return failed

    return install


@pytest.fixture
def train(cache: Path, tmp_path: Path, dpocli: Run) -> Callable[..., Any]:
    def run(out: str, *more: object) -> Any:
        return dpocli(
            "train", "--model", MODEL, "--reference", cache, "--out", tmp_path / out, "--learning-rate", "5e-4",
            "--batch-size", 8, "--max-steps", 3, *more,
        )  # fmt: skip

    return run


def weights(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def told(err: str) -> int:
    """The budget that the run says it came to; it says so once."""
    (line,) = re.findall(r"Step 1: memory ran out with passes of 100,000 tokens, .* again with (\S+), ", err)
    return int(line.replace(",", ""))


@pytest.mark.parametrize(
    ("place", "settings"),
    [
        (PLACES[0], ("--loss", "dpo")),
        (PLACES[2], ("--loss", "aot")),
        *(
            pytest.param(place, ("--loss", loss), marks=pytest.mark.slow)
            for place in PLACES
            for loss in ("dpo", "aot")
            if (place, loss) not in ((PLACES[0], "dpo"), (PLACES[2], "aot"))
        ),
        # Where copies compute, and not the master weights.
        pytest.param(PLACES[2], ("--dtype", "bfloat16", "--step0-tolerance", 1), marks=pytest.mark.slow),
    ],
)
def test_the_step_is_made_again_as_if_the_budget_had_been_smaller_from_the_start(
    place: str, settings: tuple[object, ...], train: Callable[..., Any], short_of_memory: Callable[..., list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Bit for bit, so that nothing is left of the passes that were thrown away."""
    plain = Trainer.step
    assert train("whole", "--token-budget", BUDGET, *settings).code == 0
    failed = short_of_memory(place=place)
    result = train("short", "--token-budget", BUDGET, *settings)
    assert result.code == 0, result.err
    budget = told(result.err)
    assert budget <= LIMIT
    assert failed[0] > LIMIT
    monkeypatch.setattr(Trainer, "step", plain)
    assert train("small", "--token-budget", budget, *settings).code == 0
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "small")
    assert weights(tmp_path / "short") == weights(tmp_path / "small")
    rounding = 0.05 if "bfloat16" in settings else 1e-4
    for row, other in zip(metrics_of(tmp_path / "short"), metrics_of(tmp_path / "whole"), strict=True):
        np.testing.assert_allclose([row["loss"], row["grad_norm"]], [other["loss"], other["grad_norm"]], rtol=rounding)
    scoring = json.loads((tmp_path / "short" / "summary.json").read_text())["scoring"]
    assert scoring["passes_split"] == len(failed)


def test_passes_that_went_well_before_are_thrown_away_too(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    score = Gradients._score

    def in_the_second(gradients: Gradients, step: Step, index: int) -> Any:
        if index == 1 and gradients.policy.scorer.packing.token_budget == 500:
            raise ERRORS["on a GPU"].with_traceback(None)
        return score(gradients, step, index)

    with monkeypatch.context() as patch:
        patch.setattr(Gradients, "_score", in_the_second)
        result = train("short", "--token-budget", 500)
    assert result.code == 0, result.err
    (budget,) = re.findall(r"made again with (\d+)", result.err)
    assert train("small", "--token-budget", budget).code == 0
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "small")
    assert weights(tmp_path / "short") == weights(tmp_path / "small")


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_whatever_it_is_that_runs_out(
    error: Exception, train: Callable[..., Any], short_of_memory: Callable[..., list[int]]
) -> None:
    assert short_of_memory(error=error) == []
    result = train("short", "--gradient-checkpointing")  # without a budget: 1024 on a CPU, which a batch exceeds
    assert result.code == 0, result.err
    assert result.err.count("memory ran out with passes of 1,024 tokens") == 1


def test_the_smaller_budget_is_remembered(
    train: Callable[..., Any], short_of_memory: Callable[..., list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    failed = short_of_memory()
    assert train("undisturbed", "--token-budget", BUDGET, "--save-every", 1).code == 0
    step = Trainer.step

    def broken_off(trainer: Trainer, number: int) -> Any:
        if number == 3:
            raise KeyboardInterrupt
        return step(trainer, number)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", broken_off)
        assert train("broken", "--token-budget", BUDGET, "--save-every", 1).code == 130
    failed.clear()
    again = train("broken", "--token-budget", BUDGET, "--save-every", 1)
    assert (again.code, failed) == (0, []), again.err
    assert "memory ran out" not in again.err
    assert weights(tmp_path / "broken") == weights(tmp_path / "undisturbed")
    assert metrics_of(tmp_path / "broken") == metrics_of(tmp_path / "undisturbed")


def test_a_budget_that_is_given_anew_comes_before_the_remembered_one(
    train: Callable[..., Any], short_of_memory: Callable[..., list[int]], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    plain = Trainer.step
    short_of_memory()
    assert train("run", "--token-budget", BUDGET, "--save-every", 1).code == 0
    for path in ("model", "checkpoints/step-3"):
        (tmp_path / "run" / path).rename(tmp_path / path.replace("/", "-"))
    used = []

    def step(trainer: Trainer, number: int) -> Any:
        used.append(trainer.policy.scorer.packing.token_budget)
        return plain(trainer, number)

    monkeypatch.setattr(Trainer, "step", step)
    assert train("run", "--token-budget", 50_000, "--save-every", 1).code == 0
    assert used == [50_000]


def test_a_pair_that_does_not_fit_alone_ends_the_run(
    train: Callable[..., Any], short_of_memory: Callable[..., list[int]], tmp_path: Path
) -> None:
    failed = short_of_memory(limit=20)
    result = train("run", "--token-budget", BUDGET)
    assert result.code == 7
    assert re.search(r"Step 1: out of memory .* a single pair; the longest is that of source row \d+", result.err)
    assert "--gradient-checkpointing" in result.err
    assert failed == sorted(failed, reverse=True)
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 7)
    assert not list((tmp_path / "run").glob("checkpoints/step-*"))


def test_an_error_of_another_kind_is_raised_at_once(
    train: Callable[..., Any], short_of_memory: Callable[..., list[int]]
) -> None:
    failed = short_of_memory(error=RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert train("run", "--token-budget", BUDGET).code == 1
    assert len(failed) == 1


def on_two(cache: Path, out: Path, *more: object, limit: int, place: str = PLACES[1]) -> tuple[int, str]:
    """Code and words of a run on two processes, the second of which is short of memory."""
    process = start(
        "train", "--model", MODEL, "--reference", cache, "--out", out, "--batch-size", 20, "--learning-rate", "5e-4",
        "--max-steps", 2, *more, launcher=(*TORCHRUN[:-1], "tests.commands.short_of_memory_worker"), LIMIT=str(limit),
        PLACE=place,
    )  # fmt: skip
    _, err = process.communicate(timeout=240)
    return process.returncode, err


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dpo", "aot"])
def test_replicas_agree_to_make_the_step_again(loss: str, cache: Path, tmp_path: Path) -> None:
    code, err = on_two(cache, tmp_path / "short", "--token-budget", BUDGET, "--loss", loss, limit=LIMIT)
    assert code == 0, err
    budget = told(err)
    assert budget <= LIMIT
    assert on_two(cache, tmp_path / "small", "--token-budget", budget, "--loss", loss, limit=BUDGET)[0] == 0
    assert metrics_of(tmp_path / "short") == metrics_of(tmp_path / "small")
    assert weights(tmp_path / "short") == weights(tmp_path / "small")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("limit", "place", "words"),
    [
        (LIMIT, PLACES[2], "in the middle of an exchange with other processes, from which there is no way back"),
        (20, PLACES[1], "which holds a single pair; the longest is that of source row"),
    ],
    ids=["in the exchange", "a single pair"],
)
def test_one_of_two_processes_that_cannot_go_back_ends_both(
    limit: int, place: str, words: str, cache: Path, tmp_path: Path
) -> None:
    """And soon: who is left alone in an exchange does not wait for ever."""
    code, err = on_two(cache, tmp_path / "run", "--token-budget", BUDGET, limit=limit, place=place)
    assert code == 1, err  # torchrun's
    assert words in err
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 7), err
