"""The three commands on the sample data, in this process; and the same in a process that can be killed."""

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from dpocli.cli import run_command_line
from dpocli.commands import example_pairs
from dpocli.report.html import write_html_report
from dpocli.report.training_curves import draw_curves
from dpocli.training import monitor
from tests.commands.shortcuts import shortcuts, shortened

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "sample_data"
MODEL = SAMPLE / "tiny-model"
TRAIN, HELD_OUT, TEXT = SAMPLE / "train.jsonl", SAMPLE / "heldout.jsonl", SAMPLE / "text.jsonl"


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    """Bit identity is claimed for one machine and thread count; and the tests run two at a time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True, scope="package")
def _shortcuts() -> Iterator[None]:
    """And `evaluate`, which collects garbage, does not go through half a million objects of the libraries each time."""
    gc.collect()
    gc.freeze()
    with shortcuts():
        yield
    gc.unfreeze()


@contextmanager
def pictures() -> Iterator[None]:
    """They are drawn here all the same."""
    with (
        mock.patch.object(monitor, "draw_curves", draw_curves),
        mock.patch.object(example_pairs, "write_html_report", write_html_report),
    ):
        yield


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        value: dict[str, Any] = json.loads(self.out)
        return value


Run = Callable[..., Result]


@pytest.fixture
def dpocli(capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs a command line in this process: `dpocli("train", "--out", path, …)`."""

    def run(*arguments: object, shorten: bool = True) -> Result:
        capfd.readouterr()
        code = run_command_line(shortened(arguments) if shorten else [str(argument) for argument in arguments])
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


def quiet(*arguments: object) -> None:
    """The same for session fixtures, which have no capture of their own."""
    assert run_command_line(shortened(arguments)) == 0


def start(*arguments: object, launcher: tuple[str, ...] = (), **environment: str) -> "subprocess.Popen[str]":
    """A command in a process of its own."""
    prefix = [sys.executable, "-m", *(launcher or ("dpocli",))]
    return subprocess.Popen(
        [*prefix, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        cwd=ROOT,
    )


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference cache of 40 training pairs."""
    out = tmp_path_factory.mktemp("cache") / "ref"
    quiet("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 40, "--out", out, "--rows-per-part", 16)
    return out


@pytest.fixture(scope="session")
def held_out_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference cache of 24 held-out pairs."""
    out = tmp_path_factory.mktemp("cache") / "ref-heldout"
    quiet("precompute", "--model", MODEL, "--data", HELD_OUT, "--limit", 24, "--out", out)
    return out


def tensors_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint of one process, or of replicas."""
    return {name: value for path in sorted(checkpoint.glob("*.safetensors")) for name, value in load_file(path).items()}


def moments_of(checkpoint: Path) -> dict[str, torch.Tensor]:
    """What the optimizer remembers in it."""
    return {name: value for name, value in tensors_of(checkpoint).items() if name.startswith("optimizer/")}


def metrics_of(run: Path) -> list[dict[str, float]]:
    """The rows of `metrics.jsonl`."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
