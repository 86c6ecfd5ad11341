import os
import resource
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from dpocli.cache.reader import PairStore
from dpocli.cache.writer import CacheWriter
from dpocli.console.console import Console
from dpocli.data.preference import ReferenceLogps
from dpocli.errors import CacheError, DataError, NumericsError, ResourceError, UsageError
from dpocli.run.files import ABANDONED_HERE_SECONDS
from dpocli.run.output_check import check_destination
from tests.cache.frozen_cache_v1.make_frozen_cache import KEPT, fill, make_fingerprint, make_pair


def new_writer(directory, total_rows=10, rows_per_part=6, **settings):
    console, said = Console(), []
    console.warn = said.append
    return CacheWriter(directory, make_fingerprint(total_rows, rows_per_part, **settings), KEPT, console), said


def names(directory):
    return sorted(path.name for path in directory.iterdir())


def flip(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def test_workers_share_the_tiles_and_do_only_what_is_missing(tmp_path):
    writer, _ = new_writer(tmp_path, 50, 10)
    writer.check()
    first, second = writer.missing(0, 2), writer.missing(1, 2)
    assert [tile.index for tile in first] == [0, 2, 4]
    assert [tile.index for tile in second] == [1, 3]
    for tile in first:
        writer.write(tile, [make_pair(row) for row in range(tile.start, tile.stop)])
    assert writer.progress() == (3, 5)
    assert writer.missing(0, 2) == []
    assert writer.missing(0, 1) == second
    assert [footer.tile.index for footer in writer.footers()] == [0, 2, 4]


def test_the_order_of_pairs_in_a_call_does_not_matter(tmp_path):
    writer, _ = new_writer(tmp_path)
    writer.check()
    contents = []
    for pairs in ([make_pair(row) for row in range(6)], [make_pair(row) for row in reversed(range(6))]):
        writer.write(writer.tiles[0], pairs)
        contents.append((tmp_path / writer.tiles[0].file_name).read_bytes())
    assert contents[0] == contents[1]


def test_a_crash_while_writing_leaves_no_part_and_the_next_run_cleans_up(tmp_path):
    script = (
        "import os, sys, pathlib\n"
        "import dpocli.cache.part as module\n"
        "from tests.cache.frozen_cache_v1.make_frozen_cache import fill\n"
        "module._seal = lambda file: os._exit(9)\n"
        "fill(pathlib.Path(sys.argv[1]))\n"
    )
    assert subprocess.run([sys.executable, "-c", script, tmp_path]).returncode == 9
    (left,) = names(tmp_path)
    assert left.startswith(".rows-0000000000-0000000006.parquet~")
    long_ago = (tmp_path / left).stat().st_mtime - ABANDONED_HERE_SECONDS - 1
    os.utime(tmp_path / left, (long_ago, long_ago))
    fill(tmp_path)
    assert names(tmp_path) == ["rows-0000000000-0000000006.parquet", "rows-0000000006-0000000010.parquet"]


def test_other_settings_are_refused_with_the_fields(tmp_path):
    fill(tmp_path)
    writer, _ = new_writer(tmp_path, max_length=128)
    for refusing in (writer.check, writer.missing, writer.progress):
        with pytest.raises(
            CacheError,
            match=r"max_length: 64 -> 128 .\d+ of \d+ pairs are affected.* Give the settings .* another --out .with --reuse .*, or delete it",
        ):
            refusing()


def test_other_rows_per_part_are_refused(tmp_path):
    fill(tmp_path)
    with pytest.raises(CacheError, match="rows_per_part: 6 -> 5"):
        new_writer(tmp_path, 10, 5)[0].check()


def test_a_part_that_does_not_belong_is_refused(tmp_path):
    writer = fill(tmp_path)
    (tmp_path / writer.tiles[0].file_name).rename(tmp_path / "rows-0000000000-0000000007.parquet")
    with pytest.raises(CacheError, match=r"holds rows-0000000000-0000000007\.parquet, which is not a part of it"):
        writer.check()


def test_a_part_under_the_name_of_another_is_rewritten(tmp_path):
    fill(tmp_path, 12, 6)
    writer, said = new_writer(tmp_path, 12, 6)
    first, second = (tmp_path / tile.file_name for tile in writer.tiles)
    second.write_bytes(first.read_bytes())
    assert [tile.index for tile in writer.missing()] == [1]
    assert "it holds the rows 0 to 6" in said[0]


@pytest.mark.parametrize("position", [2, 700, -700, -3])
def test_a_damaged_part_is_reported_and_rewritten(tmp_path, position):
    fill(tmp_path)
    writer, said = new_writer(tmp_path)
    part = tmp_path / writer.tiles[1].file_name
    whole = part.read_bytes()
    flip(part, position)
    writer.check()
    assert writer.missing() == [writer.tiles[1]]
    assert part.name in said[0]
    assert "It is rewritten now" in said[0]
    fill(tmp_path)
    assert part.read_bytes() == whole


def test_log_probs_that_are_not_finite_are_refused_with_their_rows(tmp_path):
    writer, _ = new_writer(tmp_path)
    writer.check()
    pairs = [make_pair(row) for row in range(6)]
    for row, value in ((1, np.nan), (4, -np.inf)):
        bad = np.full(len(pairs[row].chosen_ids), value, np.float32)
        pairs[row] = replace(pairs[row], reference=ReferenceLogps(bad, pairs[row].reference.rejected))
    with pytest.raises(NumericsError, match=r"rows 1, 4\."):
        writer.write(writer.tiles[0], pairs)
    assert names(tmp_path) == []


def test_a_kept_column_of_several_types_is_refused(tmp_path):
    writer, _ = new_writer(tmp_path)
    writer.check()
    pairs = [make_pair(row) for row in range(6)]
    pairs[5] = replace(pairs[5], kept={"votes": "many"})
    with pytest.raises(DataError, match="Row 5: the kept column votes holds str here and int"):
        writer.write(writer.tiles[0], pairs)
    assert names(tmp_path) == []


def test_half_characters_do_not_stop_it(tmp_path):
    writer, _ = new_writer(tmp_path, 1, 6)
    writer.check()
    kept = {"origin": "\ud800", "extra": ["\ud800"]}
    writer.write(writer.tiles[0], [replace(make_pair(0), source="a\ud800", kept=kept)])
    (pair,) = PairStore.open(tmp_path).load([0])
    assert (pair.source, pair.kept["origin"], pair.kept["extra"]) == ("a?", "?", ["\ud800"])


@contextmanager
def file_size_limit(num_bytes):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_room_is_said_in_words_and_leaves_nothing(tmp_path):
    writer, _ = new_writer(tmp_path)
    writer.check()
    pairs = [make_pair(row) for row in range(6)]
    with file_size_limit(2000), pytest.raises(ResourceError, match=r"Writing .*rows-0000000000-.* failed: .*Make room"):
        writer.write(writer.tiles[0], pairs)
    assert names(tmp_path) == []


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["config.json", "model.safetensors"], "this is a model directory, not a reference cache"),
        (["model/", "status.json"], "this is the output directory of a run"),
        (["metrics.jsonl"], "this is the output directory of a run"),
        (["thesis.tex", "photo.jpg"], "it holds photo.jpg, thesis.tex, and no part of a reference cache"),
    ],
)
def test_a_directory_that_is_something_else_is_refused(tmp_path, files, words):
    for name in files:
        (tmp_path / name).mkdir() if name.endswith("/") else (tmp_path / name).touch()
    with pytest.raises(UsageError, match=words):
        new_writer(tmp_path)[0].check()


def test_what_precompute_itself_writes_is_not_in_the_way(tmp_path):
    for name in ("status-0-of-4.json", "config.yaml", ".status.lock", ".hashes.json", "slurm-17.out", "precompute.log"):
        (tmp_path / name).touch()
    new_writer(tmp_path)[0].check()
    check_destination(tmp_path / "not" / "there")


def test_a_file_in_place_of_the_directory(tmp_path):
    (tmp_path / "out").touch()
    with pytest.raises(UsageError, match="this is a file"):
        new_writer(tmp_path / "out")[0].check()
    with pytest.raises(UsageError):
        new_writer(tmp_path / "out" / "below")[0].prepare()


def test_two_writers_of_one_tile_leave_one_valid_part(tmp_path):
    writer, _ = new_writer(tmp_path, 6, 6)
    writer.check()
    other, _ = new_writer(tmp_path, 6, 6)
    pairs = [make_pair(row) for row in range(6)]
    writer.write(writer.tiles[0], pairs)
    other.write(other.tiles[0], pairs)
    assert len(PairStore.open(tmp_path)) == 6
