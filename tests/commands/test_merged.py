"""A merged model computes what the base with its adapter does, whatever the adapter lies on; or there is none."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from dpocli.config.options import ModelOptions
from dpocli.config.training_options import LoraOptions
from dpocli.errors import NumericsError, UsageError
from dpocli.model import lora
from dpocli.model import merge as merging
from dpocli.model.identity import ModelFiles
from dpocli.model.lora import quietly
from dpocli.model.save import Provenance, merge
from tests.commands.conftest import MODEL

IDS = torch.arange(3, 43)[None]


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a head of its own, in bfloat16."""
    model = load(MODEL)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight + 0.1)
    model.config.tie_word_embeddings = False
    model.to(torch.bfloat16).save_pretrained(directory := tmp_path_factory.mktemp("untied"))
    return directory


def load(directory: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)


def logps(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits.log_softmax(-1)
    return found


def adapted(base: Path, directory: Path, **settings: Any) -> Tensor:
    """Writes an adapter that changes something; log-probs of the base with it, as peft computes them."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, task_type="CAUSAL_LM", init_lora_weights=False, **settings)
    with quietly():
        model = peft.get_peft_model(load(base), config)
        for name, weight in model.named_parameters():
            if "modules_to_save" in name:
                weight.data += 0.1
        model.save_pretrained(directory)
        return logps(peft.PeftModel.from_pretrained(load(base), directory))


def merged(base: Path, directory: Path) -> Path:
    out, options = directory.with_name("merged"), ModelOptions.model_validate({"model": str(base)})
    merge(out, ModelFiles(base), directory, options, AutoTokenizer.from_pretrained(MODEL), Provenance())
    return out


@pytest.mark.parametrize(
    ("settings", "stays_tied"),
    [
        ({"target_modules": ["q_proj"]}, True),
        ({"target_modules": ["embed_tokens", "q_proj"]}, False),
        ({"target_modules": ["lm_head"]}, False),
        ({"target_modules": ["lm_head", "embed_tokens"]}, False),
        ({"target_modules": ["lm_head", "embed_tokens"], "use_dora": True}, False),
        ({"target_modules": ["lm_head", "embed_tokens"], "ensure_weight_tying": True}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, False),
    ],
)
def test_of_a_model_that_ties(settings: dict[str, Any], stays_tied: bool, tmp_path: Path) -> None:
    theirs = adapted(MODEL, tmp_path / "adapter", **settings)
    assert (theirs - logps(load(MODEL))).abs().max() > 1e-2
    out = merged(MODEL, tmp_path / "adapter")
    model = load(out)
    assert torch.allclose(logps(model), theirs, atol=1e-3)
    assert model.config.tie_word_embeddings == stays_tied
    with safe_open(out / "model.safetensors", "pt") as file:
        assert ("lm_head.weight" in file.keys()) != stays_tied  # noqa: SIM118


def test_of_a_model_that_does_not(untied: Path, tmp_path: Path) -> None:
    theirs = adapted(untied, tmp_path / "adapter", target_modules=["lm_head", "embed_tokens", "q_proj"])
    model = load(out := merged(untied, tmp_path / "adapter"))
    assert torch.allclose(logps(model), theirs, atol=0.1), "rounded to bfloat16"
    with safe_open(out / "model.safetensors", "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.bfloat16}  # noqa: SIM118


def test_one_that_computes_something_else_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(MODEL, tmp_path / "adapter", target_modules=["lm_head"])
    monkeypatch.setattr(merging, "shared_under_adapters", lambda _: iter(()))
    with pytest.raises(NumericsError, match=r"log-probs of the merged model .* No merged model was left"):
        merged(MODEL, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_one_that_loads_with_other_weights_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(MODEL, tmp_path / "adapter", target_modules=["q_proj"])
    save = PreTrainedModel.save_pretrained

    def spoilt(model: Any, directory: Path, *, state_dict: dict[str, Tensor]) -> None:
        save(model, directory, state_dict=state_dict | {"model.norm.weight": torch.zeros(128)})

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", spoilt)
    with pytest.raises(NumericsError, match=r"1 tensors of the saved model have other values .*model\.norm\.weight"):
        merged(MODEL, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_architecture_that_always_ties_is_refused_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"lora_rank": 2, "merge": True}
    on_head = LoraOptions.model_validate(given | {"lora_targets": ["lm_head"]})
    lora.new(load(MODEL), on_head, 0)
    monkeypatch.setattr(lora, "say_untied", lambda _: None)
    with pytest.raises(UsageError, match="--merge: lm_head names an embedding"):
        lora.new(load(MODEL), on_head, 0)
    lora.new(load(MODEL), LoraOptions.model_validate(given), 0)
