"""Parquet files, and data sets in the `datasets` format."""

import hashlib
from bisect import bisect_right
from collections.abc import Generator, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dpocli.data.row_file import RawRow, RowFile, file_sha256
from dpocli.errors import DataError, brief_message

BATCH_ROWS = 256


class Parquet(RowFile):
    """A `.parquet` file. Only the columns that matter are read.

    Args:
        path: the file.
        first_row: index of its first row in the whole data set.
        columns: the columns to read where they exist.
        required: the columns that must exist; without one, all columns are read, so that the error can list them.
    """

    def __init__(self, path: Path, first_row: int, columns: Sequence[str], required: Sequence[str]):
        self._path = path
        try:
            with pq.ParquetFile(path) as file:
                metadata = file.metadata
                sizes: list[int] = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
                names = file.schema_arrow.names
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise self._damaged(error) from error
        self._columns = select_columns(names, columns, required)
        self._group_starts = list(accumulate(sizes, initial=0))[:-1]
        super().__init__(path.name, first_row, sum(sizes), file_sha256(path), path)

    def seek_point(self, row: int) -> int:
        return self._group_starts[bisect_right(self._group_starts, row) - 1]

    def items_from(self, seek_point: int) -> Generator[dict[str, Any], None, None]:
        first_group = bisect_right(self._group_starts, seek_point) - 1
        groups = list(range(first_group, len(self._group_starts)))
        try:
            with pq.ParquetFile(self._path) as file:
                for batch in file.iter_batches(BATCH_ROWS, row_groups=groups, columns=self._columns):
                    yield from batch.to_pylist()
        except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
            raise self._damaged(error) from error

    def to_row(self, row: int, item: dict[str, Any]) -> RawRow:
        return RawRow(self.first_row + row, f"{self.name}: row {row + 1}", item)

    def _damaged(self, error: Exception) -> DataError:
        return DataError(
            f"{self._path}: not a Parquet file that can be read ({brief_message(error)}). Copy or write it again."
        )


class DatasetRows(RowFile):
    """A `datasets.Dataset`, memory-mapped by that library. Columns are chosen as for `Parquet`."""

    def __init__(self, name: str, dataset: Any, first_row: int, columns: Sequence[str], required: Sequence[str]):
        self._dataset = dataset.select_columns(select_columns(dataset.column_names, columns, required))
        super().__init__(name, first_row, len(dataset), _dataset_sha256(dataset))

    def seek_point(self, row: int) -> int:
        return row

    def items_from(self, seek_point: int) -> Generator[dict[str, Any], None, None]:
        for start in range(seek_point, self.num_rows, BATCH_ROWS):
            columns = self._dataset[start : start + BATCH_ROWS]
            for values in zip(*columns.values(), strict=True):
                yield dict(zip(columns, values, strict=True))

    def to_row(self, row: int, item: dict[str, Any]) -> RawRow:
        return RawRow(self.first_row + row, f"{self.name}: row {row + 1}", item)


def select_columns(names: Sequence[str], wanted: Sequence[str], required: Sequence[str]) -> list[str]:
    """The wanted columns among `names`; all where a required one is missing, so that the error can list them."""
    if set(required) <= set(names):
        return [name for name in names if name in wanted]
    return list(names)


def _dataset_sha256(dataset: Any) -> str:
    """Hash of its split and its Arrow files, or of the library's fingerprint where it has no files."""
    files = [Path(file["filename"]) for file in dataset.cache_files]
    parts = [file_sha256(path) for path in files] or [dataset._fingerprint]
    parts.append(str(dataset.split))  # `train[10:20]` reads the same files
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
