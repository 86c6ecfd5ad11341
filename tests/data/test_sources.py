import gzip
import hashlib
import json
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpocli.config.options import DataOptions
from dpocli.data.json_files import CHUNK_CHARACTERS
from dpocli.data.row_file import RowFile
from dpocli.data.sources import RawRow, SourceRows, open_rows
from dpocli.errors import DataError, UsageError


def row(index: int) -> dict[str, Any]:
    return {"prompt": f"p{index}", "chosen": f"c{index} ä", "rejected": "r" * (index % 7)}


def write_jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in rows), encoding="utf-8")
    return path


def write_gzip(path: Path, rows: list[Any]) -> Path:
    path.write_bytes(gzip.compress(b"".join(json.dumps(item).encode() + b"\n" for item in rows)))
    return path


def write_json(path: Path, rows: list[Any]) -> Path:
    path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    return path


def write_parquet(path: Path, rows: list[Any]) -> Path:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100)
    return path


WRITERS = {"x.jsonl": write_jsonl, "x.jsonl.gz": write_gzip, "x.json": write_json, "x.parquet": write_parquet}
formats = pytest.mark.parametrize("name", WRITERS)


def rows_of(*paths: Path | str, **values: Any) -> SourceRows:
    return open_rows(DataOptions(data=[str(path) for path in paths]).model_copy(update=values))


def read_all(rows: SourceRows) -> list[RawRow]:
    return list(rows.read(0, rows.num_rows))


@formats
def test_every_format_reads_any_range(tmp_path: Path, name: str) -> None:
    written = [row(index) for index in range(700)]
    path = WRITERS[name](tmp_path / name, written)
    rows = rows_of(path)
    assert rows.num_rows == 700
    assert rows.content[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert rows.content[0].name == name
    for start, stop in [(0, 700), (0, 10), (300, 310), (690, 700), (255, 258), (99, 101), (5, 5), (400, 401)]:
        read = list(rows.read(start, stop))
        assert [dict(item.fields or {}) for item in read] == written[start:stop]
        assert [item.row for item in read] == list(range(start, stop))


@formats
def test_reading_may_stop_anywhere_and_go_on(tmp_path: Path, name: str) -> None:
    rows = rows_of(WRITERS[name](tmp_path / name, [row(index) for index in range(600)]))
    reader = rows.read(0, 600)
    assert [next(reader).row for _ in range(3)] == [0, 1, 2]
    assert [item.row for item in rows.read(3, 6)] == [3, 4, 5]
    assert [item.row for item in rows.read(1, 3)] == [1, 2]


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.json", "x.parquet"])
def test_tiles_read_in_order_cost_one_pass(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / name
    if name == "x.parquet":
        pq.write_table(pa.Table.from_pylist([row(index) for index in range(600)]), path)  # one row group
    else:
        WRITERS[name](path, [row(index) for index in range(600)])
    rows = rows_of(path)
    opened = []
    file_class = type(rows.files[0])
    original: Callable[..., Any] = file_class.items_from
    monkeypatch.setattr(file_class, "items_from", lambda self, at: opened.append(at) or original(self, at))
    for start in range(0, 600, 50):
        assert len(list(rows.read(start, start + 50))) == 50
    assert opened == [0]


def test_rows_count_over_all_files_and_limit_cuts(tmp_path: Path) -> None:
    first = write_jsonl(tmp_path / "b.jsonl", [row(0), row(1)])
    second = write_parquet(tmp_path / "a.parquet", [row(2), row(3), row(4)])
    rows = rows_of(first, second, limit=4)
    assert rows.num_rows == 4
    assert [(item.row, item.where) for item in rows.read(0, 100)] == [
        (0, "b.jsonl:1"),
        (1, "b.jsonl:2"),
        (2, "a.parquet: row 1"),
        (3, "a.parquet: row 2"),
    ]
    assert [part.num_rows for part in rows.content] == [2, 3]


def test_a_directory_is_read_by_name_whatever_is_in_it(tmp_path: Path) -> None:
    for index, name in enumerate(WRITERS):
        WRITERS[name](tmp_path / f"{index}{name}", [row(index)])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    rows = rows_of(tmp_path)
    assert [dict(item.fields or {}) for item in read_all(rows)] == [row(index) for index in range(4)]


def test_blank_lines_are_no_rows_but_count_as_lines(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf\n{"a": 1}\r\n   \n\n{"a": 2}')
    rows = rows_of(path)
    assert [(item.where, item.fields) for item in read_all(rows)] == [("x.jsonl:2", {"a": 1}), ("x.jsonl:5", {"a": 2})]


@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, name: str) -> None:
    path = WRITERS[name](tmp_path / name, [row(0)])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_all(rows_of(path))[0].fields == row(0)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b'{"a": 1', "column 8: not JSON"),
        (b'{"a": "\xff"}', "column 8: byte 0xff is not UTF-8"),
        (b"[1, 2]", "found list; if the file is one JSON list, name it .json"),
        (b"3", "found int"),
        (b'{"a": "\\ud83d x"}', "\\ud83d is half of a character"),
        (b"[" * 100_000, "not JSON"),
    ],
)
def test_a_line_that_cannot_be_read_is_a_row_with_a_problem(tmp_path: Path, line: bytes, words: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"a": "\\ud83d\\ude00"}\n' + line + b'\n{"a": 3}\n')
    good, bad, after = read_all(rows_of(path))
    assert good.fields == {"a": "😀"}
    assert bad.fields is None
    assert bad.where == "x.jsonl:2"
    assert words in str(bad.problem)
    assert after.fields == {"a": 3}


def test_elements_of_a_json_list_that_are_no_objects_are_rows_with_a_problem(tmp_path: Path) -> None:
    rows = rows_of(write_json(tmp_path / "x.json", [row(0), 12, "text", [row(1)], row(2)]))
    assert [item.problem is None for item in read_all(rows)] == [True, False, False, False, True]


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    assert read_all(rows_of(write_jsonl(tmp_path / "x.json", [row(0), row(1)])))[1].where == "x.json:2"


def test_json_elements_larger_than_the_buffer(tmp_path: Path) -> None:
    written = [{"a": "x\n" * CHUNK_CHARACTERS}, {"a": 1}, {"a": "é" * CHUNK_CHARACTERS}]
    assert [item.fields for item in read_all(rows_of(write_json(tmp_path / "x.json", written)))] == written


@pytest.mark.parametrize("text", ["[]", " [ ]\n", "", "\n\n"])
def test_no_rows(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError, match=r"x\.json: holds no rows"):
        rows_of(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[{"a": 1}, {"a": ', "cut off after 1 whole rows"),
        ('[{"a": 1}, {"a": "unfinished', "cut off after 1 whole rows"),
        ('[{"a": 1}', "cut off after 1 whole rows"),
        ('[{"a": 1},', "cut off after 1 whole rows"),
        ('[{"a": 1}, tru', "cut off"),
        (
            '[{"a": 1},\n {"a": 2},\n]\n',
            ":3: column 1: there is a comma before this closing bracket (after 2 whole rows)",
        ),
        ('[{"a": 1},]', ":1: column 11: there is a comma before this closing bracket"),
        ('[{"a": 1},,]', ":1: column 11: Expecting value"),
        ('[{"a": 1}, {"a": 1,}]', ":1: column "),
        ('[{"a": 1}, x]', ":1: column 12: Expecting value"),
        ('[{"a": 1}\n {"a": 2}]' + " " * 20, ":2: column 2: ',' or ']' is expected"),
        ('[{"a": 1},\n {"a": nothing at all}]' + " " * 20, ":2: column 8: Expecting value"),
        ('[{"a": 1}] []', "something follows the list"),
        ('"text"', "a JSON list of rows is expected"),
    ],
)
def test_a_damaged_json_list_names_the_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        rows_of(path)
    assert "x.json" in str(caught.value)
    assert words in str(caught.value)


def test_a_json_list_that_is_not_utf_8(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(DataError, match="not UTF-8"):
        rows_of(tmp_path / "x.json")


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-12], lambda data: data[:40] + b"??" + data[42:], lambda _: b"no"]
)
def test_damaged_gzip(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_gzip(tmp_path / "x.jsonl.gz", [row(index) for index in range(100)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"x\.jsonl\.gz: the gzip data is damaged"):
        rows_of(path)


@pytest.mark.parametrize("damage", [lambda data: data[:-100], lambda _: b"PAR1 no PAR1", lambda _: b""])
def test_damaged_parquet(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_parquet(tmp_path / "x.parquet", [row(index) for index in range(100)])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(DataError, match=r"x\.parquet: not a Parquet file that can be read"):
        rows_of(path)


def test_damage_inside_a_parquet_file_shows_when_it_is_read(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "x.parquet", [{"chosen": f"{index}" * 50} for index in range(1000)])
    data = bytearray(path.read_bytes())
    data[2000:4000] = bytes(2000)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"x\.parquet: not a Parquet file that can be read"):
        read_all(rows_of(path))


def test_parquet_gives_python_values_and_only_the_columns_that_matter(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "name": "x"}]
    written = {"chosen": messages, "rejected": messages, "weight": 2.0, "embedding": [1.0, 2.0], "id": 7}
    path = write_parquet(tmp_path / "x.parquet", [written])
    fields = read_all(rows_of(path, keep_columns=["id"]))[0].fields
    assert fields is not None
    assert set(fields) == {"chosen", "rejected", "weight", "id"}
    assert fields["chosen"][1] == {"role": "assistant", "content": None, "name": "x"}
    assert set(read_all(rows_of(path, chosen_field="good"))[0].fields or {}) == set(written)


def test_a_file_that_changes_while_it_is_read(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row(0), row(1)])
    rows = rows_of(path)
    write_jsonl(path, [row(0)])
    with pytest.raises(DataError, match=r"x\.jsonl: changed while it was being read"):
        read_all(rows)


@pytest.mark.parametrize("name", ["missing.jsonl", "missing/", "org/missing.jsonl", "/no/such/place/data"])
def test_a_missing_path(name: str) -> None:
    with pytest.raises(UsageError, match="there is no such file or directory"):
        rows_of(name)


def test_files_of_another_kind(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b")
    with pytest.raises(UsageError, match=r"x\.csv: files of this kind are not read"):
        rows_of(tmp_path / "x.csv")
    with pytest.raises(UsageError, match=r"holds no \.jsonl"):
        rows_of(tmp_path)


def test_a_file_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_jsonl(tmp_path / "x.jsonl", [row(0)])

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("io.FileIO", refuse)
    with pytest.raises(UsageError, match=r"x\.jsonl: cannot be read: Permission denied"):
        rows_of(path)


def test_a_split_of_plain_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="only data sets in the datasets format have splits"):
        rows_of(write_jsonl(tmp_path / "x.jsonl", [row(0)]), data_split="test")


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    import datasets

    whole = datasets.Dataset.from_list([row(index) for index in range(600)])
    datasets.DatasetDict({"train": whole, "test": whole.select(range(5))}).save_to_disk(str(tmp_path / "both"))
    whole.save_to_disk(str(tmp_path / "one"))
    return tmp_path


def test_saved_data_sets(saved: Path) -> None:
    rows = rows_of(saved / "one")
    assert [dict(item.fields or {}) for item in rows.read(254, 260)] == [row(index) for index in range(254, 260)]
    assert next(iter(rows.read(3, 4))).where == "one: row 4"
    assert rows_of(saved / "both").num_rows == 600
    assert rows_of(saved / "both", data_split="test").num_rows == 5
    with pytest.raises(UsageError, match="has no such split; it has train, test"):
        rows_of(saved / "both", data_split="validation")


def test_the_same_data_set_has_the_same_hash_wherever_it_lies(saved: Path) -> None:
    first = rows_of(saved / "one").content[0].sha256
    (saved / "one").rename(saved / "moved")
    assert rows_of(saved / "moved").content[0].sha256 == first
    assert rows_of(saved / "both", data_split="test").content[0].sha256 != first


def test_a_hub_data_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    asked: dict[str, Any] = {}

    def load(name: str, **values: Any) -> Any:
        asked.update(values, name=name)
        return datasets.Dataset.from_list([row(0), row(1)])

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = rows_of("some-org/prefs", data_split="test", scratch=tmp_path)
    assert asked == {"name": "some-org/prefs", "split": "test", "cache_dir": str(tmp_path / "datasets")}
    assert [item.where for item in read_all(rows)] == ["some-org/prefs: row 1", "some-org/prefs: row 2"]


def test_a_hub_data_set_that_cannot_be_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def load(name: str, **values: Any) -> Any:
        raise ConnectionError("Couldn't reach the hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(UsageError) as caught:
        rows_of("some-org/prefs")
    assert "some-org/prefs" in str(caught.value)
    assert "Couldn't reach the hub)" in str(caught.value)


@pytest.mark.parametrize("name", ["x.jsonl", "x.json", "x.jsonl.gz"])
def test_memory_does_not_grow_with_the_rows(tmp_path: Path, name: str) -> None:
    peaks = []
    for num_rows in (4_000, 20_000):
        path = WRITERS[name](
            tmp_path / name, [{"chosen": "c" * 200, "rejected": str(index)} for index in range(num_rows)]
        )
        tracemalloc.start()
        rows = rows_of(path)
        assert sum(1 for _ in rows.read(0, num_rows)) == num_rows
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < peaks[0] + 500_000


def test_opened_files_are_row_files(tmp_path: Path) -> None:
    assert all(isinstance(file, RowFile) for file in rows_of(write_jsonl(tmp_path / "x.jsonl", [row(0)])).files)


def test_importing_the_data_floor_pulls_in_nothing_heavy() -> None:
    code = (
        "import sys, dpocli.data.encoder; print([m for m in ('torch', 'transformers', 'datasets') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
