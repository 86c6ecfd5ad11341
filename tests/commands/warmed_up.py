"""Imported by the process from which `warm_workers` are forked: it has done once what each of them does."""

import contextlib
import gc
import os
import tempfile

import torch

import tests.commands.warm_workers  # noqa: F401
from dpocli.cli import run_command_line
from tests.commands.conftest import MODEL, TRAIN
from tests.commands.shortcuts import shortcuts, shortened

os.environ["TOKENIZERS_PARALLELISM"] = "false"  # what was parallel before a fork is a deadlock after it
torch.set_num_threads(1)
for_all = shortcuts()  # a name, since they end with the object
for_all.__enter__()
with (
    tempfile.TemporaryDirectory() as directory,
    open(os.devnull, "w") as nowhere,
    contextlib.redirect_stdout(nowhere),
    contextlib.redirect_stderr(nowhere),
):
    reference = f"{directory}/ref"
    for line in (
        ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 4, "--rows-per-part", 2, "--out", reference),
        ("train", "--model", MODEL, "--reference", reference, "--max-steps", 1, "--out", f"{directory}/run"),
        ("evaluate", "--model", MODEL, "--reference", reference, "--out", f"{directory}/report"),
    ):
        run_command_line(shortened(line))
gc.freeze()  # so that no fork goes through the objects of the libraries, and copies their pages
