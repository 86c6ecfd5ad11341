"""Scorers of frozen models: on one process, or sharded over several with torch's `fully_shard`.

The scorer is the root module and the decoder layers are its only units. The head's weight thus belongs to the root, in whose
forward it is a plain tensor. (With a unit of its own, the head would get silently wrong gradients.)
"""

from dataclasses import replace
from functools import cache, partial
from pathlib import Path

import torch

from dpocli.checkpoint.state import State
from dpocli.checkpoint.storage import another_checkpoint_wanted, load_weights
from dpocli.config.options import ModelOptions
from dpocli.distributed.fsdp import decoder_layers, shard
from dpocli.distributed.processes import Processes
from dpocli.errors import UsageError
from dpocli.model.hashing import HASH_MEMORY_NAME, HashMemory, code_hashes
from dpocli.model.identity import ModelFiles
from dpocli.model.load import load_model
from dpocli.model.save import Provenance
from dpocli.model.sharded import fill, load_spread
from dpocli.scoring.scorer import PairScorer


def frozen_scorer(
    files: ModelFiles,
    options: ModelOptions,
    dtype: torch.dtype,
    team: Processes,
    budget: int,
    *,
    collision: bool = False,
) -> PairScorer:
    """Load a model and wrap it in a scorer, sharded over the processes of a team.

    Args:
        files: the model, adapter or checkpoint.
        options: how to load it.
        dtype: of weights and forward pass.
        team: all its processes must make the same number of passes.
        budget: tokens per forward pass.
        collision: see `PairScorer`.

    Raises:
        UsageError: the model cannot be loaded, or not sharded.
    """
    if files.checkpoint:
        team.first_does(partial(check_base, files))
    is_spread = team.count > 1
    model = (load_spread if is_spread else load_model)(files, options, dtype, team.device)
    scorer = PairScorer(model, collision=collision, token_budget=budget, device=team.device)
    if is_spread:
        assert team.team_mesh
        scorer.requires_grad_(False)
        shard(scorer, decoder_layers(model), team.team_mesh, dtype=dtype)
        if scorer.is_blank:
            fill(scorer, model, files, team.device)
    if files.checkpoint:
        load_weights(files.checkpoint, scorer.model)
    return scorer


def check_base(files: ModelFiles) -> None:
    """Check that an adapter's checkpoint is evaluated on the base model that it was trained on.

    A checkpoint of all weights needs no base. Hashes recorded by the run are reused while the files are unchanged.

    Raises:
        UsageError: the base model's weights or configuration differ.
    """
    path = files.checkpoint
    if path is None or files.adapter_settings is None:
        return
    with another_checkpoint_wanted():
        state = State.read(path)
    if state.model_weights is None:  # written by an earlier version
        return
    quantization = Provenance.of(path).quantization
    memory = _hashes_of_the_run(path.resolve().parent.parent / HASH_MEMORY_NAME)
    base = ModelFiles(files.directory, files.adapter, quantization, files.runs_code)
    identity = base.identity(memory)
    differing = ["weights"] if state.model_weights != identity.weights_digest else []
    # The training's --trust-remote-code decided whether the model's code is part of its identity.
    settings = {replace(identity, code=code).settings_digest(base) for code in ({}, code_hashes(base.directory))}
    if state.model_settings is not None and state.model_settings not in settings:
        differing.append("configuration")
    if differing:
        on = f" with the adapter {files.adapter} on it" if files.adapter else ""
        raise UsageError(
            f"--model {path}: this checkpoint is an adapter that was trained on {files.directory}{on}, whose "
            f"{' and '.join(differing)} have changed since. Put that model back as it was, or give another checkpoint."
        )


@cache
def _hashes_of_the_run(path: Path) -> HashMemory:
    """Hashes recorded by a run, read once for all its checkpoints."""
    return HashMemory(path)
