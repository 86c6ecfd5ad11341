"""`precompute --verify` looks whether a cache holds what a model gives; `--dry-run` tells what would be done. Both only look."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dpocli.commands import precompute_report
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.model import hashing
from tests.caches import pairs_in, tree, with_other_values, write_rows
from tests.commands.broken_inputs import NO_PAIR, SKIPPED, World, flip_a_byte, replace_weights
from tests.commands.conftest import MODEL, TRAIN, Run

ROWS = [json.loads(line) for line in TRAIN.read_text().splitlines()[:40]]
LINE = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 40, "--rows-per-part", 16)
"""What the cache of the session was made with."""
ONE_ROW = 11


@pytest.fixture
def copy(cache: Path, tmp_path: Path) -> Path:
    shutil.copytree(cache, tmp_path / "ref")
    return tmp_path / "ref"


def ended_elsewhere(out: Path) -> None:
    """As if another process had written the status: what this one wrote itself, it would leave alone."""
    path = out / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 0, "pid_started": 0}))


# --verify


def test_a_cache_holds_what_its_model_gives(copy: Path, dpocli: Run) -> None:
    before = tree(copy)
    result = dpocli(*LINE, "--out", copy, "--verify", 12)
    assert result.code == 0, result.err
    assert f"{copy} holds what this model gives: mean |difference| " in result.out
    assert "over 12 pairs" in result.out
    assert tree(copy) == before


def test_more_pairs_than_there_are_is_all_of_them(copy: Path, dpocli: Run) -> None:
    result = dpocli(*LINE, "--out", copy, "--verify", 1000, "--json")
    assert result.code == 0, result.err
    verified = result.json["verified"]
    assert (verified["num_pairs"], result.json["out"]) == (40, str(copy))
    assert 0 <= abs(verified["signed_mean"]) <= verified["mean"] <= verified["worst_mean"] < verified["tolerance"]


def test_every_verification_draws_anew(copy: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []
    plain = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda *seed: drawn.append(seed) or plain(*seed))
    assert dpocli(*LINE, "--out", copy, "--verify", 2, "--scoring", "padded").code == 0
    assert () in drawn


Change = Callable[[EncodedPair], ReferenceLogps]


def all_a_little_higher(pair: EncodedPair) -> ReferenceLogps:
    assert pair.reference is not None
    return ReferenceLogps(pair.reference.chosen + np.float32(6e-5), pair.reference.rejected + np.float32(6e-5))


def one_row_higher(pair: EncodedPair) -> ReferenceLogps:
    assert pair.reference is not None
    higher = np.float32(0.5 * (pair.row == ONE_ROW))
    return ReferenceLogps(pair.reference.chosen + higher, pair.reference.rejected)


def sides_exchanged_in_one_row(pair: EncodedPair) -> ReferenceLogps:
    assert pair.reference is not None
    if pair.row != ONE_ROW:
        return pair.reference
    return ReferenceLogps(np.resize(pair.reference.rejected, len(pair.chosen_ids)), pair.reference.rejected)


@pytest.mark.parametrize(
    ("change", "row"),
    [(all_a_little_higher, None), (one_row_higher, ONE_ROW), (sides_exchanged_in_one_row, ONE_ROW)],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_values_that_the_model_does_not_give(
    change: Change, row: int | None, cache: Path, tmp_path: Path, dpocli: Run
) -> None:
    """With valid digests. The tolerance is on the mean, so a small shift in one direction counts."""
    altered = tmp_path / "altered"
    with_other_values(cache, altered, change)
    before = tree(altered)
    result = dpocli(*LINE, "--out", altered, "--verify", 40, "--json")
    assert (result.code, result.out) == (4, ""), result.err
    assert f"--verify 40: the cache {altered} does not hold what this model gives: mean |difference|" in result.err
    assert f"worst pair row {'' if row is None else row}" in result.err
    assert parts(tree(altered)) == parts(before)


def parts(files: dict[Path, tuple[int, bytes | None]]) -> dict[Path, tuple[int, bytes | None]]:
    return {path: value for path, value in files.items() if path.name.startswith("rows-")}


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (("--max-length", 60), "max_length: 2048 -> 60"),
        (("--limit", 39), "limit: 40 -> 39"),
        (("--dtype", "bfloat16"), "dtype: float32 -> bfloat16"),
    ],
)
def test_other_settings_are_told_apart_from_other_values(
    more: tuple[object, ...], words: str, copy: Path, dpocli: Run
) -> None:
    result = dpocli(*LINE, *more, "--out", copy, "--verify", 4)
    assert result.code == 4
    assert f"--verify: the cache {copy} was made with other settings than these ({words}" in result.err


def test_a_flipped_weight_is_told_by_the_fingerprint(copy: Path, tmp_path: Path, dpocli: Run) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model, copy_function=os.symlink)
    replace_weights(model / "model.safetensors", lambda weights: weights["model.norm.weight"][:1].neg_())
    result = dpocli(*LINE, "--model", model, "--out", copy, "--verify", 4)
    assert result.code == 4
    assert "weights: model.safetensors differs" in result.err


@pytest.mark.parametrize(
    ("state", "words"),
    [("none", "There is no reference cache"), ("incomplete", "1 of 3 parts"), ("damaged", "damaged")],
)
def test_only_a_whole_cache_is_verified(state: str, words: str, copy: Path, tmp_path: Path, dpocli: Run) -> None:
    if state == "none":
        shutil.rmtree(copy)
    elif state == "incomplete":
        min(copy.glob("rows-*")).unlink()
    else:
        flip_a_byte(min(copy.glob("rows-*")))
    before = tree(tmp_path)
    result = dpocli(*LINE, "--out", copy, "--verify", 40)
    assert result.code == 4
    assert words in result.err
    assert tree(tmp_path) == before


def test_a_cache_without_pairs(cache: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    world = World(tmp_path, cache, held_out_cache)
    world.paths["no_pair"] = tmp_path / "no-pair"
    for shard in ("0/2", "1/2"):
        dpocli(*world.arguments(NO_PAIR), "--shard", shard)
    result = dpocli(*world.arguments(NO_PAIR), "--shard", "0/1", "--verify", 4)
    assert result.code in (0, 4), result.err
    assert "Traceback" not in result.err


def test_verify_writes_nothing_even_where_no_hashes_are_remembered(copy: Path, dpocli: Run) -> None:
    (copy / ".hashes.json").unlink()
    before = tree(copy)
    assert dpocli(*LINE, "--out", copy, "--verify", 2).code == 0
    assert tree(copy) == before


@pytest.mark.parametrize("more", [("--verify", 2), ("--dry-run",)], ids=["verify", "dry run"])
def test_a_look_uses_the_hashes_that_are_remembered(
    more: tuple[object, ...], copy: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    os.utime(model / "model.safetensors", (0, 0))  # what was written a moment ago is not remembered
    line = (*LINE, "--model", model, "--out", copy)
    assert dpocli(*line).code == 0
    hashed = []
    plain = hashing.sha256_of_file
    monkeypatch.setattr(hashing, "sha256_of_file", lambda path: hashed.append(path.name) or plain(path))
    assert dpocli(*line, *more).code == 0
    assert hashed == []
    (model / "model.safetensors").touch()
    before = tree(copy)
    assert dpocli(*line, *more).code == 0
    assert hashed == ["model.safetensors"]
    assert tree(copy) == before


@pytest.mark.parametrize("more", [("--verify", 4), ("--dry-run",)], ids=["verify", "dry run"])
def test_a_look_that_fails_is_not_the_outcome_of_the_cache(more: tuple[object, ...], copy: Path, dpocli: Run) -> None:
    ended_elsewhere(copy)
    before = tree(copy)
    assert dpocli(*LINE, "--dtype", "bfloat16", "--out", copy, *more).code == 4
    assert tree(copy) == before


def test_verify_and_dry_run_exclude_each_other(copy: Path, dpocli: Run) -> None:
    result = dpocli(*LINE, "--out", copy, "--verify", 4, "--dry-run")
    assert result.code == 2
    assert "--dry-run touches no cache, and --verify looks into one" in result.err
    assert dpocli(*LINE, "--out", copy, "--verify", 0).code == 2


# --dry-run


def test_a_dry_run_is_exact_for_small_data(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    before = tree(tmp_path)
    result = dpocli(*LINE, "--out", tmp_path / "none" / "ref", "--dry-run", "--json")
    assert result.code == 0, result.err
    assert tree(tmp_path) == before, "--out is not even made"
    pairs = pairs_in(cache)
    expected = {
        "rows": 40,
        "is_exact": True,
        "rows_sampled": 40,
        "pairs": 40,
        "tokens": sum(len(ids) for pair in pairs for ids in pair.all_ids),
        "skipped": {},
        "reused_pairs": 0,
        "tiles": 3,
        "rows_to_do": 40,
    }
    figures = result.json
    assert expected.items() <= figures.items()
    on_disk = sum(path.stat().st_size for path in cache.glob("rows-*"))
    assert 0.4 * on_disk < figures["bytes"] < 1.6 * on_disk
    assert figures["seconds"] > 0
    assert figures["scoring"]["unique_tokens_per_second"] > 0


def test_a_dry_run_in_words(tmp_path: Path, dpocli: Run) -> None:
    result = dpocli(*LINE, "--out", tmp_path / "ref", "--dry-run")
    assert result.code == 0, result.err
    assert "Dry run (all rows encoded): 40 pairs of 40 rows, " in result.out
    assert "tokens, 3 parts." in result.out
    assert "MB on disk" in result.out
    assert "40 rows are this worker's to do: about " in result.out


def test_rows_that_would_be_skipped_are_told_by_reason(tmp_path: Path, dpocli: Run) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS[:6], SKIPPED, SKIPPED, ROWS[7] | {"chosen": "", "rejected": "x"}])
    before = tree(tmp_path)
    line = (
        "precompute",
        "--model",
        MODEL,
        "--data",
        rows,
        "--on-bad-row",
        "skip",
        "--out",
        tmp_path / "ref",
        "--dry-run",
    )
    figures = dpocli(*line, "--json").json
    assert (figures["rows"], figures["pairs"], figures["tiles"]) == (9, 6, 1)
    assert figures["skipped"]["the sides are identical"] == 2
    assert sum(figures["skipped"].values()) == 3
    assert "2 rows would be skipped: the sides are identical" in dpocli(*line).out
    assert tree(tmp_path) == before


def test_a_dry_run_of_rows_that_give_no_pair(tmp_path: Path, dpocli: Run) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [SKIPPED] * 3)
    line = ("precompute", "--model", MODEL, "--data", rows, "--out", tmp_path / "ref", "--dry-run")
    result = dpocli(*line, "--json")
    assert (result.json["pairs"], result.json["tokens"], result.json["bytes"]) == (0, 0, None)
    would, does = dpocli(*line), dpocli(*line[:-1])
    assert "3 rows would be skipped" in would.out
    assert result.code == would.code == does.code == 3
    assert "--dry-run: the run would stop: 3 of 3 rows give no pair" in would.err
    assert "; no pair is left." in would.err


@pytest.mark.parametrize("num_skipped", [2, 3])
def test_a_dry_run_ends_as_the_run_would_over_skipped_rows(num_skipped: int, tmp_path: Path, dpocli: Run) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS[:3], *[SKIPPED] * num_skipped])
    line = ("precompute", "--model", MODEL, "--data", rows, "--max-skipped", 0.45, "--out", tmp_path / "ref")
    would, does = dpocli(*line, "--dry-run", "--json"), dpocli(*line)
    assert would.code == does.code == (3 if num_skipped == 3 else 0)
    assert would.json["pairs"] == 3, "the report is there in any case"
    if num_skipped == 3:
        said = "3 of 6 rows give no pair (3 × the sides are identical); --max-skipped allows 45%. The first: "
        assert f"--dry-run: the run would stop: {said}" in would.err
        assert said in does.err
        assert would.err.endswith(f"error: {would.json['stops']}\n")
    else:
        assert would.json["stops"] is None


def test_only_what_is_missing_is_to_do(copy: Path, tmp_path: Path, dpocli: Run) -> None:
    min(copy.glob("rows-*")).unlink()
    before = tree(tmp_path)
    assert dpocli(*LINE, "--out", copy, "--dry-run", "--json").json["rows_to_do"] == 16
    assert dpocli(*LINE, "--out", copy, "--dry-run", "--json", "--shard", "1/2").json["rows_to_do"] == 0
    assert dpocli(*LINE, "--out", copy, "--dry-run", "--json", "--shard", "0/2").json["rows_to_do"] == 16
    assert tree(tmp_path) == before


def test_what_would_be_taken_over(cache: Path, tmp_path: Path, dpocli: Run) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS[:20], *map(json.loads, TRAIN.read_text().splitlines()[40:45])])
    before = tree(tmp_path, cache)
    line = ("precompute", "--model", MODEL, "--data", rows, "--reuse", cache, "--out", tmp_path / "ref", "--dry-run")
    figures = dpocli(*line, "--json").json
    assert (figures["pairs"], figures["reused_pairs"]) == (25, 20)
    assert "20 pairs would be taken over from --reuse" in dpocli(*line).out
    nothing_new = dpocli(*line, "--limit", 20, "--json").json
    assert (nothing_new["reused_pairs"], nothing_new["seconds"]) == (20, 0)
    assert nothing_new["bytes"] > 0
    assert tree(tmp_path, cache) == before


def test_a_dry_run_refuses_what_the_run_would_refuse(copy: Path, cache: Path, tmp_path: Path, dpocli: Run) -> None:
    before = tree(tmp_path, cache)
    other = dpocli(*LINE, "--out", copy, "--max-length", 60, "--dry-run")
    assert (other.code, "max_length: 2048 -> 60" in other.err) == (4, True)
    reuse = dpocli(*LINE, "--out", tmp_path / "new", "--dtype", "bfloat16", "--reuse", cache, "--dry-run")
    assert (reuse.code, "dtype: float32 -> bfloat16" in reuse.err) == (4, True)
    bad = write_rows(tmp_path / "bad.jsonl", [ROWS[0], {"prompt": "a"}])
    row = dpocli("precompute", "--model", MODEL, "--data", bad, "--out", tmp_path / "new", "--dry-run")
    assert (row.code, "bad.jsonl:2" in row.err) == (3, True)
    bad.unlink()
    assert tree(cache) == {path: value for path, value in before.items() if path in tree(cache)}
    assert not (tmp_path / "new").exists()


def test_large_data_are_sampled(tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precompute_report, "SAMPLED_ROWS", 24)
    monkeypatch.setattr(precompute_report, "NEIGHBOURS", 6)
    rows = write_rows(tmp_path / "rows.jsonl", [*ROWS[:2], SKIPPED] * 40)
    line = ("precompute", "--model", MODEL, "--data", rows, "--out", tmp_path / "ref", "--dry-run")
    figures = dpocli(*line, "--json").json
    assert (figures["is_exact"], figures["rows"], figures["rows_sampled"]) == (False, 120, 24)
    assert (figures["pairs"], figures["skipped"], figures["stops"]) == (80, {"the sides are identical": 40}, None)
    stopped = dpocli(*line, "--max-skipped", 0.3)
    assert stopped.code == 3
    assert "would probably stop, going by 24 rows encoded: 8 of 24 rows give no pair" in stopped.err
    monkeypatch.undo()
    exact = dpocli(*line, "--json").json
    assert (exact["is_exact"], exact["tokens"]) == (True, figures["tokens"])
    assert "from 24 rows encoded" not in dpocli(*line).out


@pytest.mark.parametrize("num_rows", [1, 63, 64, 65, 2048, 2049, 5000, 1_000_000])
def test_samples_are_spread_over_all_rows(num_rows: int) -> None:
    starts = list(precompute_report._starts(num_rows))
    covered = [row for start in starts for row in range(start, min(start + precompute_report.NEIGHBOURS, num_rows))]
    assert len(set(covered)) == len(covered) <= precompute_report.SAMPLED_ROWS
    assert starts[0] == 0
    assert max(covered) == num_rows - 1
    if num_rows <= precompute_report.SAMPLED_ROWS:
        assert len(covered) == num_rows
    gaps = np.diff(starts)
    assert all(abs(gap - gaps.mean()) < precompute_report.NEIGHBOURS for gap in gaps)


def test_the_dtype_of_a_cache_is_its_default(tmp_path: Path, dpocli: Run) -> None:
    """On a device with another default, the same command resumes and verifies."""
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 8, "--rows-per-part", 4, "--out", tmp_path)
    assert dpocli(*line, "--dtype", "bfloat16").code == 0
    assert dpocli(*line, "--verify", 4).code == 0
    result = dpocli(*line)
    assert result.code == 0, result.err
    assert "in bfloat16" in result.err


def test_a_dry_run_refuses_parts_of_another_size(copy: Path, dpocli: Run) -> None:
    result = dpocli(
        "precompute", "--model", MODEL, "--data", TRAIN, "--limit", 40, "--rows-per-part", 8, "--out", copy, "--dry-run"
    )
    assert result.code == 4
    assert "rows_per_part: 16 -> 8" in result.err


def test_what_is_no_cache_cannot_be_reused(tmp_path: Path, dpocli: Run) -> None:
    result = dpocli(*LINE, "--reuse", tmp_path / "nothing", "--out", tmp_path / "ref")
    assert result.code == 4
    assert f"--reuse {tmp_path / 'nothing'}: " in " ".join(result.err.split())
