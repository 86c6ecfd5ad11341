import hashlib
import json
import os
import threading

import pytest

from dpocli.errors import UsageError
from dpocli.model import hashing
from dpocli.model.hashing import HashMemory, code_hashes, meaningful_config, weights_hashes


def sha256(content):
    return hashlib.sha256(content).hexdigest()


@pytest.fixture
def model(tmp_path):
    directory = tmp_path / "model"
    directory.mkdir()
    write_weights(directory / "model.safetensors", b"weights")
    return directory


def write_weights(path, content, age=100.0):
    path.write_bytes(content)
    os.utime(path, (path.stat().st_mtime - age,) * 2)


def hashed_files(monkeypatch):
    seen = []
    real = hashing.sha256_of_file
    monkeypatch.setattr(hashing, "sha256_of_file", lambda path: seen.append(path.name) or real(path))
    return seen


def hashed_with(memory_path, directory):
    """The hashes of a model, by a memory that is saved afterwards."""
    memory = HashMemory(memory_path)
    hashes = weights_hashes(directory, memory)
    memory.save()
    return hashes


@pytest.fixture
def recalled(monkeypatch):
    """What a memory knows of a file without reading it."""

    def recall(memory, file):
        with monkeypatch.context() as patch:
            patch.setattr(hashing, "sha256_of_file", lambda path: None)
            return HashMemory(memory).sha256(file)

    return recall


def test_one_file(model):
    assert weights_hashes(model) == {"model.safetensors": sha256(b"weights")}


def test_the_files_of_the_index_and_no_others(tmp_path):
    names = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
    for name in [*names, "consolidated.safetensors"]:
        write_weights(tmp_path / name, name.encode())
    index = {"weight_map": {"a": names[2], "b": names[0], "c": names[1], "d": names[0]}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert weights_hashes(tmp_path) == {name: sha256(name.encode()) for name in names}
    (tmp_path / names[1]).unlink()
    with pytest.raises(UsageError, match=rf"incomplete: {names[1]} is missing \(1 of 3 files\)"):
        weights_hashes(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(UsageError, match="there are no weights"):
        weights_hashes(tmp_path)


def test_a_hub_snapshot_carries_its_hashes(tmp_path, monkeypatch):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    (blobs / sha256(b"weights")).write_bytes(b"weights")
    (snapshot / "model.safetensors").symlink_to(f"../../blobs/{sha256(b'weights')}")
    seen = hashed_files(monkeypatch)
    assert weights_hashes(snapshot) == {"model.safetensors": sha256(b"weights")}
    assert seen == []


def test_a_link_to_elsewhere_is_read(tmp_path, model):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model.safetensors").symlink_to(model / "model.safetensors")
    assert weights_hashes(tmp_path / "other") == {"model.safetensors": sha256(b"weights")}


def test_hashes_are_remembered_until_the_file_changes(model, tmp_path, monkeypatch):
    memory = tmp_path / ".hashes.json"
    seen = hashed_files(monkeypatch)
    for _ in range(3):
        hashed_with(memory, model)
    assert seen == ["model.safetensors"]
    write_weights(model / "model.safetensors", b"WEIGHTS", age=50)
    assert weights_hashes(model, HashMemory(memory)) == {"model.safetensors": sha256(b"WEIGHTS")}


def test_a_file_that_may_still_be_changing_is_not_remembered(model, tmp_path):
    write_weights(model / "model.safetensors", b"fresh", age=0)
    hashed_with(tmp_path / ".hashes.json", model)
    assert not (tmp_path / ".hashes.json").exists()


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"%s": 3}', '{"%s": {"size": 7, "sha256": "x"}}'])
def test_a_damaged_memory_costs_time_only(model, tmp_path, damage, recalled):
    memory = tmp_path / ".hashes.json"
    memory.write_text(damage.replace("%s", str(model / "model.safetensors")))
    assert hashed_with(memory, model) == {"model.safetensors": sha256(b"weights")}
    assert recalled(memory, model / "model.safetensors") == sha256(b"weights")


def test_a_memory_that_cannot_be_written_costs_time_only(model, tmp_path):
    assert hashed_with(tmp_path / "not" / "there.json", model)


def test_workers_share_a_memory(model, tmp_path, recalled):
    memory = tmp_path / ".hashes.json"
    threads = [threading.Thread(target=hashed_with, args=(memory, model)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert recalled(memory, model / "model.safetensors") == sha256(b"weights")


def test_an_entry_of_another_worker_is_kept(model, tmp_path, recalled):
    other = tmp_path / "other.safetensors"
    write_weights(other, b"other")
    first, second = HashMemory(tmp_path / ".hashes.json"), HashMemory(tmp_path / ".hashes.json")
    first.sha256(other)
    second.sha256(model / "model.safetensors")
    first.save()
    second.save()
    assert recalled(tmp_path / ".hashes.json", other) == sha256(b"other")


def test_fields_of_config_json_without_meaning(tmp_path):
    config = {"model_type": "llama", "rope_theta": 10000.0, "text_config": {"hidden_size": 8}, "layers": [{"a": 1}]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    noise = {"dtype": "bfloat16", "torch_dtype": "float16", "transformers_version": "5.1", "_name_or_path": "/x"}
    nested = {"text_config": {"dtype": "float16", "hidden_size": 8}, "layers": [{"a": 1, "dtype": "float32"}]}
    (tmp_path / "config.json").write_text(json.dumps({**noise, **config, **nested}))
    assert meaningful_config(tmp_path) == config
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 500000.0}))
    assert meaningful_config(tmp_path) != config


@pytest.mark.parametrize(("content", "words"), [("{", "is not JSON"), ("[1]", "holds no JSON object")])
def test_config_json_that_makes_no_sense(tmp_path, content, words):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UsageError, match=words):
        meaningful_config(tmp_path)


def test_config_json_missing(tmp_path):
    with pytest.raises(UsageError, match=r"Reading .*config.json failed: no such file"):
        meaningful_config(tmp_path)


def test_code_beside_a_model(tmp_path):
    (tmp_path / "modeling.py").write_bytes(b"pass")
    assert code_hashes(tmp_path) == {"modeling.py": sha256(b"pass")}


def test_other_content_under_an_old_date_is_other_content(model, tmp_path):
    """As archives and `cp -p` leave it: the same name, size and time."""
    path, memory = model / "model.safetensors", tmp_path / ".hashes.json"
    hashed_with(memory, model)
    date = path.stat().st_mtime_ns
    path.write_bytes(b"WEIGHTS")
    os.utime(path, ns=(date, date))
    assert weights_hashes(model, HashMemory(memory)) == {"model.safetensors": sha256(b"WEIGHTS")}
