import json
import shutil
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpocli.cache import reader, row_groups, schema
from dpocli.cache.reader import PairStore
from dpocli.cache.writer import CacheWriter
from dpocli.data.preference import Skipped, SkipReason
from dpocli.errors import CacheError
from tests.cache.frozen_cache_v1.make_frozen_cache import REFERENCE, describe, fill, make_fingerprint, make_pair

FROZEN = Path(__file__).parent / "frozen_cache_v1"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    directory = tmp_path_factory.mktemp("cache")
    fill(directory, 300, 130, skipped_rows=(7, 131))
    return directory


@pytest.fixture
def directory(made, tmp_path):
    return Path(shutil.copytree(made, tmp_path / "ref"))


ROWS = [row for row in range(300) if row not in (7, 131)]


def parts(directory):
    return sorted(directory.glob("rows-*.parquet"))


def flip_a_log_prob(part, group):
    row_group = pq.read_metadata(part).row_group(group)
    columns = {
        row_group.column(place).path_in_schema: row_group.column(place) for place in range(row_group.num_columns)
    }
    column = columns["ref_chosen_token_logps.list.element"]
    content = bytearray(part.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    part.write_bytes(content)


def test_the_frozen_cache_of_format_1_reads_for_ever():
    store = PairStore.open(FROZEN)
    expected = json.loads((FROZEN / "expected.json").read_text(encoding="utf-8"))
    assert [describe(pair) for pair in store.load(range(len(store)))] == expected
    assert store.skipped == {"the sides are identical": 2}
    assert [skip.where for skip in store.skipped_rows] == ["prefs.jsonl:3", "prefs.jsonl:8"]
    assert store.fingerprint == make_fingerprint()
    assert store.columns.prompt_hashes[0] == 2**64 - 1


def test_round_trip(made):
    store = PairStore.open(made)
    assert (len(store), store.num_rows) == (298, 300)
    assert [describe(pair) for pair in store.load(range(298))] == [describe(make_pair(row)) for row in ROWS]
    assert store.has_reference


def test_small_columns(made):
    store, pairs = PairStore.open(made), [make_pair(row) for row in ROWS]
    columns = store.columns
    assert columns.rows.tolist() == ROWS
    assert columns.sources.tolist() == [pair.source for pair in pairs]
    assert store.weights.tolist() == [pair.weight for pair in pairs]
    assert columns.num_turns.tolist() == [pair.num_turns for pair in pairs]
    assert columns.truncated.tolist() == [pair.truncated for pair in pairs]
    assert [bytes(pair_id).hex() for pair_id in columns.pair_ids] == [pair.pair_id for pair in pairs]
    sums = np.array([pair.reference_sums for pair in pairs])
    np.testing.assert_array_equal(np.stack([columns.reference_chosen, columns.reference_rejected], axis=1), sums)
    longest = [len(pair.prompt_ids) + max(len(pair.chosen_ids), len(pair.rejected_ids)) for pair in pairs]
    assert store.pair_lengths.tolist() == longest
    assert store.counts["truncated"] == sum(pair.truncated for pair in pairs)


def test_any_order_with_repetitions_and_hardly_any_memory(made):
    store = PairStore.open(made, memory_bytes=1)
    order = np.random.default_rng(0).integers(0, len(store), 500)
    assert [pair.row for pair in store.load(order)] == [ROWS[index] for index in order]
    assert len(store._row_groups._groups) == 1
    assert store.load([]) == []


def test_row_groups_are_kept_within_the_bound(made):
    store = PairStore.open(made, memory_bytes=25_000)
    store.load(range(len(store)))
    assert 1 < len(store._row_groups._groups) < 6
    assert sum(group.num_bytes for group in store._row_groups._groups.values()) <= 25_000


def test_many_parts_share_few_open_files(tmp_path, monkeypatch):
    fill(tmp_path, 30, 3)
    monkeypatch.setattr(row_groups, "MAX_OPEN_PARTS", 2)
    store = PairStore.open(tmp_path)
    assert len(store.load(range(len(store)))) == len(store)
    assert len(store._row_groups._parts) == 2


def test_threads(made):
    store = PairStore.open(made, memory_bytes=1)
    wrong = []

    def work(seed):
        for index in np.random.default_rng(seed).integers(0, len(store), 60).tolist():
            wrong.extend(pair.row for pair in store.load([index]) if pair.row != ROWS[index])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_arrays_are_writable_and_their_own(made):
    store = PairStore.open(made)
    (first,) = store.load([0])
    first.chosen_ids[:] = 0
    assert store.load([0])[0].chosen_ids.all()


def test_positions_out_of_range(made):
    store = PairStore.open(made)
    for index in (-1, 298):
        with pytest.raises(IndexError):
            store.load([index])


def test_a_part_without_pairs(tmp_path):
    writer = CacheWriter(tmp_path, make_fingerprint(4, 2))
    writer.check()
    writer.write(writer.tiles[0], [], [Skipped(row, f"p:{row}", SkipReason.TOO_LONG) for row in (0, 1)])
    writer.write(writer.tiles[1], [make_pair(2), make_pair(3)])
    assert writer.missing() == []
    store = PairStore.open(tmp_path)
    assert [pair.row for pair in store.load([0, 1])] == [2, 3]
    assert store.skipped == {"longer than --max-length": 2}
    assert len(store.columns.prompt_hashes) == 2


def test_skipped_rows_are_counted_in_full_and_listed_in_part(tmp_path):
    writer = CacheWriter(tmp_path, make_fingerprint(1000, 1000))
    writer.check()
    skips = [Skipped(row, f"p:{row}", SkipReason.EMPTY) for row in range(1, 1000)]
    writer.write(writer.tiles[0], [make_pair(0)], skips)
    store = PairStore.open(tmp_path)
    assert store.skipped.total() == 999
    assert [skip.row for skip in store.skipped_rows] == list(range(1, 257))


def test_a_store_without_a_reference(tmp_path):
    fill(tmp_path, scored=False)
    store = PairStore.open(tmp_path)
    assert not store.has_reference
    assert all(pair.reference is None for pair in store.load(range(len(store))))
    assert pq.read_table(parts(tmp_path)[0])["ref_chosen_logps"].null_count == 5


def test_missing_directory(tmp_path):
    with pytest.raises(CacheError, match=r"There is no reference cache .*dpocli precompute --model REFERENCE"):
        PairStore.open(tmp_path / "ref")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ([], "is a directory without any part of one, not a reference cache"),
        (["config.json", "model.safetensors"], "is a model directory, not a reference cache"),
        (["metrics.jsonl", "config.yaml"], "is the output directory of a run, not a reference cache"),
    ],
)
def test_a_directory_that_is_no_cache(tmp_path, names, words):
    for name in names:
        (tmp_path / name).touch()
    with pytest.raises(CacheError, match=words):
        PairStore.open(tmp_path)


def test_incomplete(directory):
    first, second, _ = parts(directory)
    first.unlink()
    second.unlink()
    words = (
        f"incomplete: 2 of 3 parts are missing \\({first.name}, {second.name}\\). Run the command that made it again"
    )
    with pytest.raises(CacheError, match=words):
        PairStore.open(directory)


def test_a_truncated_part(directory):
    part = parts(directory)[1]
    part.write_bytes(part.read_bytes()[:5000])
    with pytest.raises(
        CacheError, match=rf"The part {part.name} .* is damaged: .* Run the command that made the cache again"
    ):
        PairStore.open(directory)


def test_a_flipped_byte_in_the_footer(directory):
    part = parts(directory)[2]
    content = bytearray(part.read_bytes())
    content[content.rindex(b"max_length")] ^= 1
    part.write_bytes(content)
    with pytest.raises(CacheError, match=f"{part.name} .* its footer has changed"):
        PairStore.open(directory)


def test_a_flipped_byte_among_the_tokens_is_found_when_they_are_read(directory):
    part = parts(directory)[0]
    flip_a_log_prob(part, group=1)
    store = PairStore.open(directory)
    store.load(range(64))
    with pytest.raises(CacheError, match=f"{part.name} .* row group 1 .* has changed"):
        store.load([64])


def test_a_flipped_byte_in_a_small_column_is_found_at_start(directory):
    part = parts(directory)[0]
    column = pq.read_metadata(part).row_group(0).column(1)
    content = bytearray(part.read_bytes())
    content[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(CacheError, match=part.name):
        PairStore.open(directory)


def test_a_part_that_changes_or_goes_while_it_is_used(directory, tmp_path):
    store = PairStore.open(directory)
    part = parts(directory)[0]
    fill(tmp_path / "other", 300, 130, skipped_rows=(8, 131))
    shutil.copy(tmp_path / "other" / part.name, part)
    with pytest.raises(CacheError, match="has changed since the cache was opened"):
        store.load([0])
    last = parts(directory)[-1]
    last.unlink()
    with pytest.raises(CacheError, match=f"{last.name} has disappeared"):
        store.load([297])


def test_a_byte_that_flips_after_its_row_group_was_read_once(directory):
    store = PairStore.open(directory, memory_bytes=1)
    store.load([0, 64])
    part = parts(directory)[0]
    flip_a_log_prob(part, group=0)
    with pytest.raises(CacheError, match=f"{part.name} .* row group 0 .* has changed"):
        store.load([0])


def test_a_part_that_changes_after_its_row_groups_were_read_once(directory, tmp_path, monkeypatch):
    monkeypatch.setattr(row_groups, "MAX_OPEN_PARTS", 1)
    store = PairStore.open(directory, memory_bytes=1)
    part, _, last = parts(directory)
    store.load([0, 64, 297])
    fill(tmp_path / "other", 300, 130, skipped_rows=(8, 131))
    shutil.copy(tmp_path / "other" / part.name, part)
    with pytest.raises(CacheError, match="row group 0 has changed since the cache was opened"):
        store.load([0])
    shutil.copy(tmp_path / "other" / last.name, last)  # rewritten with the original content
    assert store.load([297])[0].row == 299


def test_small_columns_are_read_once_from_each_row_group(made, monkeypatch):
    read = []
    monkeypatch.setattr(
        reader.PairColumns,
        "of",
        lambda table, of=reader.PairColumns.of: read.append(len(table)) or of(table),
    )
    store = PairStore.open(made, memory_bytes=1)
    read.clear()
    expected = [describe(pair) for pair in store.load([0, 64, 140])]
    assert [describe(pair) for pair in store.load([0, 64, 140])] == expected
    assert read == [64, 64, 64]


def test_a_part_of_another_run(directory, tmp_path):
    fill(tmp_path / "other", 300, 130, max_length=128)
    part = parts(directory)[1]
    shutil.copy(tmp_path / "other" / part.name, part)
    with pytest.raises(CacheError, match=f"{part.name} .* different settings: max_length: 64 -> 128. Remove the one"):
        PairStore.open(directory)


def test_a_part_too_many(directory):
    shutil.copy(parts(directory)[2], directory / "rows-0000000300-0000000340.parquet")
    with pytest.raises(CacheError, match=r"holds rows-0000000300-0000000340\.parquet, which is not a part of it"):
        PairStore.open(directory)


def test_a_part_under_the_name_of_another(directory):
    first, second, _ = parts(directory)
    shutil.copy(first, second)
    with pytest.raises(CacheError, match=f"{second.name} .* it holds the rows 0 to 130"):
        PairStore.open(directory)


def test_a_newer_format(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(schema, "FORMAT_VERSION", 2)
        fill(tmp_path)
    with pytest.raises(CacheError, match="has format 2"):
        PairStore.open(tmp_path)
    with pytest.raises(CacheError, match="has format 2"):
        fill(tmp_path)


def test_tokens_that_do_not_have_their_hash_are_refused(tmp_path):
    writer = CacheWriter(tmp_path, make_fingerprint(1, 1))
    writer.check()
    writer.write(writer.tiles[0], [replace(make_pair(0), pair_id="0" * 32)])
    with pytest.raises(CacheError, match="the tokens of row 0 do not match their pair_id"):
        PairStore.open(tmp_path).load([0])


def test_the_same_reference_is_told_from_another(tmp_path, made):
    fill(tmp_path / "held-out", 20, 10, max_length=32)
    PairStore.open(made).check_same_reference(PairStore.open(tmp_path / "held-out"))
    other = make_fingerprint(1, 1)
    other = replace(other, reference=replace(REFERENCE, weights={"model.safetensors": "c" * 64}))
    writer = CacheWriter(tmp_path / "other", other)
    writer.prepare()
    writer.write(writer.tiles[0], [make_pair(0)])
    with pytest.raises(CacheError, match=r"different references: weights: model\.safetensors differs"):
        PairStore.open(made).check_same_reference(PairStore.open(tmp_path / "other"))


def test_the_library_of_data_sets_reads_a_cache(made, tmp_path):
    datasets = pytest.importorskip("datasets")
    files = [str(part) for part in parts(made)]
    table = datasets.Dataset.from_parquet(files, cache_dir=str(tmp_path))
    assert table["row"][:3] == [0, 1, 2]
