"""A scorer spread over processes with torch's `fully_shard`, and its weights read piece by piece where they are needed.

The scoring module is the root and the decoder layers are its only units: the head's weight is then read inside the root's
forward, where it is a plain tensor. (The head in a group of its own gives silently wrong gradients.)
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
    """A scorer of a model that is not trained, spread over the processes of a team, which keep step: all of them make the
    same number of passes.

    Raises:
        UsageError: the model cannot be loaded, or not spread.
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
    """Raises UsageError where an adapter's checkpoint is looked at on another model than it was trained on.

    Only an adapter: a checkpoint of all weights takes none from the model. Files whose hashes the run noted are not
    read again while they are as they were.
    """
    path = files.checkpoint
    if path is None or files.adapter_settings is None:
        return
    with another_checkpoint_wanted():
        state = State.read(path)
    if state.model_weights is None:  # of an earlier version
        return
    quantization = Provenance.of(path).quantization
    memory = _hashes_of_the_run(path.resolve().parent.parent / HASH_MEMORY_NAME)
    base = ModelFiles(files.directory, files.adapter, quantization, files.runs_code)
    identity = base.identity(memory)
    differing = ["weights"] if state.model_weights != identity.weights_digest else []
    # Whether the code beside the model counts was decided by --trust-remote-code of the training.
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
    """What a run noted; several of its checkpoints may be looked at."""
    return HashMemory(path)
