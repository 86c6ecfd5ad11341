"""What a finished cache says about the data: every finding from pairs made by hand, named by their source rows."""

import hashlib
import json

import numpy as np
import pytest

from dpocli.cache import data_report
from dpocli.cache.data_report import FAR, MAX_ROWS, DataReport
from dpocli.cache.reader import PairStore
from dpocli.cache.writer import CacheWriter
from dpocli.data.pair_tokens import pair_id
from dpocli.data.preference import EncodedPair, ReferenceLogps, Skipped, SkipReason
from tests.cache.frozen_cache_v1.make_frozen_cache import make_fingerprint

load = PairStore.load


def tokens(text):
    return np.array([*text.encode()], np.int32)


def pair(
    row, prompt="Why?", chosen="yes", rejected="no", *, chosen_logps=None, rejected_logps=None, masks=(None, None),
    prompt_ids=None, truncated=False,
):  # fmt: skip
    """A token a letter, each of log-prob -1 unless said otherwise."""
    sides = tokens(chosen), tokens(rejected)
    given = chosen_logps, rejected_logps
    logps = [np.full(len(side), -1 if one is None else one, np.float32) for side, one in zip(sides, given, strict=True)]
    ids = tokens(prompt if prompt_ids is None else prompt_ids)
    return EncodedPair(
        row=row,
        pair_id=pair_id(ids, *sides, *masks),
        prompt_ids=ids,
        chosen_ids=sides[0],
        rejected_ids=sides[1],
        chosen_mask=masks[0],
        rejected_mask=masks[1],
        truncated=truncated,
        prompt_hash=int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "little"),
        reference=ReferenceLogps(*logps),
    )


def of_margin(row, margin):
    return pair(row, f"prompt {row}", "a", "b", chosen_logps=margin - 50, rejected_logps=-50)


@pytest.fixture
def looked_at(tmp_path):
    """The report on a cache of these pairs; rows that none of them has were skipped."""

    def look(pairs, rows_per_part=4):
        total = max(pair.row for pair in pairs) + 1
        writer = CacheWriter(tmp_path, make_fingerprint(total, rows_per_part))
        writer.check()
        for tile in writer.tiles:
            rows = range(tile.start, tile.stop)
            present = {pair.row: pair for pair in pairs if pair.row in rows}
            skipped = [Skipped(row, f"f:{row}", SkipReason.EMPTY) for row in rows if row not in present]
            writer.write(tile, list(present.values()), skipped)
        return DataReport.of(PairStore.open(tmp_path))

    return look


def findings(result):
    return {finding.name: (finding.count, finding.rows) for finding in result.findings}


def test_accuracies_and_lengths_by_hand(looked_at):
    result = looked_at(
        [
            pair(0, "0", "aa", "bbbb"),  # -2 against -4; -1 against -1 per token; the chosen side is the shorter
            pair(1, "1", "aaaa", "b", chosen_logps=-0.5),  # -2 against -1; -0.5 against -1; longer
            pair(2, "2", "aaa", "bbb", rejected_logps=-2),  # -3 against -6; -1 against -2; as long
            pair(3, "3", "aa", "bbb", chosen_logps=-2),  # -4 against -3; -2 against -1; shorter
            pair(4, "4", "a", "bbbbb"),  # -1 against -5; -1 against -1; shorter
        ]
    )
    assert result.pairs == 5
    assert result.reference_accuracy == pytest.approx(3 / 5)
    assert result.pick_the_longer_accuracy == pytest.approx((1 + 0.5) / 5)
    assert result.median_length_difference == -1
    assert result.findings == ()


def test_ordinary_pairs_give_no_finding(looked_at):
    result = looked_at([of_margin(row, margin=row % 5) for row in range(12)])
    assert result.findings == ()
    assert json.loads(json.dumps(result.to_json())) == result.to_json() | {"findings": []}


def test_duplicates_are_the_repeats_by_their_source_rows(looked_at):
    same = {"prompt": "Why?", "chosen": "so", "rejected": "not so"}
    result = looked_at(
        [pair(1, **same), pair(2, "When?"), pair(5, **same), pair(6, "Who?"), pair(9, **same)]
    )  # rows 0, 3, 4, 7 and 8 were skipped
    assert findings(result) == {"duplicates": (2, (5, 9))}


def test_the_same_tokens_with_other_masks_are_no_duplicate(looked_at):
    masked = np.array([False, True, True]), None
    assert findings(looked_at([pair(0), pair(1, masks=masked)])) == {}


@pytest.mark.parametrize("pairs_at_once", [1, 3, 4096])
def test_contradictions_are_both_rows(looked_at, monkeypatch, pairs_at_once):
    monkeypatch.setattr(data_report, "PAIRS_AT_ONCE", pairs_at_once)
    result = looked_at(
        [
            pair(1, "Tea?", "yes", "no"),
            pair(3, "Tea?", "yes", "perhaps"),  # another pair of answers
            pair(4, "Cake?", "yes", "no"),
            pair(6, "Rain?", "no", "yes"),  # the other way round, but to another prompt
            pair(8, "Tea?", "no", "yes"),
        ]
    )
    assert findings(result) == {"contradictions": (2, (1, 8))}


def test_answers_of_one_length_contradict_each_other_but_not_themselves(looked_at):
    result = looked_at([pair(0, "Tea?", "yes", "nay"), pair(1, "Cake?", "yes", "nay"), pair(3, "Tea?", "nay", "yes")])
    assert findings(result) == {"contradictions": (2, (0, 3))}


def test_tokens_are_read_only_where_lengths_allow_a_contradiction(looked_at, monkeypatch):
    read = []
    monkeypatch.setattr(PairStore, "load", lambda _, positions: read.extend(positions) or load(_, positions))
    looked_at(
        [
            pair(0, "Tea?", "yes", "nay"),  # of one length, but nobody else is
            pair(1, "Tea?", "yes", "no"),
            pair(2, "Tea?", "yes", "so"),  # the same lengths, the same way round
            pair(3, "Cake?", "certainly", "no"),
            pair(4, "Cake?", "no", "by no means"),
            pair(5, "Rain?", "oh", "heaven"),
            pair(6, "Rain?", "sunday", "so"),  # these two could be
        ]
    )
    assert read == [5, 6]


def test_a_contradiction_counts_every_pair_that_takes_part(looked_at):
    result = looked_at([pair(0), pair(2), pair(7, chosen="no", rejected="yes")])
    assert findings(result) == {"duplicates": (1, (2,)), "contradictions": (3, (0, 2, 7))}


def test_the_other_preference_under_another_system_prompt_is_no_contradiction(looked_at):
    brief = pair(0, "Tea?", "yes", "yes, please, with milk", prompt_ids="Be brief. Tea?")
    polite = pair(1, "Tea?", "yes, please, with milk", "yes", prompt_ids="Be polite. Tea?")
    assert findings(looked_at([brief, polite])) == {}


def test_truncated_pairs_are_all_counted_and_the_first_listed(looked_at):
    num_truncated = MAX_ROWS + 5
    pairs = [pair(row, f"prompt {row}", truncated=row >= 3) for row in range(3 + num_truncated)]
    assert findings(looked_at(pairs)) == {"truncated": (num_truncated, tuple(range(3, 3 + MAX_ROWS)))}


def test_extreme_margins_the_most_extreme_first(looked_at):
    ordinary = [of_margin(row, margin=row % 5 - 2) for row in range(1, 24)]  # median 0, a median deviation of 1
    far = 1.4826 * FAR
    extreme = [of_margin(24, far + 0.5), of_margin(26, far - 0.5), of_margin(29, -far - 2)]
    assert findings(looked_at([*ordinary, *extreme])) == {"extreme reference margins": (2, (29, 24))}


def test_margins_that_are_nearly_all_equal_are_not_called_extreme(looked_at):
    assert findings(looked_at([of_margin(row, margin=0) for row in range(9)])) == {}


def test_every_finding_says_what_it_means(looked_at):
    pairs = [pair(0), pair(1), pair(2, chosen="no", rejected="yes"), pair(3, "Tea?", truncated=True)]
    result = looked_at(pairs)
    assert len(result.findings) == 3
    assert all(len(finding.meaning) > 20 for finding in result.findings)
