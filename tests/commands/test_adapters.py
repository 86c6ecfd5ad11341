"""LoRA from end to end: trained, read by peft, scored as a reference, evaluated, merged; and what is refused."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from dpocli.cache.reader import PairStore
from dpocli.model.lora import quietly
from tests.commands.conftest import MODEL, TRAIN, Run, metrics_of, quiet
from tests.support.caches import assert_same_values, pairs_in

THERE_ARE = (
    "There are embed_tokens, q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj, lm_head, or all-linear."
)
CARRIERS = "only linear layers and embeddings can carry an adapter."
LORA = ("--lora-rank", 2, "--learning-rate", "1e-2", "--batch-size", 8, "--max-steps", 4)


def precompute(out: Path, *more: object) -> Path:
    quiet("precompute", "--data", TRAIN, "--limit", 16, "--out", out, *more)
    return out


@pytest.fixture(scope="module")
def base_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return precompute(tmp_path_factory.mktemp("base") / "ref", "--model", MODEL)


@pytest.fixture(scope="module")
def run(base_cache: Path) -> Path:
    """A finished training of an adapter, merged too."""
    out = base_cache.parent / "run"
    quiet("train", "--model", MODEL, "--reference", base_cache, "--out", out, *LORA, "--merge")
    return out


@pytest.fixture(scope="module")
def adapted_cache(run: Path) -> Path:
    """Of the base with the trained adapter on top, as the reference."""
    return precompute(run.parent / "ref-adapted", "--model", MODEL, "--adapter", run / "model")


def test_what_is_saved_is_an_adapter_that_peft_loads(run: Path) -> None:
    names = {path.name for path in (run / "model").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "dpocli.json", "tokenizer.json"} <= names
    assert not names & {"config.json", "model.safetensors"}
    weights = load_file(run / "model" / "adapter_model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert all(weight.any() for weight in weights.values())

    base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(run / "merged", dtype=torch.float32)
    input_ids = torch.arange(3, 43)[None]
    plain = base(input_ids).logits
    with quietly():
        theirs = PeftModel.from_pretrained(base, run / "model")(input_ids).logits
    assert not torch.allclose(plain, theirs, atol=1e-3)
    assert torch.allclose(merged(input_ids).logits, theirs, atol=1e-4)


def test_training_an_adapter_begins_at_the_reference(run: Path) -> None:
    first, *_, last = metrics_of(run)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["rewards/margins"] > 0.01


def test_an_adapter_as_the_reference_gives_the_values_of_the_merged_model(
    run: Path, adapted_cache: Path, tmp_path: Path
) -> None:
    of_merged = precompute(tmp_path / "ref", "--model", run / "merged")
    assert_same_values(pairs_in(adapted_cache), pairs_in(of_merged))
    adapter = PairStore.open(adapted_cache).fingerprint.reference.adapter
    assert adapter["config"]["r"] == 2
    assert len(adapter["weights"]) == 64


def test_a_directory_of_an_adapter_stands_for_its_base_with_it(dpocli: Run, run: Path, adapted_cache: Path) -> None:
    line = ("precompute", "--model", run / "model", "--data", TRAIN, "--limit", 16, "--out", adapted_cache, "--json")
    assert dpocli(*line).json["complete"]


def test_another_adapter_is_another_reference(dpocli: Run, run: Path, adapted_cache: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run / "model", tmp_path / "other")
    weights = load_file(other / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 1e-3
    save_file(weights, other / "adapter_model.safetensors")
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 16, "--out", adapted_cache)
    changed = dpocli(*line, "--adapter", other)
    assert changed.code == 4
    assert "adapter: weights differs" in changed.err
    assert dpocli(*line).code == 4


def test_how_an_adapter_came_about_is_no_part_of_it(
    dpocli: Run, run: Path, adapted_cache: Path, tmp_path: Path
) -> None:
    same = shutil.copytree(run / "model", tmp_path / "same")
    config = json.loads((same / "adapter_config.json").read_text())
    config |= {"base_model_name_or_path": "moved", "inference_mode": False, "a_field_of_the_future": None}
    config["target_modules"].reverse()
    (same / "adapter_config.json").write_text(json.dumps(config))
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 16, "--out", adapted_cache)
    assert dpocli(*line, "--adapter", same, "--json").json["complete"]


def test_training_on_is_checked_against_its_own_reference(
    dpocli: Run, run: Path, adapted_cache: Path, tmp_path: Path
) -> None:
    line = ("--model", MODEL, "--adapter", run / "model", "--batch-size", 8, "--max-steps", 1, "--out")
    on = dpocli("train", *line, tmp_path / "on", "--reference", adapted_cache)
    assert on.code == 0
    assert "Step-0 check: " in on.err
    metrics = metrics_of(tmp_path / "on")[0]
    assert metrics["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert metrics["learning_rate"] == pytest.approx(5e-6)


def test_an_adapter_is_not_the_reference_of_its_base(dpocli: Run, run: Path, base_cache: Path, tmp_path: Path) -> None:
    line = ("--batch-size", 8, "--max-steps", 1, "--reference", base_cache, "--out", tmp_path / "run")
    other = dpocli("train", "--model", run / "model", *line)
    assert "against another model's reference" in other.err
    assert metrics_of(tmp_path / "run")[0]["rewards/margins"] > 0.01


def test_evaluate_takes_an_adapter(dpocli: Run, run: Path, base_cache: Path, tmp_path: Path) -> None:
    by_adapter, by_merged = (
        dpocli("evaluate", "--model", run / name, "--reference", base_cache, "--out", tmp_path / name, "--json").json
        for name in ("model", "merged")
    )
    assert by_adapter["rewards/margins"] == pytest.approx(by_merged["rewards/margins"], abs=1e-4)
    assert by_adapter["rewards/margins"] > 0.01


def test_an_adapter_and_its_merged_model_are_the_same_beside_each_other(
    dpocli: Run, run: Path, base_cache: Path, tmp_path: Path
) -> None:
    line = ("evaluate", "--model", run / "model", "--model", run / "merged", "--reference", base_cache)
    (comparison,) = dpocli(*line, "--out", tmp_path, "--json").json["comparisons"]
    assert comparison["margin_difference"] == pytest.approx(0, abs=1e-4)
    assert comparison["margin_interval"] == pytest.approx([0, 0], abs=1e-4)


@pytest.mark.parametrize("variant", [pytest.param("rslora", marks=pytest.mark.slow), "dora"])
def test_its_variants(run: Path, base_cache: Path, tmp_path: Path, variant: str) -> None:
    line = ("--model", MODEL, "--reference", base_cache, "--lora-variant", variant, "--lora-targets", "q_proj,v_proj")
    quiet("train", *line, "--out", tmp_path, *LORA)
    config = json.loads((tmp_path / "model" / "adapter_config.json").read_text())
    assert (config["use_rslora"], config["use_dora"]) == (variant == "rslora", variant == "dora")
    assert sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    assert config["lora_alpha"] == 4
    first, *_, last = metrics_of(tmp_path)
    assert first["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert last["rewards/margins"] > 0


def test_its_own_dropout_is_the_only_one(base_cache: Path, tmp_path: Path) -> None:
    line = ("--model", MODEL, "--reference", base_cache, *LORA, "--lora-dropout", 0.5)
    quiet("train", *line, "--out", tmp_path / "a")
    quiet("train", *line, "--out", tmp_path / "b")
    quiet("train", *line[:-2], "--out", tmp_path / "none")
    last = [metrics_of(tmp_path / name)[-1]["loss"] for name in ("a", "b", "none")]
    assert last[0] == last[1] != last[2]


def without_weights(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").unlink()


def of_another_type(adapter: Path) -> None:
    rewrite_config(adapter, peft_type="IA3")


def after_tokens(adapter: Path) -> None:
    rewrite_config(adapter, alora_invocation_tokens=[1, 2])


def of_a_wider_model(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weight.repeat(2, 2) for name, weight in weights.items()}, adapter / "adapter_model.safetensors")


def of_a_deeper_model(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    more = {name.replace("layers.0.", "layers.9."): weight.clone() for name, weight in weights.items()}
    save_file(weights | more, adapter / "adapter_model.safetensors")


def half_there(adapter: Path) -> None:
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({name: weights[name] for name in sorted(weights)[::2]}, adapter / "adapter_model.safetensors")


def cut_off(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def no_json(adapter: Path) -> None:
    (adapter / "adapter_config.json").write_text("{")


def no_directory(adapter: Path) -> None:
    shutil.rmtree(adapter)


def rewrite_config(adapter: Path, **changes: object) -> None:
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (without_weights, "no adapter_model.safetensors"),
        (of_another_type, "of the type IA3"),
        (after_tokens, "acts only after certain tokens"),
        (of_a_wider_model, "does not fit the model: .*size mismatch"),
        (of_a_deeper_model, r"weights have no place in the model \(.*layers.9"),
        (half_there, "weights are not in its file .*adapter of another model"),
        (cut_off, "its weights cannot be read"),
        (no_json, "is not JSON"),
        (no_directory, "no adapter_config.json"),
    ],
)
def test_an_adapter_that_cannot_be_used(
    dpocli: Run, run: Path, tmp_path: Path, spoil: Callable[[Path], None], words: str
) -> None:
    spoil(adapter := shutil.copytree(run / "model", tmp_path / "adapter"))
    line = ("precompute", "--model", MODEL, "--adapter", adapter, "--data", TRAIN, "--limit", 4)
    refused = dpocli(*line, "--out", tmp_path / "ref")
    assert refused.code == 2
    assert re.search(words, refused.err, re.DOTALL)


def load_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)


@pytest.mark.parametrize("setting", [{"trainable_token_indices": [1, 2, 3]}, {"ensure_weight_tying": True}])
def test_an_adapter_that_can_be_scored_with_but_not_sharded(
    dpocli: Run, base_cache: Path, tmp_path: Path, setting: dict[str, Any]
) -> None:
    """Training shards even what lies on one process."""
    torch.manual_seed(0)
    targets = ["q_proj", "embed_tokens"] if "ensure_weight_tying" in setting else ["q_proj"]
    config = LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **setting)
    line = ("--model", MODEL, "--adapter", tmp_path / "adapter", "--out")
    with quietly():
        model = get_peft_model(load_model(), config)
        for weight in model.parameters():
            if weight.requires_grad:
                weight.data += 0.05 * torch.randn_like(weight)
        model.save_pretrained(tmp_path / "adapter")
        theirs = PeftModel.from_pretrained(load_model(), tmp_path / "adapter").eval()
    pair = pairs_in(precompute(tmp_path / "ref", *line[:-1]))[0]
    ids = torch.tensor([[*pair.prompt_ids, *pair.chosen_ids]])
    logps = theirs(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[-len(pair.chosen_ids) :, 0]
    assert pair.reference is not None
    assert pair.reference.chosen == pytest.approx(logps.tolist(), abs=1e-4)
    train = dpocli("train", *line, tmp_path / "run", "--reference", base_cache)
    sharded = dpocli("precompute", *line, tmp_path / "sharded", "--data", TRAIN, "--shards", 2)
    for refused, what in (train, "train on such"), (sharded, "spread it over"):
        if refused is train or "ensure_weight_tying" in setting:
            assert refused.code == 2
            assert f"made with {next(iter(setting))}, and dpocli cannot {what}" in refused.err


def test_an_adapter_beside_weights_of_a_model(dpocli: Run, run: Path, adapted_cache: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(run / "model", tmp_path / "adapter")
    shutil.copy(MODEL / "model.safetensors", adapter)
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 16, "--out", adapted_cache)
    assert dpocli(*line, "--adapter", adapter, "--json").json["complete"]


def test_a_revision_of_a_directory_is_nothing(dpocli: Run, tmp_path: Path) -> None:
    refused = dpocli("precompute", "--model", MODEL, "--revision", "v2", "--data", TRAIN, "--out", tmp_path / "ref")
    assert refused.code == 2
    assert "Leave --revision out" in " ".join(refused.err.split())


def test_a_base_that_is_gone_can_be_named(dpocli: Run, run: Path, tmp_path: Path) -> None:
    adapter = shutil.copytree(run / "model", tmp_path / "adapter")
    rewrite_config(adapter, base_model_name_or_path=str(tmp_path / "gone"))
    refused = dpocli("precompute", "--model", adapter, "--data", TRAIN, "--out", tmp_path / "ref")
    assert refused.code == 2
    assert f"Or give --model BASE --adapter {adapter}" in " ".join(refused.err.split())


def test_an_adapter_that_lies_within_its_base(dpocli: Run, run: Path, tmp_path: Path) -> None:
    """transformers would put it on without being asked, and no fingerprint would know."""
    both = shutil.copytree(MODEL, tmp_path / "both")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(run / "model" / name, both)
    refused = dpocli(
        "precompute", "--model", both, "--adapter", run / "model", "--data", TRAIN, "--out", tmp_path / "ref"
    )
    assert refused.code == 2
    assert "directory of its own" in " ".join(refused.err.split())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--lora-alpha", 4), "--lora-rank"),
        (("--lora-rank", 2, "--lora-targets", "nope,q_proj"), f"no layer named nope. {THERE_ARE}"),
        (("--lora-rank", 2, "--lora-targets", "q_porj"), f"no layer named q_porj; did you mean q_proj? {THERE_ARE}"),
        (
            ("--lora-rank", 2, "--lora-targets", ".*q_proj"),
            f"no layer named .*q_proj; did you mean q_proj? {THERE_ARE}",
        ),
        (
            ("--lora-rank", 2, "--lora-targets", "all-linear,lm_head"),
            f"all-linear must be the only target. {THERE_ARE}",
        ),
        (
            ("--lora-rank", 2, "--lora-targets", "q_proj,mlp"),
            f"model.layers.0.mlp is a LlamaMLP, and {CARRIERS} {THERE_ARE}",
        ),
        (("--lora-rank", 2, "--lora-targets", "norm"), f"model.norm is a LlamaRMSNorm, and {CARRIERS} {THERE_ARE}"),
        (("--merge",), "there is no adapter to merge"),
        (("--quantization", "nf4"), "quantized weights cannot be trained"),
    ],
)
def test_what_cannot_be_trained(
    dpocli: Run, base_cache: Path, tmp_path: Path, options: tuple[object, ...], words: str
) -> None:
    refused = dpocli("train", "--model", MODEL, "--reference", base_cache, "--out", tmp_path / "run", *options)
    assert refused.code == 2
    assert words in " ".join(refused.err.split())


def test_without_peft(dpocli: Run, base_cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    refused = dpocli("train", "--model", MODEL, "--reference", base_cache, "--out", tmp_path / "run", "--lora-rank", 2)
    assert refused.code == 2
    assert "pip install 'dpocli[lora]'" in refused.err


@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_quantized_references_and_policies(dpocli: Run, base_cache: Path, tmp_path: Path, quantization: str) -> None:
    """Values do not depend on what is scored beside them, and a policy of the same quantization begins at them."""
    quantized = ("--model", MODEL, "--quantization", quantization)
    small = precompute(tmp_path / "small", *quantized, "--token-budget", 64)
    large = precompute(tmp_path / "large", *quantized, "--token-budget", 4096)
    assert_same_values(pairs_in(small), pairs_in(large))
    with pytest.raises(AssertionError):
        assert_same_values(pairs_in(small), pairs_in(base_cache))

    on_its_own = dpocli("train", *quantized, "--reference", small, "--out", tmp_path / "run", *LORA)
    assert on_its_own.code == 0
    assert "Step-0 check: " in on_its_own.err
    first, *_, last = metrics_of(tmp_path / "run")
    assert first["rewards/margins"] == pytest.approx(0, abs=5e-3)
    assert last["rewards/margins"] > 0.01

    on_another = dpocli("train", *quantized, "--reference", base_cache, "--out", tmp_path / "other", *LORA)
    assert on_another.code == 0
    said = " ".join(on_another.err.split())
    assert f"precompute --config {base_cache}/config.yaml --out NEW-CACHE --quantization {quantization}" in said

    line = (
        "evaluate",
        "--model",
        tmp_path / "run" / "model",
        "--reference",
        small,
        "--out",
        tmp_path / "eval",
        "--json",
    )
    assert dpocli(*line).json["rewards/margins"] > 0.01
