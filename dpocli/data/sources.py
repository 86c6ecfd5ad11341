"""`--data` → raw rows: finds the files, counts and hashes them once, and reads any range of their rows."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpocli.config.options import DataOptions
from dpocli.data.formats import field_names, required_field_names
from dpocli.data.json_files import JsonLines, open_json
from dpocli.data.parquet_files import DatasetRows, Parquet
from dpocli.data.row_file import ContentPart, RawRow, RowFile
from dpocli.errors import DataError, UsageError

__all__ = ["ContentPart", "RawRow", "SourceRows", "open_rows"]

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")

_ACCEPTED = ".jsonl, .jsonl.gz, .json and .parquet files, a directory of them, or a data set in the datasets format"


@dataclass(frozen=True)
class SourceRows:
    """All rows of all files, in the order given, `--limit` applied."""

    files: tuple[RowFile, ...]
    num_rows: int

    @property
    def content(self) -> list[ContentPart]:
        """What the files hold, for the fingerprint."""
        return [file.content for file in self.files]

    def read(self, start: int, stop: int) -> Iterator[RawRow]:
        """Rows [start, stop), counted over all files. Ranges read one after another cost one pass over the files.

        Raises:
            DataError: a file is damaged, or changed since it was opened.
        """
        for file in self.files:
            first = max(start - file.first_row, 0)
            last = min(stop, self.num_rows) - file.first_row
            if first < min(last, file.num_rows):
                yield from file.read(first, min(last, file.num_rows))


def open_rows(options: DataOptions) -> SourceRows:
    """Find, count and hash what `--data` names: one pass over the bytes of every file.

    Raises:
        UsageError: there is no such file or data set, or none of a kind that can be read.
        DataError: a file is damaged or has no rows.
    """
    if not options.files:
        raise UsageError("--data: missing. Give the preference rows, for example --data prefs.jsonl.")
    files: list[RowFile] = []
    for name in options.files:
        first_row = files[-1].first_row + files[-1].num_rows if files else 0
        files += _open_named(name, options, first_row)
    if options.data_split != "train" and not any(isinstance(file, DatasetRows) for file in files):
        raise UsageError(
            f"--data-split {options.data_split}: only data sets in the datasets format have splits, and --data names "
            "files. Leave it out, or name the files of that split."
        )
    num_rows = files[-1].first_row + files[-1].num_rows
    return SourceRows(tuple(files), num_rows if options.limit is None else min(num_rows, options.limit))


def _open_named(name: str, options: DataOptions, first_row: int) -> list[RowFile]:
    path = Path(name)
    if path.is_dir():
        saved = (path / "dataset_dict.json").is_file() or (path / "state.json").is_file()
        files = [_open_saved(path, options, first_row)] if saved else _open_directory(path, options, first_row)
    elif path.exists():
        files = [_open_file(path, options, first_row)]
    elif _HUB_ID.fullmatch(name) and not _opener(path) and not path.parent.is_dir():
        files = [_open_hub(name, options, first_row)]
    else:
        raise UsageError(f"--data {name}: there is no such file or directory. It takes {_ACCEPTED}.")
    if not any(file.num_rows for file in files):
        raise DataError(f"{name}: holds no rows. Give a file with at least one preference.")
    return files


def _open_directory(directory: Path, options: DataOptions, first_row: int) -> list[RowFile]:
    files: list[RowFile] = []
    for path in sorted(directory.iterdir()):
        if path.is_file() and not path.name.startswith(".") and _opener(path):
            files.append(_open_file(path, options, first_row))
            first_row += files[-1].num_rows
    if not files:
        raise UsageError(
            f"--data {directory}: the directory holds no .jsonl, .jsonl.gz, .json or .parquet file (directories "
            "inside it are not searched). Name the directory that holds them."
        )
    return files


def _open_file(path: Path, options: DataOptions, first_row: int) -> RowFile:
    opener = _opener(path)
    if opener is None:
        raise UsageError(f"--data {path}: files of this kind are not read. It takes {_ACCEPTED}.")
    return opener(path, options, first_row)


def _opener(path: Path) -> Callable[[Path, DataOptions, int], RowFile] | None:
    name = path.name.lower()
    if name.endswith((".jsonl", ".jsonl.gz")):
        return lambda path, _, first_row: JsonLines(path, first_row)
    if name.endswith(".json"):
        return lambda path, _, first_row: open_json(path, first_row)
    if name.endswith(".parquet"):
        return lambda path, options, first_row: Parquet(
            path, first_row, field_names(options), required_field_names(options)
        )
    return None


def _open_saved(path: Path, options: DataOptions, first_row: int) -> RowFile:
    """What `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises errors of many kinds for damaged files
        raise DataError(
            f"{path}: the saved data set cannot be loaded ({_first_line(error)}). Save it again."
        ) from error
    if isinstance(loaded, datasets.DatasetDict):
        if options.data_split not in loaded:
            splits = ", ".join(map(str, loaded))
            raise UsageError(f"--data-split {options.data_split}: {path} has no such split; it has {splits}.")
        loaded = loaded[options.data_split]
    return _dataset_rows(path.name, loaded, options, first_row)


def _open_hub(name: str, options: DataOptions, first_row: int) -> RowFile:
    import datasets

    cache = None if options.scratch is None else str(options.scratch / "datasets")
    try:
        dataset = datasets.load_dataset(name, split=options.data_split, cache_dir=cache)
    except Exception as error:  # connection, permission, name, split: the library raises errors of many kinds
        raise UsageError(
            f"--data {name}: there is no such file or directory here, and no data set of that name could be loaded "
            f"from the hub (split {options.data_split}: {_first_line(error)}). Check the name and the connection, or "
            "download the files and name them."
        ) from error
    return _dataset_rows(name, dataset, options, first_row)


def _dataset_rows(name: str, dataset: Any, options: DataOptions, first_row: int) -> RowFile:
    return DatasetRows(name, dataset, first_row, field_names(options), required_field_names(options))


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
