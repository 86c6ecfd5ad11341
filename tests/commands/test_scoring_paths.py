"""`--scoring`: the layout affects speed, not results, and is recorded."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from dpocli.cache.reader import PairStore
from dpocli.cache.schema import FOOTER_KEY, PartFooter
from dpocli.data.preference import EncodedPair
from tests.commands.conftest import HELD_OUT, MODEL, TRAIN, Run, metrics_of, quiet
from tests.tiny_models import SHAPE

LAYOUTS = ("shared", "packed", "padded")
LIMIT = 24
PRECOMPUTE = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", LIMIT, "--rows-per-part", 8)
TRAINING = ("--learning-rate", "5e-4", "--batch-size", 8, "--max-steps", 4, "--token-budget", 700)
RECORD = {
    "scoring", "attention", "tokens_computed", "tokens_unique", "tokens_scored", "padding_share", "passes_split", "seconds",
    "unique_tokens_per_second",
}  # fmt: skip


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same pairs, scored in every layout."""
    root = tmp_path_factory.mktemp("caches")
    for layout in LAYOUTS:
        quiet(*PRECOMPUTE, "--out", root / layout, "--scoring", layout)
    return {layout: root / layout for layout in LAYOUTS}


@pytest.fixture(scope="module")
def runs(caches: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The same training in every layout, from one cache."""
    root = tmp_path_factory.mktemp("runs")
    for layout in LAYOUTS:
        quiet(
            "train", "--model", MODEL, "--reference", caches["padded"], "--eval-fraction", 0.2, "--eval-every", 2,
            "--out", root / layout, *TRAINING, "--scoring", layout,
        )  # fmt: skip
    return {layout: root / layout for layout in LAYOUTS}


def pairs_in(cache: Path) -> list[EncodedPair]:
    store = PairStore.open(cache)
    return store.load(np.arange(len(store)))


def assert_same_values(cache: Path, other: Path) -> None:
    pairs, others = pairs_in(cache), pairs_in(other)
    assert [pair.pair_id for pair in pairs] == [pair.pair_id for pair in others]
    for pair, twin in zip(pairs, others, strict=True):
        assert pair.reference is not None
        assert twin.reference is not None
        np.testing.assert_allclose(pair.reference.chosen, twin.reference.chosen, rtol=0, atol=1e-5)
        np.testing.assert_allclose(pair.reference.rejected, twin.reference.rejected, rtol=0, atol=1e-5)


def summary_of(out: Path) -> dict[str, Any]:
    summary: dict[str, Any] = json.loads((out / "summary.json").read_text())
    return summary


def information_of(part: Path) -> dict[str, Any]:
    footer = PartFooter.from_json(pq.read_metadata(part).metadata[FOOTER_KEY])
    return dict(footer.fingerprint.information)


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    numbers = {name: value for name, value in expected.items() if isinstance(value, int | float)}
    # While the policy equals the reference, rounding decides whether a pair is a tie.
    numbers = {name: value for name, value in numbers.items() if not name.endswith(("accuracies", "ties"))}
    assert {name: found[name] for name in numbers} == pytest.approx(numbers, rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_precompute_writes_the_same_values_in_every_way(layout: str, caches: dict[str, Path]) -> None:
    assert_same_values(caches[layout], caches["padded"])


def test_caches_of_every_way_are_the_same_reference(caches: dict[str, Path]) -> None:
    fingerprints = [PairStore.open(cache).fingerprint for cache in caches.values()]
    assert len({fingerprint.reference_digest for fingerprint in fingerprints}) == 1
    assert len({fingerprint.digest for fingerprint in fingerprints}) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_part_says_how_it_was_scored(layout: str, caches: dict[str, Path]) -> None:
    parts = sorted(caches[layout].glob("rows-*"))
    assert len(parts) == LIMIT / 8
    for part in parts:
        information = information_of(part)
        assert information["scoring"] == layout
        assert information["attention"] == ("sdpa" if layout == "padded" else "segments")
        assert {"torch", "transformers", "device"} <= information.keys()


@pytest.mark.parametrize(("first", "then"), [("padded", "shared"), ("shared", "padded"), ("packed", "auto")])
def test_a_cache_begun_in_one_way_is_finished_in_another(
    first: str, then: str, caches: dict[str, Path], tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "cache"
    shutil.copytree(caches[first], out)
    *kept, removed = sorted(out.glob("rows-*"))
    before = [part.stat().st_mtime_ns for part in kept]
    removed.unlink()
    result = dpocli(*PRECOMPUTE, "--out", out, "--scoring", then)
    assert result.code == 0, result.err
    assert [part.stat().st_mtime_ns for part in kept] == before
    assert information_of(removed)["scoring"] == ("shared" if then == "auto" else then)
    assert information_of(kept[0])["scoring"] == first
    assert_same_values(out, caches["padded"])


def test_the_summary_of_precompute_has_a_record_of_scoring(caches: dict[str, Path]) -> None:
    records = {layout: summary_of(cache)["scoring"] for layout, cache in caches.items()}
    unique = sum(sum(map(len, pair.all_ids)) for pair in pairs_in(caches["padded"]))
    for layout, record in records.items():
        assert record.keys() == RECORD
        assert record["scoring"] == layout
        assert record["tokens_unique"] == unique
        assert record["seconds"] > 0
    assert records["shared"]["tokens_computed"] == unique < records["packed"]["tokens_computed"]
    assert records["shared"]["padding_share"] == records["packed"]["padding_share"] == 0
    assert records["padded"]["padding_share"] > 0
    assert records["padded"]["tokens_computed"] > records["packed"]["tokens_computed"]


def test_a_complete_cache_says_nothing_of_scoring(caches: dict[str, Path], tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "cache"
    shutil.copytree(caches["shared"], out)
    result = dpocli(*PRECOMPUTE, "--out", out, "--json")
    assert result.code == 0, result.err
    assert "scoring" not in result.json


@pytest.mark.parametrize("layout", ["shared", "packed"])
def test_training_takes_the_same_course_in_every_way(layout: str, runs: dict[str, Path]) -> None:
    rows, others = metrics_of(runs["padded"]), metrics_of(runs[layout])
    assert len(rows) == len(others) == 5
    for row, other in zip(rows, others, strict=True):
        assert_close(other, row)


def test_the_summary_of_training_has_a_record_of_scoring(runs: dict[str, Path]) -> None:
    for layout, run in runs.items():
        record = summary_of(run)["scoring"]
        assert record.keys() == RECORD
        assert record["scoring"] == layout
        assert (record["padding_share"] > 0) is (layout == "padded")


@pytest.mark.parametrize("layout", ["padded", "packed", "auto"])
def test_a_finished_run_has_nothing_to_do_in_another_way(
    layout: str, caches: dict[str, Path], runs: dict[str, Path], dpocli: Run
) -> None:
    weights = (runs["shared"] / "model" / "model.safetensors").stat().st_mtime_ns
    result = dpocli(
        "train", "--model", MODEL, "--reference", caches["padded"], "--eval-fraction", 0.2, "--eval-every", 2,
        "--out", runs["shared"], *TRAINING, "--scoring", layout,
    )  # fmt: skip
    assert (result.code, "nothing to do" in result.out) == (0, True), result.err
    assert (runs["shared"] / "model" / "model.safetensors").stat().st_mtime_ns == weights


def test_a_stopped_run_goes_on_in_another_way(
    caches: dict[str, Path], runs: dict[str, Path], tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "run"
    line = (
        "train", "--model", MODEL, "--reference", caches["padded"], "--eval-fraction", 0.2, "--eval-every", 2,
        "--out", out, *TRAINING, "--save-every", 2, "--scoring",
    )  # fmt: skip
    assert dpocli(*line, "shared").code == 0
    for path in (out / "checkpoints" / "step-4", out / "model"):
        shutil.rmtree(path)
    (out / "summary.json").unlink()
    result = dpocli(*line, "padded")
    assert result.code == 0, result.err
    assert "Resuming after step 2" in result.err
    for row, other in zip(metrics_of(runs["padded"]), metrics_of(out), strict=True):
        assert_close(other, row)


def test_evaluate_reports_the_same_in_every_way(runs: dict[str, Path], tmp_path: Path, dpocli: Run) -> None:
    reports = {}
    for layout in LAYOUTS:
        result = dpocli(
            "evaluate", "--model", runs["padded"] / "model", "--data", HELD_OUT, "--limit", 12, "--loss", "simpo",
            "--out", tmp_path / layout, "--scoring", layout, "--json",
        )  # fmt: skip
        assert result.code == 0, result.err
        reports[layout] = result.json
        assert reports[layout]["scoring"].keys() == RECORD | {"processes"}
        assert reports[layout]["scoring"]["scoring"] == layout
    for layout in ("shared", "packed"):
        assert_close(reports[layout], reports["padded"])


def test_gradient_checkpointing_goes_with_shared_prompts(
    caches: dict[str, Path], runs: dict[str, Path], tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "run"
    result = dpocli(
        "train", "--model", MODEL, "--reference", caches["padded"], "--eval-fraction", 0.2, "--eval-every", 2, "--out",
        out, *TRAINING, "--scoring", "shared", "--gradient-checkpointing",
    )  # fmt: skip
    assert result.code == 0, result.err
    for row, other in zip(metrics_of(runs["padded"]), metrics_of(out), strict=True):
        assert_close(other, row)


@pytest.fixture(scope="module")
def recurrent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid with the tokenizer of the sample model."""
    from transformers import FalconH1Config, FalconH1ForCausalLM

    path = tmp_path_factory.mktemp("models") / "falcon-h1"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    shape = SHAPE | {"vocab_size": len(tokenizer)}
    model = FalconH1ForCausalLM(
        FalconH1Config(**shape, head_dim=8, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_n_groups=1)
    )
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def test_a_model_that_cannot_share_is_scored_plainly_and_that_is_said(
    recurrent: Path, tmp_path: Path, dpocli: Run
) -> None:
    line = ("precompute", "--model", recurrent, "--data", TRAIN, "--limit", 4, "--out", tmp_path / "cache")
    result = dpocli(*line)
    assert result.code == 0, result.err
    assert "Scoring is padded with sdpa; faster layouts cannot be used here" in result.err
    assert summary_of(tmp_path / "cache")["scoring"]["scoring"] == "padded"


def test_a_way_that_is_wrong_for_the_model_is_refused(recurrent: Path, tmp_path: Path, dpocli: Run) -> None:
    line = ("precompute", "--model", recurrent, "--data", TRAIN, "--limit", 4, "--out", tmp_path / "cache")
    result = dpocli(*line, "--scoring", "shared")
    assert result.code == 5
    assert "--scoring shared is wrong for this model" in result.err
    assert not list((tmp_path / "cache").glob("rows-*"))
