"""`precompute --reuse`: what an old cache holds is not scored again, and what does not belong is refused."""

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dpocli.data.batch import PairBatch
from dpocli.scoring.scorer import PairScorer
from dpocli.scoring.token_logps import TokenLogps
from tests.commands.broken_inputs import SKIPPED, flip_a_byte, replace_json, replace_weights
from tests.commands.conftest import MODEL, TRAIN, Run, quiet
from tests.support.caches import assert_same_values, pairs_in, tree, values_in, write_rows

ROWS = [json.loads(line) for line in TRAIN.read_text().splitlines()[:48]]
OLD_ROWS = 36
# Padded, a layout that needs no trial first: what goes through the scorer is what is scored.
PRECOMPUTE = ("precompute", "--model", MODEL, "--rows-per-part", 9, "--scoring", "padded")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files with the first rows of the sample."""
    directory = tmp_path_factory.mktemp("rows")
    for count in (24, OLD_ROWS, 40):
        write_rows(directory / f"{count}.jsonl", ROWS[:count])
    write_rows(directory / "last.jsonl", ROWS[18:40])
    return directory


@pytest.fixture(scope="module")
def old(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("old") / "old"
    quiet(*PRECOMPUTE, "--data", data / f"{OLD_ROWS}.jsonl", "--out", out)
    return out


@pytest.fixture
def scored(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of pairs in each forward pass."""
    passes: list[int] = []
    plain = PairScorer.forward

    def forward(self: PairScorer, batch: PairBatch) -> TokenLogps:
        passes.append(len(batch))
        return plain(self, batch)

    monkeypatch.setattr(PairScorer, "forward", forward)
    return passes


def taken_over(cache: Path, old: Path) -> int:
    """How many pairs have, bit by bit, the values of the old cache; a pair of both must."""
    values, known = values_in(cache), values_in(old)
    common = values.keys() & known.keys()
    assert all(values[name] == known[name] for name in common)
    return len(common)


def test_appended_rows_alone_are_scored(data: Path, old: Path, tmp_path: Path, dpocli: Run, scored: list[int]) -> None:
    before, out = tree(old), tmp_path / "new"
    result = dpocli(*PRECOMPUTE, "--data", data / "40.jsonl", "--reuse", old, "--out", out)
    assert result.code == 0, result.err
    assert sum(scored) == 4
    assert "36 pairs taken over from --reuse" in result.out
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["pairs"], summary["reused"], summary["complete"]) == (40, 36, True)
    assert taken_over(out, old) == 36
    assert tree(old) == before, "the old cache is never touched"
    quiet(*PRECOMPUTE, "--data", data / "40.jsonl", "--out", tmp_path / "scored")
    assert_same_values(pairs_in(out), pairs_in(tmp_path / "scored"))


def test_nothing_new_needs_no_model(
    data: Path, old: Path, tmp_path: Path, dpocli: Run, scored: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other tiles, and rows in another order, are the same pairs."""
    monkeypatch.setattr("dpocli.scoring.frozen.load_model", lambda *_: pytest.fail("the model was loaded"))
    turned = write_rows(tmp_path / "turned.jsonl", ROWS[OLD_ROWS - 1 :: -1])
    out = tmp_path / "new"
    result = dpocli(*PRECOMPUTE, "--data", turned, "--reuse", old, "--out", out, "--rows-per-part", 5, "--json")
    assert result.code == 0, result.err
    assert (result.json["reused"], scored) == (36, [])
    assert "scoring" not in result.json
    assert taken_over(out, old) == 36
    assert [pair.pair_id for pair in pairs_in(out)] == [pair.pair_id for pair in pairs_in(old)][::-1]


def test_another_max_length_scores_only_the_pairs_that_it_changes(
    data: Path, old: Path, tmp_path: Path, dpocli: Run, scored: list[int]
) -> None:
    lengths = [pair.num_tokens_longer for pair in pairs_in(old)]
    limit = int(np.percentile(lengths, 70))
    changed = sum(length > limit for length in lengths)
    assert 4 <= changed <= 14
    line = (*PRECOMPUTE, "--data", data / "36.jsonl", "--json")
    shorter = dpocli(*line, "--max-length", limit, "--reuse", old, "--out", tmp_path / "shorter")
    assert shorter.code == 0, shorter.err
    assert sum(scored) == changed == shorter.json["truncated"]
    assert shorter.json["reused"] == taken_over(tmp_path / "shorter", old) == 36 - changed
    scored.clear()
    whole = dpocli(*line, "--reuse", tmp_path / "shorter", "--reuse", old, "--out", tmp_path / "whole")
    assert (whole.json["reused"], scored) == (36, []), "and back again with both"
    assert taken_over(tmp_path / "whole", old) == 36


def test_several_old_caches_together(data: Path, old: Path, tmp_path: Path, dpocli: Run, scored: list[int]) -> None:
    other = tmp_path / "other"
    assert dpocli(*PRECOMPUTE, "--data", data / "last.jsonl", "--out", other).code == 0
    scored.clear()
    line = (*PRECOMPUTE, "--data", data / "40.jsonl", "--json", "--reuse", other, "--reuse", old)
    result = dpocli(*line, "--out", tmp_path / "new")
    assert result.code == 0, result.err
    assert (result.json["reused"], scored) == (40, [])
    assert taken_over(tmp_path / "new", other) == 22, "the first one named has the first word"


def test_an_incomplete_old_cache_gives_what_it_has(
    data: Path, old: Path, tmp_path: Path, dpocli: Run, scored: list[int]
) -> None:
    incomplete = tmp_path / "incomplete"
    shutil.copytree(old, incomplete)
    min(incomplete.glob("rows-*")).unlink()
    before = tree(incomplete)
    result = dpocli(
        *PRECOMPUTE, "--data", data / "36.jsonl", "--reuse", incomplete, "--out", tmp_path / "new", "--json"
    )
    assert result.code == 0, result.err
    assert (result.json["reused"], sum(scored)) == (27, 9)
    assert tree(incomplete) == before


def test_tiles_of_skipped_rows_alone(old: Path, tmp_path: Path, dpocli: Run, scored: list[int]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [SKIPPED] * 9 + ROWS[:10])
    result = dpocli(*PRECOMPUTE, "--data", rows, "--reuse", old, "--out", tmp_path / "new", "--json")
    assert result.code == 0, result.err
    assert (result.json["pairs"], result.json["reused"], scored) == (10, 10, [])


def test_a_cache_begun_without_is_finished_with(
    data: Path, old: Path, tmp_path: Path, dpocli: Run, scored: list[int]
) -> None:
    """What is reused decides no value, so it is no reason to refuse a cache."""
    out, line = tmp_path / "new", (*PRECOMPUTE, "--data", data / "40.jsonl")
    assert dpocli(*line, "--shard", "0/2", "--out", out).code == 0
    scored.clear()
    result = dpocli(*line, "--reuse", old, "--out", out, "--json")
    assert result.code == 0, result.err
    assert (result.json["reused"], scored, result.json["complete"]) == (18, [], True)


@pytest.fixture
def other_model(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    shutil.copytree(MODEL, path, copy_function=os.symlink)
    return path


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("dtype", "dtype: float32 -> bfloat16"),
        ("weights", "weights: model.safetensors differs"),
        ("config", "config.json: rms_norm_eps: 1e-06 -> 1e-05"),
    ],
)
def test_values_of_another_reference_are_refused_by_field(
    change: str, words: str, data: Path, old: Path, other_model: Path, tmp_path: Path, dpocli: Run, scored: list[int]
) -> None:
    before, out = tree(old), tmp_path / "new"
    if change == "weights":
        replace_weights(other_model / "model.safetensors", lambda weights: weights["model.norm.weight"][:1].add_(1e-3))
    if change == "config":
        replace_json(other_model / "config.json", lambda config: config.update(rms_norm_eps=1e-5))
    dtype = ("--dtype", "bfloat16") if change == "dtype" else ()
    result = dpocli(
        *PRECOMPUTE, "--model", other_model, "--data", data / "40.jsonl", "--reuse", old, "--out", out, "--json", *dtype
    )
    assert (result.code, result.out, scored) == (4, "", []), result.err
    assert f"--reuse {old}: its values come from another reference ({words})" in result.err
    assert tree(old) == before
    assert not list(out.glob("rows-*"))


def test_a_damaged_old_cache_is_named_and_left_alone(data: Path, old: Path, tmp_path: Path, dpocli: Run) -> None:
    damaged = tmp_path / "damaged"
    shutil.copytree(old, damaged)
    part = sorted(damaged.glob("rows-*"))[1]
    flip_a_byte(part)
    before = tree(damaged)
    result = dpocli(*PRECOMPUTE, "--data", data / "40.jsonl", "--reuse", damaged, "--out", tmp_path / "new")
    assert result.code == 4
    assert f"The part {part.name} of the reference cache {damaged} is damaged" in result.err
    assert tree(damaged) == before


@pytest.mark.parametrize(
    ("what", "words"), [("missing", "There is no reference cache"), ("a model", "is a model directory")]
)
def test_what_is_no_cache_cannot_be_reused(what: str, words: str, data: Path, tmp_path: Path, dpocli: Run) -> None:
    reuse = MODEL if what == "a model" else tmp_path / "none"
    result = dpocli(*PRECOMPUTE, "--data", data / "24.jsonl", "--reuse", reuse, "--out", tmp_path / "new")
    assert result.code == 4
    assert words in result.err


SPELLINGS = ["as --out", "through a link", "relative", "by a detour"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_cache_cannot_be_made_of_itself(
    spelling: str, data: Path, old: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    shutil.copytree(old, out)
    min(out.glob("rows-*")).unlink()
    before = tree(out)
    (tmp_path / "link").symlink_to(out)
    monkeypatch.chdir(tmp_path)
    reuse = {"as --out": out, "through a link": tmp_path / "link", "relative": "out", "by a detour": out / ".." / "out"}
    result = dpocli(*PRECOMPUTE, "--data", data / "36.jsonl", "--reuse", reuse[spelling], "--out", out)
    assert result.code == 2
    assert "--out names the same cache; an old cache is never written" in result.err
    assert {path: value for path, value in tree(out).items() if "rows-" in path.name} == {
        path: value for path, value in before.items() if "rows-" in path.name
    }


def test_the_new_cache_says_of_each_row_what_the_data_says(data: Path, old: Path, tmp_path: Path, dpocli: Run) -> None:
    """Weight and label come from the new rows, only the log-probs from the old cache."""
    rows = [row | {"weight": 0.25, "source": "relabelled"} for row in ROWS[:12]]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    result = dpocli(*PRECOMPUTE, "--data", path, "--reuse", old, "--out", tmp_path / "new", "--json")
    assert (result.code, result.json["reused"]) == (0, 12), result.err
    expected = [replace(pair, weight=0.25, source="relabelled") for pair in pairs_in(old)[:12]]
    assert [(pair.row, pair.weight, pair.source) for pair in pairs_in(tmp_path / "new")] == [
        (pair.row, pair.weight, pair.source) for pair in expected
    ]


def test_a_cache_that_stops_over_another_max_length_tells_of_reuse(
    data: Path, old: Path, tmp_path: Path, dpocli: Run
) -> None:
    out = tmp_path / "old"
    shutil.copytree(old, out)
    lengths = [pair.num_tokens_longer for pair in pairs_in(old)]
    limit = int(np.median(lengths))
    affected = sum(length > limit for length in lengths)
    result = dpocli(*PRECOMPUTE, "--data", data / "36.jsonl", "--out", out, "--max-length", limit)
    assert result.code == 4
    assert f"max_length: 2048 -> {limit} ({affected} of 36 pairs are affected by max_length)" in result.err
    assert f"--reuse {out}, which scores only what is not in it" in result.err
    other = dpocli(*PRECOMPUTE, "--data", data / "36.jsonl", "--out", out, "--dtype", "bfloat16")
    assert other.code == 4
    assert "--reuse" not in other.err, "no value could be taken over"


def test_rows_that_were_too_long_count_among_what_a_greater_max_length_affects(
    data: Path, old: Path, tmp_path: Path, dpocli: Run
) -> None:
    limit = int(np.percentile([pair.num_tokens_longer for pair in pairs_in(old)], 20))
    line = (*PRECOMPUTE, "--data", data / "36.jsonl", "--out", tmp_path / "new", "--truncation", "drop")
    first = dpocli(*line, "--max-length", limit, "--max-skipped", 1, "--json")
    (skipped,) = first.json["skipped"].values()
    assert skipped > first.json["pairs"]
    result = dpocli(*line)
    assert result.code == 4
    assert f"({skipped} of 36 pairs are affected by max_length)" in result.err
