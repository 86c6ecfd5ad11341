"""The pairs that a report shows: the right ones, whole, each token with what it did to the reward."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from dpocli.cache.reader import PairStore
from dpocli.commands import example_pairs
from dpocli.commands.example_pairs import ends, example_tokens
from dpocli.data.detokenize import decoded
from dpocli.errors import ResourceError
from dpocli.report.html import write_html_report
from dpocli.report.token_heatmap import ExamplePairs, ExampleToken
from tests.commands.conftest import HELD_OUT, MODEL, Run, pictures, quiet
from tests.commands.ranks import ended
from tests.data.tokenizers_for_tests import byte_level
from tests.support.html_pages import Page

BETA = 0.1


@pytest.fixture(scope="module")
def trained(cache: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is no longer its reference."""
    out = tmp_path_factory.mktemp("trained") / "run"
    line = ("--learning-rate", "1e-3", "--batch-size", 10, "--max-steps", 3)
    quiet("train", "--model", MODEL, "--reference", cache, "--out", out, *line)
    return out / "model"


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[ExamplePairs]]:
    """What evaluate found to show."""
    found: list[ExamplePairs] = []
    monkeypatch.setattr(example_pairs, "write_html_report", lambda *arguments: found.append(arguments[3]))
    return found


def total(tokens: tuple[ExampleToken, ...]) -> float:
    return sum(token.log_ratio for token in tokens if token.scored)


def test_the_worst_and_the_best_are_shown_and_their_tokens_add_up(
    trained: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run, shown: list[ExamplePairs]
) -> None:
    out = tmp_path / "report"
    line = ("evaluate", "--model", trained, "--reference", held_out_cache, "--out", out, "--show-pairs", 4)
    result = dpocli(*line)
    assert result.code == 0, result.err
    (found,) = shown
    table = pq.read_table(out / "pairs.parquet").to_pandas().sort_values("margins", kind="stable")
    assert [pair.row for pair in found.worst] == table["row"].tolist()[:4]
    assert [pair.row for pair in found.best] == table["row"].tolist()[::-1][:4]
    assert found.has_reference
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    store = PairStore.open(held_out_cache)
    encoded = {pair.row: pair for pair in store.load(range(len(store)))}
    for pair in found.pairs:
        assert BETA * total(pair.chosen) == pytest.approx(pair.chosen_reward, abs=1e-4)
        assert BETA * total(pair.rejected) == pytest.approx(pair.rejected_reward, abs=1e-4)
        assert pair.chosen_reward - pair.rejected_reward == pytest.approx(pair.margin)
        original = encoded[pair.row]
        assert pair.prompt == decoded(tokenizer, original.prompt_ids.tolist())
        for tokens, ids in ((pair.chosen, original.chosen_ids), (pair.rejected, original.rejected_ids)):
            assert "".join(token.text for token in tokens) == decoded(tokenizer, ids.tolist())


def test_without_a_reference_tokens_hold_log_probs(tmp_path: Path, dpocli: Run, shown: list[ExamplePairs]) -> None:
    line = ("evaluate", "--model", MODEL, "--data", HELD_OUT, "--limit", 6, "--loss", "cpo", "--show-pairs", 1)
    result = dpocli(*line, "--out", tmp_path / "report")
    assert result.code == 0, result.err
    (found,) = shown
    assert not found.has_reference
    for pair in found.pairs:
        assert total(pair.chosen) < 0
        assert BETA * total(pair.chosen) == pytest.approx(pair.chosen_reward, abs=1e-4)


def test_no_pairs_are_scored_where_none_are_wanted(
    held_out_cache: Path, tmp_path: Path, dpocli: Run, shown: list[ExamplePairs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(example_pairs, "reference_logps", None)
    line = ("evaluate", "--model", MODEL, "--reference", held_out_cache, "--show-pairs", 0)
    assert dpocli(*line, "--out", tmp_path / "report").code == 0
    assert shown[0].pairs == ()


@pytest.mark.parametrize(
    ("pairs", "count", "worst", "best"),
    [(7, 2, [0, 1], [6, 5]), (3, 2, [0, 1], [2]), (1, 5, [0], []), (2, 5, [0], [1]), (5, 0, [], [])],
)
def test_no_pair_is_shown_twice(pairs: int, count: int, worst: list[int], best: list[int]) -> None:
    found = ends(np.arange(pairs) / 10, count)
    assert [places.tolist() for places in found] == [worst, best]


def test_tokens_of_one_character_are_one_and_only_counted_ones_add_up() -> None:
    tokenizer = byte_level()
    ids = np.array(tokenizer.encode("a👍b", add_special_tokens=False), dtype=np.int32)
    mask = np.array([False, True, True, False, True, True])
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])
    assert example_tokens(tokenizer, ids[:0], ids, mask, values) == (
        ExampleToken("a", 1.0, scored=False),
        ExampleToken("👍", 22.0, scored=True),
        ExampleToken("b", 32.0, scored=True),
    )


def test_the_report_is_written(trained: Path, held_out_cache: Path, tmp_path: Path, dpocli: Run) -> None:
    out = tmp_path / "report"
    with pictures():
        result = dpocli("evaluate", "--model", trained, "--reference", held_out_cache, "--out", out, shorten=False)
    assert result.code == 0, result.err
    assert "could not be made" not in result.err
    page = Page((out / "report.html").read_text(encoding="utf-8"))
    assert {"headline", "figures", "pairs", "made"} <= set(page.ids)
    assert page.tags.count("article") == 20
    assert PairStore.open(held_out_cache).fingerprint.digest in page.text
    assert (out / "plots" / "margins.png").is_file()


def test_a_report_that_fails_loses_no_figures(
    held_out_cache: Path, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(example_pairs, "write_html_report", broken)
    line = ("evaluate", "--model", MODEL, "--reference", held_out_cache, "--out")
    result = dpocli(*line, tmp_path / "report")
    assert result.code == 0
    assert "report.html could not be made (RuntimeError: no font)" in result.err
    assert json.loads((tmp_path / "report" / "metrics.json").read_text())["pairs"] == 24

    def full(*_: object) -> None:
        raise ResourceError("No room.")

    monkeypatch.setattr(example_pairs, "write_html_report", full)
    assert dpocli(*line, tmp_path / "full").code == 7
    assert not (tmp_path / "full" / "metrics.json").exists()


def draw_too(_: int) -> None:
    """In a process of its own, which draws nothing because of the tests."""
    example_pairs.write_html_report = write_html_report


@pytest.mark.slow
@pytest.mark.parametrize(("count", "how"), [(2, ()), (2, ("--shards", 2)), (4, ("--shards", 2))])
def test_several_processes_show_the_same(
    trained: Path, held_out_cache: Path, tmp_path: Path, count: int, how: tuple[object, ...], dpocli: Run
) -> None:
    line = ("evaluate", "--model", trained, "--reference", held_out_cache, "--show-pairs", 3, "--out")
    with pictures():
        assert dpocli(*line, tmp_path / "one").code == 0
    codes, said = ended(count, *line, tmp_path / "several", *how, prepare=draw_too)
    assert codes == [0] * count, said
    one, several = (Page((tmp_path / name / "report.html").read_text(encoding="utf-8")) for name in ("one", "several"))
    rows = [re.findall(r"row (\d+)", page.text) for page in (one, several)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 6
    assert json.loads((tmp_path / "several" / "status.json").read_text())["state"] == "done"
