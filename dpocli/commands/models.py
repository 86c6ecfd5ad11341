"""The models that `evaluate` compares: where they lie, how they are judged, and what their training took."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpocli.config.commands import EvaluateOptions
from dpocli.config.loss_expression import LossChoice, named
from dpocli.config.options import ModelOptions
from dpocli.model.identity import ModelFiles
from dpocli.model.resolve import load_tokenizer, resolve_model
from dpocli.model.save import Provenance
from dpocli.objective.losses import States
from dpocli.run.files import STATE_NAME, read_json


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model that is not in memory yet."""

    options: ModelOptions
    files: ModelFiles
    provenance: Provenance
    tokenizer: PreTrainedTokenizerBase
    losses: dict[str, LossChoice]
    """By name."""
    training: dict[str, Any]
    """What its training took, as far as the files around it tell."""

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def states(self) -> dict[str, States]:
        """By name of the loss, what the training left behind of its terms that are the same as there: other numbers have
        another scale."""
        trained = {term.name: term for term in self.provenance.loss.terms} if self.provenance.loss else {}
        return {
            name: {
                term.name: self.provenance.loss_states[term.name]
                for term in loss.terms
                if term.name in self.provenance.loss_states and term.numbers == trained[term.name].numbers
            }
            for name, loss in self.losses.items()
        }


def candidates(options: EvaluateOptions) -> list[Candidate]:
    """The models of `--model`, in the order given.

    Without `--loss`, each is judged by the loss that it was trained with; one that dpocli did not train, by that of the
    first which it did, so that a base and what was trained from it can be compared.

    Raises:
        UsageError: one is no model, or a loss cannot be had.
    """
    located = [(each, resolve_model(each, checkpoints=True)) for each in map(options.of_model, options.models)]
    provenances = [Provenance.of(files.checkpoint or files.adapter or files.directory) for _, files in located]
    judged_by = next((provenance.loss for provenance in provenances if provenance.loss), None)
    return [
        Candidate(
            options=each,
            files=replace(files, quantization=files.quantization or provenance.quantization),
            provenance=provenance,
            tokenizer=load_tokenizer(files, each),
            losses=named(options.loss.loss_choices(provenance.loss or judged_by)),
            training=training_of(files.checkpoint or Path(each.name).expanduser()),
        )
        for (each, files), provenance in zip(located, provenances, strict=True)
    ]


def training_of(directory: Path) -> dict[str, Any]:
    """What a training took that left a model in its own directory, or a checkpoint there; empty where nothing tells it.

    Returns:
        `seconds` of its steps over all starts, without evaluations and checkpoints; and of a finished run `pairs`, `tokens`,
        `processes` and `device`.
    """
    if isinstance(state := read_json(directory / STATE_NAME), Mapping):
        account = state.get("account")
        seconds = account.get("seconds") if isinstance(account, Mapping) else None
        return {"seconds": seconds["training"]} if isinstance(seconds, Mapping) and "training" in seconds else {}
    summary = read_json(directory.parent / "summary.json")
    if not isinstance(summary, Mapping) or Path(str(summary.get("model"))).name != directory.name:
        return {}
    parts = {
        name: part if isinstance(part := summary.get(name), Mapping) else {} for name in ("seconds", "environment")
    }
    found = {
        "seconds": parts["seconds"].get("training"),
        "pairs": summary.get("pairs_processed"),
        "tokens": summary.get("tokens_processed"),
        "processes": parts["environment"].get("processes"),
        "device": parts["environment"].get("device"),
    }
    return {name: value for name, value in found.items() if value is not None}
