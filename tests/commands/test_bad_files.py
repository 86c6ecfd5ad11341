"""A corpus of files that are wrong in one way each: exit code, words, the place, and nothing written."""

import os
from pathlib import Path

import pytest

from tests.commands.bad_files import BAD_FILES, DONE, BadFile
from tests.commands.conftest import MODEL, Run

LONGEST_MESSAGE = 700


def test_there_are_sixty_files_and_each_has_a_name_of_its_own() -> None:
    assert sum(file.code != DONE for file in BAD_FILES) >= 60
    assert len({file.name for file in BAD_FILES}) == len(BAD_FILES)
    assert all(file.words for file in BAD_FILES)


@pytest.mark.parametrize("file", BAD_FILES, ids=lambda file: file.name)
def test_a_bad_file(file: BadFile, tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    path, out = file.make(tmp_path), tmp_path / "ref"
    result = dpocli("precompute", "--model", MODEL, "--data", path, "--out", out, "--json", *file.options)
    assert result.code == file.code, result.err
    assert "Traceback" not in result.err
    if file.code == DONE:
        assert all(word in result.out for word in file.words), result.out
        return
    assert result.out == ""
    _, error, message = result.err.partition("error: ")
    assert error
    assert len(message.replace(str(tmp_path), "")) < LONGEST_MESSAGE
    for word in file.words:
        assert word in message
    assert not list(out.glob("rows-*"))
    assert not out.exists() or not [name for name in os.listdir(out) if name.endswith(".tmp")]
