import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpocli.cache import schema as cache_format
from dpocli.cache.kept_columns import is_json, kept_types
from dpocli.cache.part import open_part
from dpocli.cache.schema import DamagedPartError, NewerFormatError, Tile, cache_schema, kept_columns, tiles
from dpocli.errors import UsageError
from tests.cache.frozen_cache_v1.make_frozen_cache import KEPT, fill

CONTRACT = {
    "row": "int64",
    "pair_id": "string",
    "source": "string",
    "weight": "float",
    "num_turns": "int16",
    "prompt_ids": "list<int32>",
    "chosen_ids": "list<int32>",
    "rejected_ids": "list<int32>",
    "chosen_mask": "list<bool>",
    "rejected_mask": "list<bool>",
    "ref_chosen_token_logps": "list<float>",
    "ref_rejected_token_logps": "list<float>",
    "ref_chosen_logps": "double",
    "ref_rejected_logps": "double",
}


@pytest.fixture
def part(tmp_path):
    fill(tmp_path, 200, 200, skipped_rows=(3,))
    return tmp_path / "rows-0000000000-0000000200.parquet"


def type_name(kind):
    return f"list<{kind.value_type}>" if pa.types.is_list(kind) else str(kind)


def test_tiles_are_at_multiples_and_the_last_is_short():
    assert tiles(10, 4) == [Tile(0, 0, 4), Tile(1, 4, 8), Tile(2, 8, 10)]
    assert tiles(8, 4)[-1].file_name == "rows-0000000004-0000000008.parquet"
    assert tiles(0, 4) == []


def test_the_columns_are_those_of_the_contract(part):
    schema = pq.read_schema(part)
    columns = {column.name: type_name(column.type) for column in schema}
    assert CONTRACT.items() <= columns.items()
    assert columns.keys() - CONTRACT.keys() == {
        "prompt_tokens",
        "chosen_tokens",
        "rejected_tokens",
        "truncated",
        "prompt_hash",
        *KEPT,
    }


def test_any_reader_of_parquet_reads_a_part(part):
    table = pq.read_table(part)
    assert table["row"].to_pylist() == [row for row in range(200) if row != 3]
    assert table["prompt_tokens"].to_pylist() == [len(ids) for ids in table["prompt_ids"].to_pylist()]
    assert table["chosen_mask"].null_count == len([row for row in table["row"].to_pylist() if row % 3])


def test_row_groups_compression_and_page_checksums(part):
    metadata = pq.ParquetFile(part).metadata
    assert [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)] == [64, 64, 64, 7]
    assert {metadata.row_group(0).column(column).compression for column in range(metadata.num_columns)} == {"ZSTD"}
    content = bytearray(part.read_bytes())
    ids = metadata.row_group(1).column(pq.ParquetFile(part).schema.names.index("prompt_hash") + 3)
    content[ids.data_page_offset + ids.total_compressed_size - 2] ^= 1
    part.write_bytes(content)
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(part, page_checksum_verification=True).read()


def test_the_footer_is_json_under_the_key_dpocli(part):
    footer = json.loads(pq.read_metadata(part).metadata[b"dpocli"])
    assert footer["format"] == 1
    assert footer["tile"] == {"index": 0, "start": 0, "stop": 200}
    assert (footer["total_rows"], footer["num_pairs"]) == (200, 199)
    assert footer["skipped"] == {"the sides are identical": 1}
    assert footer["skipped_rows"][0]["where"] == "prefs.jsonl:4"
    assert footer["fingerprint"]["settings"]["max_length"] == 64


def test_what_a_footer_says_comes_back(part):
    footer = open_part(part).footer
    assert footer == type(footer).from_json(footer.to_json().encode())
    assert footer.counts["truncated"] == 40


def test_a_newer_format_is_told_from_damage(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(cache_format, "FORMAT_VERSION", 2)
        fill(tmp_path)
    with pytest.raises(NewerFormatError, match=r"has format 2; this dpocli reads formats up to 1\. Update dpocli"):
        open_part(tmp_path / "rows-0000000000-0000000006.parquet")


def test_a_part_that_another_tool_rewrote_is_damaged(part):
    pq.write_table(pq.read_table(part), part)
    with pytest.raises(DamagedPartError, match="carries no digests"):
        open_part(part)


def test_every_byte_is_guarded(tmp_path):
    fill(tmp_path, 3, 3, skipped_rows=())
    part = next(tmp_path.glob("rows-*"))
    content = bytearray(part.read_bytes())
    for position in range(0, len(content), 17):
        content[position] ^= 1 << position % 8
        part.write_bytes(content)
        with pytest.raises(DamagedPartError):
            open_part(part).check()
        content[position] ^= 1 << position % 8


@pytest.mark.parametrize("keep", [0, 3, 8, 100, -1, -9, -2000])
def test_a_truncated_part_is_damaged(part, keep):
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(DamagedPartError, match=part.name):
        open_part(part)


def test_types_of_kept_columns():
    rows = [
        {"a": 1, "b": True, "c": "x", "d": 1, "e": None, "f": [1], "g": 1, "h": 2**70},
        {"a": 2.5, "b": None, "c": "y", "d": 2, "e": None, "f": {}, "g": "1"},
    ]
    assert kept_types(rows, list("abcdefgh")) == {
        "a": "float",
        "b": "bool",
        "c": "string",
        "d": "int",
        "e": "string",
        "f": "json",
        "g": "json",
        "h": "json",
    }
    fields = kept_columns(cache_schema({"f": "json", "c": "string"}))
    assert {field.name: is_json(field) for field in fields} == {"f": True, "c": False}


def test_a_kept_column_may_not_have_the_name_of_another():
    with pytest.raises(UsageError, match="--keep-columns prompt_ids: the cache has a column of that name"):
        cache_schema({"prompt_ids": "string"})
