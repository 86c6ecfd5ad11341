"""A cache trains in TRL's DPOTrainer by the lines that docs/cache.md shows, where TRL is installed."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.commands.conftest import MODEL, Run

PAGE = Path(__file__).parents[2] / "docs" / "cache.md"


def lines_of_the_page() -> str:
    """The block that begins with the import of TRL."""
    (block,) = re.findall(r"```python\n(from datasets import[^`]*?from trl import.*?)```", PAGE.read_text(), re.DOTALL)
    return block


def moved(directory: Path) -> Path:
    """A policy that is not the reference any more."""
    shutil.copytree(MODEL, directory)
    weights = load_file(directory / "model.safetensors")
    torch.manual_seed(0)
    changed = {name: tensor + 0.02 * torch.randn_like(tensor) for name, tensor in weights.items()}
    save_file(changed, directory / "model.safetensors", {"format": "pt"})
    return directory


@pytest.mark.filterwarnings("default")
def test_the_first_loss_of_trl_is_ours(
    cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("trl", reason="TRL is not installed")
    other_model = moved(tmp_path / "policy")
    result = dpocli(
        "evaluate", "--model", other_model, "--reference", cache, "--loss", "dpo", "--out", tmp_path / "ours", "--json"
    )
    assert result.code == 0, result.err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "ref").symlink_to(cache)
    names = {
        "model": AutoModelForCausalLM.from_pretrained(other_model, dtype=torch.float32),
        "tokenizer": AutoTokenizer.from_pretrained(other_model),
    }
    exec(lines_of_the_page().partition("trainer.train()")[0], names)
    trainer = names["trainer"]
    batch = trainer.data_collator(list(trainer.train_dataset))
    with torch.no_grad():
        loss = float(trainer.compute_loss(trainer.model, batch))
    assert loss == pytest.approx(json.loads(result.out)["loss"], abs=1e-4)
