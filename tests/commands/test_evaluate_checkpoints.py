"""`evaluate` on the checkpoints of a run: the same figures as of the models that they would have become."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file, save_file

from tests.commands.broken_inputs import replace_json
from tests.commands.conftest import MODEL, Run, quiet
from tests.commands.ranks import on_processes

SETTINGS = ("--learning-rate", "1e-3", "--batch-size", 20, "--save-every", 1, "--keep-last", 9)
KINDS: Mapping[str, tuple[object, ...]] = {
    "full": (),
    "lora": ("--lora-rank", 2),
    "dora": ("--lora-rank", 2, "--lora-variant", "dora"),
}


@pytest.fixture(scope="module")
def runs(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three steps of each kind, with a checkpoint after each."""
    found = {kind: tmp_path_factory.mktemp("runs") / kind for kind in KINDS}
    for kind, out in found.items():
        line = ("train", "--model", MODEL, "--reference", cache, "--out", out, "--max-steps", 3)
        quiet(*line, *SETTINGS, *KINDS[kind])
    return found


def margins(out: Path) -> dict[str, Any]:
    columns = pq.read_table(out / "pairs.parquet").to_pydict()
    return {name: np.array(values) for name, values in columns.items() if name.endswith("margins")}


@pytest.mark.parametrize("kind", KINDS)
def test_the_last_checkpoint_is_the_model(
    runs: Mapping[str, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run, kind: str
) -> None:
    run = runs[kind]
    line = ("evaluate", "--reference", held_out_cache, "--out", tmp_path / "r", "--model", run / "model")
    result = dpocli(*line, "--model", run / "checkpoints" / "step-3", "--json")
    assert result.code == 0, result.err
    found = margins(tmp_path / "r")
    assert np.abs(found["margins"]).max() > 1e-3
    np.testing.assert_array_equal(found["margins"], found["model-2/margins"])
    first, second = result.json["models"]
    assert (first["step"], second["step"], first["loss_choice"]) == (3, 3, second["loss_choice"])
    assert first["loss"] == second["loss"]


def test_the_checkpoints_of_a_run_are_told_as_one(
    runs: Mapping[str, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    places = [runs["full"] / "checkpoints" / f"step-{step}" for step in (2, 3, 1)]
    line = ("evaluate", "--reference", held_out_cache, "--out", tmp_path / "r", "--json")
    result = dpocli(*line, *(part for place in places for part in ("--model", place)))
    assert result.code == 0, result.err
    models = result.json["models"]
    assert [model["step"] for model in models] == [2, 3, 1]  # as given; tables sort them
    assert len({model["run"] for model in models}) == 1
    assert result.json["model"] == str(places[0])
    second, third, first = (model["rewards/margins"] for model in models)
    assert 0 < first < second < third


def test_runs_of_other_settings_are_told_apart(runs: Mapping[str, Path]) -> None:
    names = [json.loads((run / "model" / "dpocli.json").read_text())["run"] for run in runs.values()]
    assert len(set(names)) == len(runs)


def change_weights(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    next(iter(tensors.values())).mul_(1.25)
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})


def change_config(model: Path) -> None:
    replace_json(model / "config.json", lambda config: config.update(rms_norm_eps=1e-3))


@pytest.mark.parametrize(("change", "words"), [(change_weights, "weights"), (change_config, "configuration")])
def test_an_adapter_needs_its_base_as_it_was(
    cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run, change: Callable[[Path], None], words: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    for kind in ("lora", "full"):
        line = ("train", "--model", model, "--reference", cache, "--out", tmp_path / kind, "--max-steps", 1)
        quiet(*line, *SETTINGS, *KINDS[kind])
    line = ("evaluate", "--reference", held_out_cache, "--model")
    adapter, full = (tmp_path / kind / "checkpoints" / "step-1" for kind in ("lora", "full"))
    assert dpocli(*line, adapter, "--out", tmp_path / "before").code == 0
    change(model)
    refused = dpocli(*line, adapter, "--out", tmp_path / "before")
    assert (refused.code, f"the {words} of --model {adapter}" in refused.err) == (2, True), refused.err
    result = dpocli(*line, adapter, "--out", tmp_path / "after")
    assert result.code == 2, result.err
    said = " ".join(result.err.split())
    assert f"--model {adapter}: this checkpoint is an adapter that was trained on {model}, whose {words} have" in said
    if change is change_weights:
        assert dpocli(*line, full, "--out", tmp_path / "full-r").code == 0, "it holds all weights"


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("full", ("--shards", 2)),
        ("lora", ()),
        pytest.param("full", (), marks=pytest.mark.slow),
        pytest.param("lora", ("--shards", 2), marks=pytest.mark.slow),
    ],
)
def test_on_two_processes(
    runs: Mapping[str, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run, kind: str, how: tuple[object, ...]
) -> None:
    place = runs[kind] / "checkpoints" / "step-2"
    line = ("evaluate", "--reference", held_out_cache, "--model", place, "--out")
    assert dpocli(*line, tmp_path / "one").code == 0
    on_processes(2, *line, tmp_path / "two", *how)
    np.testing.assert_allclose(margins(tmp_path / "two")["margins"], margins(tmp_path / "one")["margins"], atol=1e-4)


def test_training_on_from_an_adapter(
    runs: Mapping[str, Path], cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    further = tmp_path / "further"
    line = ("train", "--model", runs["lora"] / "model", "--reference", cache, "--out", further, "--max-steps", 1)
    quiet(*line, *SETTINGS)
    line = ("evaluate", "--reference", held_out_cache, "--out", tmp_path / "r", "--model", further / "model")
    result = dpocli(*line, "--model", further / "checkpoints" / "step-1")
    assert result.code == 0, result.err
    np.testing.assert_array_equal(*margins(tmp_path / "r").values())


def test_only_evaluate_takes_them(runs: Mapping[str, Path], cache: Path, tmp_path: Path, dpocli: Run) -> None:
    place = runs["full"] / "checkpoints" / "step-1"
    for command in (("train", "--reference", cache), ("precompute", "--data", cache / "nothing.jsonl")):
        result = dpocli(*command, "--model", place, "--out", tmp_path / "out")
        assert result.code == 2, result.err
        assert f"--model {place}: this is a checkpoint of a training, which evaluate takes" in result.err
        assert "OUT/model" in result.err


def remove_base(checkpoint: Path) -> None:
    replace_json(checkpoint / "state.json", lambda state: state.update(base=str(checkpoint / "gone")))


def forget_base(checkpoint: Path) -> None:
    replace_json(checkpoint / "state.json", lambda state: state.update(base=None))


def truncate_weights(checkpoint: Path) -> None:
    (weights,) = checkpoint.glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:5000])


def remove_weights(checkpoint: Path) -> None:
    """Without a look at what should be there, the untrained model would be evaluated in its place."""
    (weights,) = checkpoint.glob("*.safetensors")
    weights.unlink()


def break_state(checkpoint: Path) -> None:
    (checkpoint / "state.json").write_text("{")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (remove_base, "gone, which is not there. Put that model back"),
        (forget_base, "does not say of which model"),
        (truncate_weights, "cannot be read"),
        (remove_weights, "is missing"),
        (break_state, "is not JSON"),
    ],
)
def test_what_cannot_be_read_is_told(
    runs: Mapping[str, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run, change: Any, words: str
) -> None:
    place = tmp_path / "step-1"
    shutil.copytree(runs["full"] / "checkpoints" / "step-1", place)
    change(place)
    result = dpocli("evaluate", "--model", place, "--reference", held_out_cache, "--out", tmp_path / "r")
    assert result.code == 2, result.err
    assert words in result.err
    assert str(place) in result.err


def test_an_adapter_has_no_place_on_one(
    runs: Mapping[str, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    place, adapter = runs["full"] / "checkpoints" / "step-1", runs["lora"] / "model"
    line = ("evaluate", "--model", place, "--adapter", adapter, "--reference", held_out_cache, "--out", tmp_path / "r")
    result = dpocli(*line)
    assert result.code == 2, result.err
    assert f"--adapter {adapter} has no place on it" in result.err


def test_its_state_names_the_model_for_good(runs: Mapping[str, Path]) -> None:
    state = json.loads((runs["full"] / "checkpoints" / "step-1" / "state.json").read_text())
    assert Path(state["base"]).is_absolute()


def test_what_the_training_took_is_told(
    runs: Mapping[str, Path], held_out_cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    run = runs["full"]
    line = ("evaluate", "--reference", held_out_cache, "--out", tmp_path / "r", "--json")
    models = ("--model", run / "model", "--model", MODEL, "--model", run / "checkpoints" / "step-2")
    result = dpocli(*line, *models)
    assert result.code == 0, result.err
    summary = json.loads((run / "summary.json").read_text())
    assert result.json["training"] == {
        "seconds": summary["seconds"]["training"],
        "pairs": 60,
        "tokens": summary["tokens_processed"],
        "processes": 1,
        "device": summary["environment"]["device"],
    }
    _, base, checkpoint = result.json["models"]
    assert base["training"] == {}
    assert 0 < checkpoint["training"]["seconds"] < summary["seconds"]["training"]
