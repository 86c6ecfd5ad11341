import errno
import os
import re
import socket
import subprocess
import sys

import pytest

from dpocli.errors import ResourceError, UsageError
from dpocli.run import files
from dpocli.run.files import read_json, remove_stale_temporaries, translating_file_errors, write_atomically, write_json


def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def leave_temporary(directory, host, pid, age):
    path = directory / f".part.parquet~{host}~{pid}~0badcafe.tmp"
    path.touch()
    os.utime(path, (path.stat().st_mtime - age,) * 2)
    return path


def test_content_in_every_form(tmp_path):
    for content in ("naïve", "naïve".encode(), lambda file: file.write("naïve".encode())):
        write_atomically(tmp_path / "file", content)
        assert (tmp_path / "file").read_text(encoding="utf-8") == "naïve"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    def fail(file):
        file.write(b"half")
        raise KeyboardInterrupt

    write_atomically(tmp_path / "file", "before")
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", fail)
    assert (tmp_path / "file").read_text() == "before"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_file_and_directory_are_synced_before_and_after_the_new_name(tmp_path, monkeypatch):
    events = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append((tmp_path / "file").exists()))
    write_atomically(tmp_path / "file", "content")
    assert events == [False, True]


def test_the_temporary_name_says_who_writes(tmp_path):
    seen = []
    write_atomically(tmp_path / "file", lambda file: seen.extend(os.listdir(tmp_path)))
    assert re.fullmatch(rf"\.file~{re.escape(files._host())}~{os.getpid()}~[0-9a-f]{{8}}\.tmp", seen[0])


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.ENOSPC, ResourceError, "no space left on device. Make room"),
        (errno.EDQUOT, ResourceError, "quota exceeded. Make room"),
        (errno.EACCES, UsageError, "permission denied. Use a directory"),
        (errno.EROFS, UsageError, "read-only file system. Use a directory"),
        (errno.ENOTDIR, UsageError, "not a directory. Check the path"),
        (errno.EIO, ResourceError, "input/output error. This comes from the file system"),
    ],
)
def test_errors_of_the_system_in_words(number, kind, words):
    with pytest.raises(kind, match=f"Writing ref failed: .*{words}"), translating_file_errors("Writing ref"):
        raise OSError(number, os.strerror(number))


def test_stale_temporaries_of_the_dead_go_and_others_stay(tmp_path):
    here, dead, alive = files._host(), dead_pid(), os.getpid()
    gone = [
        leave_temporary(tmp_path, here, dead, files.ABANDONED_HERE_SECONDS + 1),
        leave_temporary(tmp_path, "node-17", 1, files.ABANDONED_ELSEWHERE_SECONDS + 1),
    ]
    kept = [
        leave_temporary(tmp_path, here, dead + 10**9, 0),
        leave_temporary(tmp_path, here, alive, files.ABANDONED_HERE_SECONDS + 1),
        leave_temporary(tmp_path, "node-17", 2, files.ABANDONED_HERE_SECONDS + 1),
        tmp_path / ".something-else.tmp",
        tmp_path / "rows.parquet",
    ]
    for path in kept[3:]:
        path.touch()
    assert sorted(remove_stale_temporaries(tmp_path)) == sorted(gone)
    assert sorted(tmp_path.iterdir()) == sorted(kept)


def test_host_names_cannot_break_the_temporary_name(tmp_path, monkeypatch):
    monkeypatch.setattr(socket, "gethostname", lambda: "a~b/c d")
    write_atomically(tmp_path / "file", "content")
    assert files._host() == "a-b-c-d"


def test_json(tmp_path):
    write_json(tmp_path / "file.json", {"path": "caf\udce9"})
    assert read_json(tmp_path / "file.json") == {"path": "caf\udce9"}
    (tmp_path / "file.json").write_bytes(b'{"half": \xff')
    assert read_json(tmp_path / "file.json") is None
    assert read_json(tmp_path / "missing.json") is None
