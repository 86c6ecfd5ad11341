"""The policy under training computes what a plain load computes, and its gradients are those of one process."""

import copy
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.data.batch import PairBatch
from dpocli.distributed.processes import Processes, init_processes
from dpocli.model.save import Provenance, save_model
from dpocli.scoring.scorer import PairScorer
from dpocli.training.policy import Policy, decoder_layers
from tests.support.pairs import random_pairs
from tests.support.tiny_models import FAMILIES, build


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    with init_processes(torch.device("cpu"), even_alone=True) as processes:
        yield processes


def options(**given: object) -> TrainOptions:
    return build_options(TrainOptions, **{"model": "m", "out": "o", "reference": "r"} | given)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_and_gradients_equal_a_plain_load(
    family: str, dtype: torch.dtype, checkpointing: bool, alone: Processes
) -> None:
    """Bit for bit: in bfloat16 too, where autocast is 0.03 nats per token away."""
    model, batch = build(family), PairBatch.of(random_pairs(3))
    plain = copy.deepcopy(model)
    for parameter in plain.parameters():  # a plain load: parameters in the dtype, buffers left alone
        parameter.data = parameter.data.to(dtype)
    expected = PairScorer(plain)(batch)
    expected.chosen.sum().backward()
    policy = Policy(PairScorer(model), options(gradient_checkpointing=checkpointing), dtype, alone)
    found = policy.scorer(batch)
    found.chosen.sum().backward()
    assert torch.equal(found.chosen, expected.chosen)
    assert torch.equal(found.rejected, expected.rejected)
    gradients = {name: parameter.grad for name, parameter in plain.named_parameters()}
    for name, parameter in policy.master_weights:
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad.full_tensor(), gradients[name].float()), name


def test_every_layer_is_a_unit_of_its_own() -> None:
    for family in FAMILIES:
        assert len(decoder_layers(build(family))) == 2, family


def test_dropout_is_off_unless_it_is_asked_for(alone: Processes) -> None:
    batch = PairBatch.of(random_pairs(3))
    for keep, same in ((False, True), (True, False)):
        policy = Policy(PairScorer(build("gpt2")), options(model_dropout=keep), torch.float32, alone)
        first, second = policy.scorer(batch), policy.scorer(batch)
        assert torch.equal(first.chosen, second.chosen) is same


def test_weights_come_back_whole_under_the_models_own_names(alone: Processes) -> None:
    model = build("llama-tied")
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    policy = Policy(PairScorer(model), options(), torch.bfloat16, alone)
    with torch.no_grad():  # which leaves the module showing its bfloat16 copies
        policy.scorer(PairBatch.of(random_pairs(2)))
    after = policy.weights()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert policy.num_parameters() == sum(weight.numel() for weight in before.values())


def test_buffers_that_belong_to_the_model_are_saved_with_it(
    alone: Processes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A router's bias is no parameter, and a model without it is another model."""
    monkeypatch.setattr("dpocli.model.save.check_saved", lambda *_, **__: None)  # Llama has no such buffer
    model = build("llama-tied")
    model.model.layers[0].register_buffer("bias_of_router", torch.tensor([1.5, 2.5], dtype=torch.float32))
    policy = Policy(PairScorer(model), options(), torch.float32, alone)
    tokenizer = SimpleNamespace(save_pretrained=lambda _: None)
    save_model(
        tmp_path / "model", model, policy.source_config, policy.weights(), policy.buffers, tokenizer, torch.bfloat16,
        Provenance(),
    )  # fmt: skip
    saved = load_file(tmp_path / "model" / "model.safetensors")
    assert saved["model.layers.0.bias_of_router"].tolist() == [1.5, 2.5]
    assert saved["model.layers.0.bias_of_router"].dtype == torch.float32
    assert saved["model.embed_tokens.weight"].dtype == torch.bfloat16
    assert not [path for path in tmp_path.iterdir() if path.name != "model"]


def test_the_saved_configuration_is_that_of_the_source(alone: Processes) -> None:
    model = build("gpt2")
    assert model.config.resid_pdrop > 0
    policy = Policy(PairScorer(model), options(), torch.float32, alone)
    assert model.config.resid_pdrop == 0
    assert policy.source_config.resid_pdrop > 0


def test_measuring_is_without_dropout_even_where_training_keeps_it(alone: Processes) -> None:
    batch = PairBatch.of(random_pairs(3))
    policy = Policy(PairScorer(build("gpt2")), options(model_dropout=True), torch.float32, alone)
    with policy.eval_mode():
        assert torch.equal(policy.scorer(batch).chosen, policy.scorer(batch).chosen)
    assert not torch.equal(policy.scorer(batch).chosen, policy.scorer(batch).chosen)
