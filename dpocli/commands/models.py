"""The models that `evaluate` compares: their files, their losses, and what their training took."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dpocli.config.commands import EvaluateOptions
from dpocli.config.loss_expression import LossChoice, named
from dpocli.config.options import ModelOptions
from dpocli.model.hashing import HashMemory, digest_json, meaningful_config, sha256_of_file
from dpocli.model.identity import ModelFiles
from dpocli.model.resolve import load_tokenizer, resolve_model
from dpocli.model.save import Provenance
from dpocli.objective.losses import States
from dpocli.run.files import STATE_NAME, read_json


@dataclass(frozen=True, slots=True)
class EvaluatedModel:
    """One model of `--model`, before its weights are loaded."""

    options: ModelOptions
    files: ModelFiles
    provenance: Provenance
    tokenizer: PreTrainedTokenizerBase
    losses: dict[str, LossChoice]
    """The losses that judge it, by name."""
    training: dict[str, Any]
    """What its training took, as far as the files around it record that."""

    @property
    def name(self) -> str:
        return self.options.name

    @property
    def states(self) -> dict[str, States]:
        """By name of the loss, the states that training left for terms with the same numbers; other numbers have another
        scale."""
        trained = {term.name: term for term in self.provenance.loss.terms} if self.provenance.loss else {}
        return {
            name: {
                term.name: self.provenance.loss_states[term.name]
                for term in loss.terms
                if term.name in self.provenance.loss_states and term.numbers == trained[term.name].numbers
            }
            for name, loss in self.losses.items()
        }

    def digests(self, memory: HashMemory) -> dict[str, str]:
        """Name the content of the model: its weights, its configuration, and its `dpocli.json`."""
        files, checkpoint = replace(self.files, checkpoint=None), self.files.checkpoint
        if checkpoint is None or self.files.adapter_settings:  # an adapter computes with the weights of its base
            identity = files.identity(memory)
            weights, configuration = identity.weights_digest, identity.settings_digest(files)
        else:
            weights, configuration = "", digest_json([meaningful_config(files.directory), files.runs_code])
        if checkpoint:  # its state has times in it and is written once, so the tensors need not be read
            sizes = {path.name: path.stat().st_size for path in sorted(checkpoint.glob("*.safetensors"))}
            weights = digest_json([weights, sha256_of_file(checkpoint / STATE_NAME), sizes])
        provenance = digest_json(self.provenance.model_dump(mode="json"))
        return {"weights": weights, "configuration": configuration, "dpocli.json": provenance}


def resolve_models(options: EvaluateOptions) -> list[EvaluatedModel]:
    """Find the models of `--model`, in the order given.

    Without `--loss`, each is judged by the loss that it was trained with. A model that dpocli did not train is judged by the
    loss of the first that it did train, so that a base and the models trained from it can be compared.

    Raises:
        UsageError: a model cannot be found, or a loss cannot be computed.
    """
    resolved = [(each, resolve_model(each, checkpoints=True)) for each in map(options.of_model, options.models)]
    provenances = [Provenance.of(files.checkpoint or files.adapter or files.directory) for _, files in resolved]
    default = next((provenance.loss for provenance in provenances if provenance.loss), None)
    return [
        EvaluatedModel(
            options=each,
            files=replace(files, quantization=files.quantization or provenance.quantization),
            provenance=provenance,
            tokenizer=load_tokenizer(files, each),
            losses=named(options.loss.loss_choices(provenance.loss or default)),
            training=training_of(files.checkpoint or Path(each.name).expanduser()),
        )
        for (each, files), provenance in zip(resolved, provenances, strict=True)
    ]


def training_of(directory: Path) -> dict[str, Any]:
    """Read what the training of a model or checkpoint took; empty where no file records it.

    Returns:
        `seconds` of its steps over all starts, without evaluations and checkpoints; and of a finished run `pairs`, `tokens`,
        `processes` and `device`.
    """
    if isinstance(state := read_json(directory / STATE_NAME), Mapping):
        seconds = _mapping(_mapping(state.get("account")).get("seconds"))
        return {"seconds": seconds["training"]} if "training" in seconds else {}
    summary = _mapping(read_json(directory.parent / "summary.json"))
    if Path(str(summary.get("model"))).name != directory.name:
        return {}
    environment = _mapping(summary.get("environment"))
    found = {
        "seconds": _mapping(summary.get("seconds")).get("training"),
        "pairs": summary.get("pairs_processed"),
        "tokens": summary.get("tokens_processed"),
        "processes": environment.get("processes"),
        "device": environment.get("device"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _mapping(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
