"""What `precompute` says of the data at its end, and in `summary.json`."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from tests.commands.broken_inputs import ROW, SKIPPED
from tests.commands.conftest import MODEL, Run
from tests.support.caches import pairs_in, write_rows

OTHER = {"prompt": "And to drink?", "chosen": "Apple juice, a glass of it.", "rejected": "Ink."}
TURNED = ROW | {"chosen": ROW["rejected"], "rejected": ROW["chosen"]}


def test_each_finding_with_its_source_rows(tmp_path: Path, dpocli: Run) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [SKIPPED, ROW, OTHER, ROW, SKIPPED, TURNED])
    out = tmp_path / "ref"
    line = ("precompute", "--model", MODEL, "--data", rows, "--out", out, "--rows-per-part", 2, "--max-length", 16)
    result = dpocli(*line)
    assert result.code == 0, result.err
    pairs = pairs_in(out)
    assert [pair.row for pair in pairs] == [1, 2, 3, 5]
    cut = [pair.row for pair in pairs if pair.truncated]
    assert cut
    found = json.loads((out / "summary.json").read_text())["triage"]
    named = {finding["name"]: (finding["count"], finding["rows"]) for finding in found["findings"]}
    assert named == {"duplicates": (1, [3]), "contradictions": (3, [1, 3, 5]), "truncated": (len(cut), cut)}
    assert "  1 duplicates: source rows 3 (" in result.out
    assert "  3 contradictions: source rows 1, 3, 5 (" in result.out
    sums = [pair.reference_sums for pair in pairs]
    lengths = np.array([len(pair.chosen_ids) - len(pair.rejected_ids) for pair in pairs])
    assert found["reference_accuracy"] == np.mean([chosen > rejected for chosen, rejected in sums])
    assert found["pick_the_longer_accuracy"] == np.mean((lengths > 0) + 0.5 * (lengths == 0))
    assert found["median_length_difference"] == np.median(lengths)
    assert f"prefers the chosen side in {found['reference_accuracy']:.1%} of the pairs" in result.out
    assert f"the longer side is the chosen one in {found['pick_the_longer_accuracy']:.1%}" in result.out


def test_the_same_line_again_says_the_same(tmp_path: Path, dpocli: Run) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [ROW, OTHER, ROW])
    line = ("precompute", "--model", MODEL, "--data", rows, "--out", tmp_path / "ref", "--json")
    assert dpocli(*line).json["triage"] == dpocli(*line).json["triage"]


def test_a_cache_in_the_making_is_not_judged(tmp_path: Path, dpocli: Run) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [ROW, OTHER, ROW])
    line = ("precompute", "--model", MODEL, "--data", rows, "--out", tmp_path / "ref", "--rows-per-part", 1, "--json")
    assert "triage" not in dpocli(*line, "--shard", "0/2").json
    assert dpocli(*line, "--shard", "1/2").json["triage"]["pairs"] == 3


def test_a_listing_that_lags_does_not_spoil_the_end(
    tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows, out = write_rows(tmp_path / "rows.jsonl", [ROW, OTHER, ROW]), tmp_path / "ref"
    plain = os.listdir

    def before_the_parts(path: str | Path = ".") -> list[str]:
        names = plain(path)
        return [name for name in names if not name.startswith("rows-")] if Path(path) == out else names

    monkeypatch.setattr(os, "listdir", before_the_parts)
    result = dpocli("precompute", "--model", MODEL, "--data", rows, "--out", out, "--json")
    assert result.code == 0, result.err
    assert result.json["triage"]["pairs"] == 3
