"""The Parquet of a cache opens as it is in the tools that people have, with the right values and types."""

import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from dpocli.data.preference import EncodedPair
from tests.cache.frozen_cache_v1.make_frozen_cache import SKIPPED_ROWS, TOTAL_ROWS, fill, make_pair

ROWS = [row for row in range(TOTAL_ROWS) if row not in SKIPPED_ROWS]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cache") / "ref"
    fill(out)
    return out


@pytest.fixture(scope="module")
def parts(cache: Path) -> list[str]:
    """More than one."""
    names = [str(path) for path in sorted(cache.glob("rows-*.parquet"))]
    assert len(names) == 2
    return names


def expected(pair: EncodedPair) -> dict[str, object]:
    assert pair.reference is not None
    chosen, rejected = pair.reference_sums
    return {
        "row": pair.row,
        "pair_id": pair.pair_id,
        "source": pair.source,
        "weight": pair.weight,
        "num_turns": pair.num_turns,
        "prompt_tokens": len(pair.prompt_ids),
        "chosen_tokens": len(pair.chosen_ids),
        "rejected_tokens": len(pair.rejected_ids),
        "truncated": pair.truncated,
        "prompt_hash": pair.prompt_hash,
        "ref_chosen_logps": chosen,
        "ref_rejected_logps": rejected,
        "prompt_ids": pair.prompt_ids.tolist(),
        "chosen_ids": pair.chosen_ids.tolist(),
        "rejected_ids": pair.rejected_ids.tolist(),
        "chosen_mask": None if pair.chosen_mask is None else pair.chosen_mask.tolist(),
        "rejected_mask": None if pair.rejected_mask is None else pair.rejected_mask.tolist(),
        "ref_chosen_token_logps": pair.reference.chosen.tolist(),
        "ref_rejected_token_logps": pair.reference.rejected.tolist(),
        "origin": pair.kept["origin"],
        "votes": pair.kept["votes"],
        "score": pair.kept["score"],
        "checked": pair.kept["checked"],
        "extra": None if pair.kept["extra"] is None else json.dumps(pair.kept["extra"]),
    }


EXPECTED = [expected(make_pair(row)) for row in ROWS]


def plain(value: object) -> object:
    """Arrays as lists; what a tool has for a missing value as None."""
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, float) and np.isnan(value):
        return None
    return value.item() if isinstance(value, np.generic) else value


def assert_rows(rows: list[dict[str, object]]) -> None:
    assert [{name: plain(value) for name, value in row.items()} for row in rows] == EXPECTED


def test_the_values_are_those_of_plain_parquet(parts: list[str]) -> None:
    assert_rows([row for part in parts for row in pq.read_table(part).to_pylist()])


def test_datasets(parts: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    dataset = datasets.load_dataset("parquet", data_files=parts, split="train", cache_dir=str(tmp_path / "copy"))
    assert all(tmp_path in Path(file["filename"]).parents for file in dataset.cache_files), "no copy elsewhere"
    assert_rows(list(dataset))
    types = {name: str(getattr(feature, "dtype", "")) for name, feature in dataset.features.items()}
    assert {
        "row": "int64", "pair_id": "string", "weight": "float32", "num_turns": "int16", "prompt_tokens": "int32",
        "truncated": "bool", "prompt_hash": "uint64", "ref_chosen_logps": "float64", "votes": "int64", "extra": "string",
    }.items() <= types.items()  # fmt: skip
    inside = {
        name: dataset.features[name].feature.dtype for name in ("prompt_ids", "chosen_mask", "ref_chosen_token_logps")
    }
    assert inside == {"prompt_ids": "int32", "chosen_mask": "bool", "ref_chosen_token_logps": "float32"}


def test_datasets_streams_without_any_copy(parts: list[str], tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    streamed = datasets.load_dataset(
        "parquet", data_files=parts, split="train", streaming=True, cache_dir=str(tmp_path / "copy")
    )
    assert_rows(list(streamed))
    assert not list(tmp_path.rglob("*.arrow"))


def test_pandas(cache: Path, parts: list[str]) -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.concat([pandas.read_parquet(part) for part in parts], ignore_index=True)
    assert_rows(frame.to_dict("records"))
    types = ["row", "weight", "num_turns", "truncated", "prompt_hash", "ref_chosen_logps"]
    assert [str(frame[name].dtype) for name in types] == ["int64", "float32", "int16", "bool", "uint64", "float64"]
    assert frame["ref_chosen_token_logps"][0].dtype == np.float32
    sums = [logps.sum(dtype=np.float64) for logps in frame["ref_rejected_token_logps"][frame["rejected_mask"].isna()]]
    np.testing.assert_array_equal(sums, frame["ref_rejected_logps"][frame["rejected_mask"].isna()])
    together = pandas.read_parquet(parts, columns=["row"])
    assert together["row"].tolist() == ROWS


def test_duckdb(cache: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    with duckdb.connect(":memory:") as connection:
        found = connection.execute(f"select * from '{cache}/rows-*.parquet' order by row")
        names = [column[0] for column in found.description]
        assert_rows([dict(zip(names, values, strict=True)) for values in found.fetchall()])
        described = connection.execute(f"describe select * from '{cache}/rows-*.parquet'").fetchall()
        types = {name: str(kind) for name, kind, *_ in described}
        accuracy = connection.execute(
            f"select avg((ref_chosen_logps > ref_rejected_logps)::int) from '{cache}/rows-*.parquet'"
        ).fetchone()
    assert {
        "row": "BIGINT", "pair_id": "VARCHAR", "weight": "FLOAT", "num_turns": "SMALLINT", "truncated": "BOOLEAN",
        "prompt_hash": "UBIGINT", "ref_chosen_logps": "DOUBLE", "prompt_ids": "INTEGER[]", "chosen_mask": "BOOLEAN[]",
        "ref_chosen_token_logps": "FLOAT[]", "votes": "BIGINT", "extra": "VARCHAR",
    }.items() <= types.items()  # fmt: skip
    assert accuracy == (
        pytest.approx(np.mean([row["ref_chosen_logps"] > row["ref_rejected_logps"] for row in EXPECTED])),
    )


def test_polars(cache: Path) -> None:
    polars = pytest.importorskip("polars")
    frame = polars.scan_parquet(f"{cache}/rows-*.parquet").sort("row").collect()
    assert_rows(frame.to_dicts())
    assert {
        "row": polars.Int64, "pair_id": polars.String, "weight": polars.Float32, "num_turns": polars.Int16,
        "truncated": polars.Boolean, "prompt_hash": polars.UInt64, "ref_chosen_logps": polars.Float64,
        "prompt_ids": polars.List(polars.Int32), "chosen_mask": polars.List(polars.Boolean),
        "ref_chosen_token_logps": polars.List(polars.Float32), "votes": polars.Int64, "extra": polars.String,
    }.items() <= dict(frame.schema).items()  # fmt: skip
