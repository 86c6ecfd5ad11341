"""Old caches as a source of log-probs: found by the pair's id, and only where the reference is the same."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dpocli.cache.reuse import Reusable
from dpocli.cache.writer import CacheWriter
from dpocli.data.preference import ReferenceLogps
from dpocli.errors import CacheError
from tests.cache.frozen_cache_v1.make_frozen_cache import (
    KEPT,
    REFERENCE,
    SKIPPED_ROWS,
    fill,
    make_fingerprint,
    make_pair,
)
from tests.support.caches import tree

ROWS = [row for row in range(10) if row not in SKIPPED_ROWS]


def unscored(row):
    return make_pair(row, scored=False)


def assert_taken_over(pair, row):
    expected = make_pair(row).reference
    assert pair.reference.chosen.tobytes() == expected.chosen.tobytes()
    assert pair.reference.rejected.tobytes() == expected.rejected.tobytes()


def with_values(pair, value):
    return replace(
        pair,
        reference=ReferenceLogps(
            np.full(len(pair.chosen_ids), value, np.float32), np.full(len(pair.rejected_ids), value, np.float32)
        ),
    )


@pytest.fixture
def write(tmp_path):
    """A cache of these pairs under a name; gives its directory."""

    def write_pairs(name, pairs):
        writer = CacheWriter(tmp_path / name, make_fingerprint(len(pairs), 6), KEPT)
        writer.prepare()
        for tile in writer.tiles:
            writer.write(tile, [replace(pairs[row], row=row) for row in range(tile.start, tile.stop)])
        return tmp_path / name

    return write_pairs


def test_values_are_found_by_id_in_any_order(tmp_path):
    fill(tmp_path)
    reusable = Reusable.open([tmp_path], make_fingerprint())
    wanted = [9, 2, 0, 40, 5]
    found = reusable.fill_in([unscored(row) for row in wanted])
    assert [pair.row for pair in found] == wanted
    for pair in found:
        if pair.row in ROWS:
            assert_taken_over(pair, pair.row)
        else:
            assert pair.reference is None


def test_only_the_log_probs_are_taken_over(tmp_path):
    fill(tmp_path)
    new = replace(unscored(4), row=77, source="elsewhere", weight=3.0, truncated=True, kept={"votes": 1}, prompt_hash=5)
    (found,) = Reusable.open([tmp_path], make_fingerprint()).fill_in([new])
    assert_taken_over(found, 4)
    assert replace(found, reference=None) == new


def test_one_pair_many_times(tmp_path):
    fill(tmp_path)
    found = Reusable.open([tmp_path], make_fingerprint()).fill_in([unscored(3), unscored(3), unscored(3)])
    for pair in found:
        assert_taken_over(pair, 3)


@pytest.mark.parametrize("caches", [0, 1])
def test_no_pairs(tmp_path, caches):
    fill(tmp_path)
    assert Reusable.open([tmp_path] * caches, make_fingerprint()).fill_in([]) == []


def test_without_old_caches_nothing_is_known():
    (pair,) = Reusable([]).fill_in([unscored(0)])
    assert pair.reference is None


def test_the_first_cache_that_has_a_pair_gives_it(write):
    first = write("first", [with_values(make_pair(row), -1) for row in range(4)])
    second = write("second", [with_values(make_pair(row), -2) for row in range(2, 8)])
    for directories, expected in (([first, second], [-1, -1, -2, None]), ([second, first], [-1, -2, -2, None])):
        found = Reusable.open(directories, make_fingerprint()).fill_in([unscored(row) for row in (0, 3, 6, 20)])
        assert [pair.reference and float(pair.reference.chosen[0]) for pair in found] == expected


def test_what_is_scored_already_stays(tmp_path):
    fill(tmp_path)
    given = with_values(make_pair(4), -7)
    (found,) = Reusable.open([tmp_path], make_fingerprint()).fill_in([given])
    assert found is given


def store_of(*pair_ids):
    """A store of pairs with ids that no tokens have."""
    bits = np.frombuffer(bytes.fromhex("".join(pair_ids)), np.uint8).reshape(-1, 16)
    pairs = [with_values(replace(make_pair(0), pair_id=name), -1 - at) for at, name in enumerate(pair_ids)]
    return SimpleNamespace(
        columns=SimpleNamespace(pair_ids=bits), load=lambda positions: [pairs[at] for at in positions]
    )


HALF = "a" * 16
ZERO, MIDDLE, LAST = "0" * 32, "8" + "0" * 31, "f" * 32


@pytest.mark.parametrize(
    ("stored", "asked", "found"),
    [
        ([HALF + f"{1:016x}"], [HALF + f"{1:016x}", HALF + f"{2:016x}"], [-1, None]),
        ([LAST], [ZERO, MIDDLE, LAST], [None, None, -1]),
        ([ZERO], [LAST, MIDDLE, ZERO], [None, None, -1]),
        ([MIDDLE], [ZERO, MIDDLE, LAST], [None, -1, None]),
        ([LAST, ZERO, MIDDLE, ZERO], [ZERO, MIDDLE, LAST], [-2, -3, -1]),
    ],
    ids=["half an id", "the last", "the first", "the middle one", "in no order, one twice"],
)
def test_ids_are_found_by_all_their_bits(stored, asked, found):
    pairs = Reusable([store_of(*stored)]).fill_in([replace(unscored(0), pair_id=name) for name in asked])
    assert [pair.reference and float(pair.reference.chosen[0]) for pair in pairs] == found


def test_an_incomplete_cache_gives_what_it_has(tmp_path):
    writer = fill(tmp_path)
    (tmp_path / writer.tiles[0].file_name).unlink()
    found = Reusable.open([tmp_path], make_fingerprint()).fill_in([unscored(row) for row in ROWS])
    assert [pair.row for pair in found if pair.reference] == [row for row in ROWS if row >= 6]


def changed(dtype="float32", **of_reference):
    return replace(make_fingerprint(), dtype=dtype, reference=replace(REFERENCE, **of_reference))


DECIDE = [
    ({"dtype": "bfloat16"}, "dtype: float32 -> bfloat16"),
    ({"weights": {"model.safetensors": "c" * 64}}, "weights: model.safetensors differs"),
    ({"config": {"model_type": "llama", "hidden_size": 9}}, "config.json: hidden_size: 8 -> 9"),
    ({"code": {"modeling.py": "d" * 64}}, "code: modeling.py is new"),
    ({"adapter": {"r": 8}}, "adapter: null -> "),
    ({"quantization": "nf4"}, "quantization: null -> nf4"),
]


@pytest.mark.parametrize(("change", "words"), DECIDE, ids=[name for change, _ in DECIDE for name in change])
def test_what_decides_values_must_be_equal(tmp_path, change, words):
    fill(tmp_path)
    with pytest.raises(CacheError, match=rf"--reuse .*{words}.*Leave it out"):
        Reusable.open([tmp_path], changed(**change))


def test_everything_that_differs_is_said_at_once(tmp_path):
    fill(tmp_path)
    other = changed("bfloat16", quantization="int8", weights={"model.safetensors": "c" * 64})
    with pytest.raises(CacheError, match=r"weights: .*; quantization: .*; dtype: "):
        Reusable.open([tmp_path], other)


def test_what_only_decides_tokens_may_differ(tmp_path):
    fill(tmp_path)
    wanted = make_fingerprint(500, 50, max_length=9, truncation="drop")
    wanted = replace(wanted, tokenizer=replace(wanted.tokenizer, chat_template={}), content=(), information={})
    (found,) = Reusable.open([tmp_path], wanted).fill_in([unscored(0)])
    assert_taken_over(found, 0)


def test_pairs_that_no_reference_scored_are_refused(tmp_path):
    fill(tmp_path, scored=False)
    with pytest.raises(CacheError, match="reference: none -> a model"):
        Reusable.open([tmp_path], make_fingerprint())


def test_a_cache_that_is_not_there(tmp_path):
    with pytest.raises(CacheError, match="There is no reference cache"):
        Reusable.open([tmp_path / "none"], make_fingerprint())


def test_a_damaged_value_is_never_taken_over(tmp_path):
    writer = fill(tmp_path)
    part = tmp_path / writer.tiles[1].file_name
    content = bytearray(part.read_bytes())
    content[part.stat().st_size // 3] ^= 1
    part.write_bytes(content)
    with pytest.raises(CacheError, match=rf"{part.name} .*is damaged"):
        Reusable.open([tmp_path], make_fingerprint()).fill_in([unscored(row) for row in ROWS])


def test_old_caches_are_only_read(tmp_path):
    fill(tmp_path)
    before = tree(tmp_path)
    Reusable.open([tmp_path], make_fingerprint()).fill_in([unscored(row) for row in range(20)])
    assert tree(tmp_path) == before
