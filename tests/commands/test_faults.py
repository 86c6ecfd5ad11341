"""Whatever happens to a cache and those who fill it: no wrong value, no traceback, and the same line mends it."""

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dpocli.cache import writer
from dpocli.cache.part import open_part
from dpocli.cache.writer import CacheWriter
from dpocli.commands.reference import Reference
from dpocli.data.encoder import Encoder
from dpocli.errors import CacheError
from dpocli.run.directory import RunDirectory
from dpocli.run.files import ABANDONED_HERE_SECONDS
from dpocli.run.status import StatusFile
from tests.caches import content_of, pairs_in, parts_of, tree
from tests.commands.conftest import HELD_OUT, MODEL, ROOT, TRAIN, Run, quiet
from tests.commands.warm_workers import BEGUN, WRITTEN, Tally, Worker

KILLS = int(os.environ.get("DPOCLI_TEST_KILLS", "50"))
WORKERS, KILLS_A_CACHE = 4, 14
ROWS, ROWS_PER_PART = 400, 2
NOBODY = 65534

LINE = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", 48, "--rows-per-part", 2)
NUM_PARTS = 24
DONE, USAGE, CACHE, RESOURCES, PREEMPTED = 0, 2, 4, 7, 75


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `LINE` gives where nothing happens."""
    out = tmp_path_factory.mktemp("undisturbed") / "ref"
    quiet(*LINE, "--out", out)
    return out


@pytest.fixture
def ref(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, for something to happen to."""
    return Path(shutil.copytree(whole, tmp_path / "ref"))


@pytest.fixture
def same_line(dpocli: Run, whole: Path) -> Callable[[Path], str]:
    """Runs the line on a directory where something happened: it ends well, with the undisturbed content. What it says."""

    def run(out: Path) -> str:
        result = dpocli(*LINE, "--out", out)
        assert result.code == DONE, result.err
        assert "Traceback" not in result.err
        assert set(parts_of(out)) == set(parts_of(whole))
        assert content_of(out) == content_of(whole)
        return result.err

    return run


def part_names(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.glob("rows-*"))


def temporaries(cache: Path) -> list[Path]:
    return sorted(cache.glob(".*.tmp"))


def age(paths: list[Path], seconds: float) -> None:
    for path in paths:
        os.utime(path, (time.time() - seconds,) * 2)


def assert_refused(result: Any, code: int, *words: object) -> None:
    assert result.code == code, result.err
    assert "Traceback" not in result.err
    for word in words:
        assert str(word) in result.err


# killed


@pytest.mark.slow
def test_random_kills_cost_open_tiles_and_nothing_else(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """DPOCLI_TEST_KILLS says how many at least."""
    seed = random.randrange(2**32)
    chance = random.Random(seed)
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", ROWS, "--rows-per-part", ROWS_PER_PART)
    undisturbed, tally = tmp_path / "undisturbed", Tally(tmp_path / "undisturbed.tally")
    assert Worker.start([*line, "--out", undisturbed], tmp_path / "undisturbed.log", tally).end() == DONE
    assert tally.rows(BEGUN) == tally.rows(WRITTEN) == ROWS
    expected, names = content_of(undisturbed), part_names(undisturbed)
    kills = starts = caches = lost = redone = twice = 0
    while kills < KILLS:
        out, log = tmp_path / f"cache-{caches}", tmp_path / f"cache-{caches}.log"
        tally = Tally(tmp_path / f"cache-{caches}.tally")
        planned = min(KILLS_A_CACHE, KILLS - kills)
        killed, started = filled_by_workers_that_are_killed([*line, "--out", out], log, tally, chance, planned)
        kills, starts, caches = kills + killed, starts + started, caches + 1
        there = part_names(out)
        for name in there:
            open_part(out / name).check()
        lost_here = tally.lost_tiles(there)
        # Nobody disturbs this one.
        assert Worker.start([*line, "--out", out], log, tally).end() == DONE, log.read_text()
        assert part_names(out) == names
        assert content_of(out) == expected
        redone += tally.rows(BEGUN) - ROWS
        lost, twice = lost + lost_here, twice + len(tally.events(BEGUN)) - lost_here - len(names)
        said = log.read_text()
        assert "Traceback" not in said
        assert "damaged" not in said
        age(temporaries(out), ABANDONED_HERE_SECONDS + 1)
        quiet(*line, "--out", out)
        assert not temporaries(out)
    with capfd.disabled():
        print(
            f"\n{kills} kills among {starts} workers, {WORKERS} at once, on {caches} caches of {len(names)} parts (seed {seed}): "
            f"no part lost that was there, {lost} open ones thrown away, {redone:,} of {caches * ROWS:,} rows scored again, "
            f"{twice} parts made twice."
        )


def filled_by_workers_that_are_killed(
    line: list[object], log: Path, tally: Tally, chance: random.Random, planned: int
) -> tuple[int, int]:
    """Number of kills, and of workers started. At the end all that are left are killed; some of the cache is there."""
    out = Path(str(line[-1]))
    enough = chance.uniform(0.4, 0.95) * ROWS / ROWS_PER_PART
    moments = sorted(chance.uniform(1, enough) for _ in range(planned - WORKERS))  # in parts that are there
    workers: list[Worker] = []
    kills = starts = 0
    there: set[str] = set()
    while len(there) < enough or moments:
        while len(workers) < WORKERS:
            share = ["--shard", f"{chance.randrange(WORKERS)}/{WORKERS}"] if chance.random() < 0.4 else []
            workers.append(Worker.start([*line, *share], log, tally))
            starts += 1
        if moments and len(there) >= moments[0]:
            moments.pop(0)
            time.sleep(chance.uniform(0, 0.1))
            kills += workers.pop(chance.randrange(WORKERS)).end(signal.SIGKILL) == -signal.SIGKILL
        for worker in [worker for worker in workers if not worker.is_alive]:
            workers.remove(worker)
            assert worker.end() == DONE, log.read_text()
        now = set(part_names(out))
        assert there <= now, "a part that was there is gone"
        there = now
        time.sleep(0.003)
    kills += sum(worker.end(signal.SIGKILL) == -signal.SIGKILL for worker in workers)
    return kills, starts


@pytest.mark.slow
def test_sigterm_at_random_moments(tmp_path: Path) -> None:
    """75, whether the work has begun or not; a process that is only being forked is ended by the signal."""
    line = ("precompute", "--model", MODEL, "--data", TRAIN, "--limit", ROWS, "--rows-per-part", ROWS_PER_PART)
    out, log, tally = tmp_path / "ref", tmp_path / "log", Tally(tmp_path / "tally")
    chance = random.Random()
    codes = []
    for _ in range(8):
        worker = Worker.start([*line, "--out", out], log, tally)
        time.sleep(chance.uniform(0.0, 1.0))
        codes.append(worker.end(signal.SIGTERM))
        assert not temporaries(out)
    assert set(codes) <= {PREEMPTED, -signal.SIGTERM, DONE}, log.read_text()
    assert Worker.start([*line, "--out", out], log, tally).end() == DONE
    undisturbed = tmp_path / "undisturbed"
    assert Worker.start([*line, "--out", undisturbed], log, tally).end() == DONE
    assert content_of(out) == content_of(undisturbed)
    assert "Traceback" not in log.read_text()


# asked to stop


def on_call(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, number: int, act: Callable[[], None]) -> None:
    """Something happens when a method is called for the `number`th time."""
    method, calls = getattr(owner, name), iter(range(1, 10**9))

    def watched(self: object, *arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            act()
        return method(self, *arguments, **named)

    monkeypatch.setattr(owner, name, watched)


@pytest.mark.parametrize(
    ("owner", "name", "number"),
    [(Reference, "complete", 1), (Reference, "complete", 5), (CacheWriter, "write", 3), (Encoder, "_render", 9)],
    ids=["the first tile is scored", "a tile is scored", "a part is written", "a row is encoded"],
)
def test_sigterm_throws_the_open_tile_away_and_exits_75(
    owner: type,
    name: str,
    number: int,
    tmp_path: Path,
    dpocli: Run,
    same_line: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "ref"
    begun = []
    with monkeypatch.context() as patch:
        on_call(patch, owner, name, number, lambda: os.kill(os.getpid(), signal.SIGTERM))
        complete = Reference.complete
        patch.setattr(
            Reference, "complete", lambda self, pairs, *more: begun.append(pairs) or complete(self, pairs, *more)
        )
        result = dpocli(*LINE, "--out", out)
    there = part_names(out)
    assert_refused(
        result, PREEMPTED, f"Stopped on request with {len(there)} of {NUM_PARTS} parts written", "same command"
    )
    assert len(there) <= len(begun) < NUM_PARTS
    assert not temporaries(out)
    written = parts_of(out)
    same_line(out)
    assert {name: parts_of(out)[name] for name in there} == written, "what was there is not done again"


def test_the_part_that_is_being_written_is_counted_whenever_sigterm_comes(
    tmp_path: Path, dpocli: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of the question whether to stop, as the second part is asked for and the first is being written."""
    out, write = tmp_path / "ref", CacheWriter.write
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "write", lambda *arguments: time.sleep(0.3) or write(*arguments))
        on_call(patch, RunDirectory, "stop_requested", NUM_PARTS + 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
        result = dpocli(*LINE, "--out", out)
    assert part_names(out)
    assert_refused(result, PREEMPTED, f"Stopped on request with {len(part_names(out))} of {NUM_PARTS} parts written")


def test_sigterm_while_a_large_cache_is_looked_through(
    ref: Path, dpocli: Run, same_line: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (ref / part_names(ref)[-1]).unlink()
    looked_at = []
    with monkeypatch.context() as patch:
        on_call(patch, CacheWriter, "is_present", 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        is_present = CacheWriter.is_present
        patch.setattr(CacheWriter, "is_present", lambda self, tile: looked_at.append(tile) or is_present(self, tile))
        result = dpocli(*LINE, "--out", ref)
    assert_refused(result, PREEMPTED, "Stopped on request")
    assert len(looked_at) == 2
    same_line(ref)


# no room


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("number", [1, 7])
def test_a_full_disk_while_a_part_is_written(
    number: int,
    tmp_path: Path,
    dpocli: Run,
    same_line: Callable[[Path], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "ref"
    with monkeypatch.context() as patch:
        on_call(patch, writer, "write_part", number, no_room)
        result = dpocli(*LINE, "--out", out)
    assert_refused(result, RESOURCES, f"Writing {out}/rows-", "no space left on device", "Make room", "to resume")
    assert '"state": "failed"' in (out / "status.json").read_text()
    assert len(part_names(out)) == number - 1
    assert not temporaries(out)
    same_line(out)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", path], check=False).returncode:
        pytest.skip("file systems cannot be mounted here")
    yield path
    subprocess.run(["umount", path], check=True)


@pytest.mark.parametrize("room", [4_096, 64_000, 200_000])
def test_a_disk_that_is_really_full(
    room: int, small_disk: Path, tmp_path: Path, dpocli: Run, same_line: Callable[[Path], str]
) -> None:
    filler, size = small_disk / "filler", os.statvfs(small_disk)
    filler.write_bytes(bytes(size.f_bavail * size.f_frsize - room))
    out = small_disk / "ref"
    result = dpocli(*LINE, "--out", out)
    assert_refused(result, RESOURCES, f"{out}", "no space left on device", "Make room")
    assert not temporaries(out)
    for name in part_names(out):
        open_part(out / name).check()
    filler.unlink()
    same_line(out)


# parts that are not as they were written

Damage = Callable[[Path, random.Random], object]


def rewritten(change: Callable[[bytes, random.Random], bytes]) -> Damage:
    return lambda path, chance: path.write_bytes(change(path.read_bytes(), chance))


def with_a_bit_flipped(content: bytes, chance: random.Random) -> bytes:
    place = chance.randrange(len(content))
    return content[:place] + bytes([content[place] ^ (1 << chance.randrange(8))]) + content[place + 1 :]


def with_a_hole(content: bytes, chance: random.Random) -> bytes:
    start = chance.randrange(len(content))
    return (content[:start] + bytes(4096) + content[start + 4096 :])[: len(content)]


DAMAGES: dict[str, Damage] = {
    "cut off": rewritten(lambda content, chance: content[: chance.randrange(1, len(content))]),
    "cut off by a byte": rewritten(lambda content, chance: content[:-1]),
    "empty": rewritten(lambda content, chance: b""),
    "zeros": rewritten(lambda content, chance: bytes(len(content))),
    "text": rewritten(lambda content, chance: b"moved to /old/place\n"),
    "written twice": rewritten(lambda content, chance: content + content),
    "with something after it": rewritten(lambda content, chance: content + b"\n"),
    "with something before it": rewritten(lambda content, chance: b"\n" + content),
    "without its end": rewritten(lambda content, chance: content[:-8]),
    "with a hole": rewritten(with_a_hole),
    "the part of other rows": lambda path, chance: shutil.copy(
        chance.choice([other for other in sorted(path.parent.glob("rows-*")) if other != path]), path
    ),
}


def damage_some(cache: Path, chance: random.Random, bits: int) -> list[str]:
    """One part for each kind of damage, and `bits` more with a flipped bit: the names."""
    names = part_names(cache)
    damages = [*DAMAGES.values(), *[rewritten(with_a_bit_flipped)] * bits]
    hurt = chance.sample(names, len(damages))
    sound = {name: (cache / name).read_bytes() for name in names}
    for name, damage in zip(hurt, damages, strict=True):
        damage(cache / name, chance)
    return [name for name in hurt if (cache / name).read_bytes() != sound[name]]


@pytest.mark.parametrize("seed", range(2))
def test_damaged_parts_are_named_and_made_anew(seed: int, ref: Path, same_line: Callable[[Path], str]) -> None:
    before = parts_of(ref)
    hurt = damage_some(ref, random.Random(seed), bits=12)
    assert len(hurt) >= 22
    said = same_line(ref)
    for name in hurt:
        assert f"The part {name} of the reference cache {ref} is damaged" in said
    assert {name for name, written in parts_of(ref).items() if written != before[name]} <= set(hurt)
    assert "damaged" not in same_line(ref)


def test_a_reader_never_gets_a_value_of_a_damaged_part(whole: Path, ref: Path) -> None:
    chance, expected = random.Random(0), content_of(whole)
    for name in chance.sample(part_names(ref), 12):
        sound = (ref / name).read_bytes()
        kinds = [*chance.sample(sorted(DAMAGES), 3), *["bit"] * 4]
        for kind in kinds:
            damage = DAMAGES.get(kind, rewritten(with_a_bit_flipped))
            damage(ref / name, chance)
            if (ref / name).read_bytes() == sound:
                continue
            with pytest.raises(CacheError, match=name):
                pairs_in(ref)
            (ref / name).write_bytes(sound)
    assert content_of(ref) == expected


@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_train_and_evaluate_name_the_damaged_part(command: str, ref: Path, tmp_path: Path, dpocli: Run) -> None:
    name = part_names(ref)[7]
    rewritten(with_a_bit_flipped)(ref / name, random.Random(3))
    steps = ("--max-steps", 1) if command == "train" else ()
    result = dpocli(command, "--model", MODEL, "--reference", ref, *steps, "--out", tmp_path / "out")
    assert_refused(result, CACHE, name, ref, "damaged", "Run the command that made the cache again")


def test_a_link_to_nowhere_under_the_name_of_a_part(ref: Path, same_line: Callable[[Path], str]) -> None:
    path = ref / part_names(ref)[5]
    path.unlink()
    path.symlink_to("gone")
    same_line(ref)
    assert not path.is_symlink()


@pytest.mark.parametrize("kind", ["a link to itself", "a directory"])
def test_something_under_the_name_of_a_part_that_no_file_can_replace(
    kind: str, ref: Path, dpocli: Run, same_line: Callable[[Path], str]
) -> None:
    path = ref / part_names(ref)[5]
    path.unlink()
    if kind == "a directory":
        path.mkdir()
    else:
        path.symlink_to(path.name)
    assert_refused(dpocli(*LINE, "--out", ref), USAGE, path, "Check the path")
    if kind == "a directory":
        path.rmdir()
    else:
        path.unlink()
    same_line(ref)


@pytest.mark.parametrize(
    ("more", "difference"),
    [
        (("--max-length", 100), "max_length: 2048 -> 100"),
        (("--dtype", "bfloat16"), "dtype: float32 -> bfloat16"),
        (("--data", HELD_OUT, "--limit", 48), "data: "),
        (("--truncation", "drop"), "truncation: keep-start -> drop"),
    ],
    ids=str,
)
def test_a_part_of_a_run_with_other_settings(
    more: tuple[object, ...],
    difference: str,
    ref: Path,
    tmp_path: Path,
    dpocli: Run,
    same_line: Callable[[Path], str],
) -> None:
    other = tmp_path / "other"
    line = [word for word in LINE if word not in ("--data", TRAIN)] if "--data" in more else list(LINE)
    quiet(*line, *more, "--out", other)
    name = part_names(ref)[3]
    shutil.copy(other / name, ref / name)
    reader = dpocli("evaluate", "--model", MODEL, "--reference", ref, "--out", tmp_path / "report")
    old, arrow, new = difference.partition(" -> ")
    field, colon, value = old.partition(": ")
    reversed_words = f"{field}{colon}{new}{arrow}{value}" if arrow else field
    assert_refused(reader, CACHE, name, "made with different settings", field)
    said = same_line(ref)
    assert name in said
    assert f"it belongs to another run ({reversed_words}" in said


def test_most_parts_of_other_settings(ref: Path, tmp_path: Path, dpocli: Run) -> None:
    """One part that fits does not make the others strays: nothing is touched before the user has decided."""
    quiet(*LINE, "--max-length", 100, "--out", other := tmp_path / "other")
    name = part_names(ref)[3]
    shutil.copy(ref / name, other / name)
    before = parts_of(other)
    result = dpocli(*LINE, "--out", other)
    assert_refused(
        result, CACHE, f"The reference cache {other} was made with other settings", "max_length: 100 -> 2048"
    )
    assert parts_of(other) == before


def test_a_part_that_belongs_to_no_tile(ref: Path, dpocli: Run, same_line: Callable[[Path], str]) -> None:
    stranger = ref / "rows-0000000048-0000000050.parquet"
    shutil.copy(ref / part_names(ref)[0], stranger)
    assert_refused(dpocli(*LINE, "--out", ref), CACHE, stranger.name, "not a part of it", "Remove that file")
    stranger.unlink()
    same_line(ref)


# the file system says no


@contextmanager
def without_privileges() -> Iterator[None]:
    """As an ordinary user, since nothing is forbidden to root."""
    if os.geteuid():
        yield
        return
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def owned(ref: Path) -> Iterator[Path]:
    """The cache in a directory that an ordinary user reaches and owns."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        moved = Path(shutil.copytree(ref, place / "ref"))
        place.chmod(0o755)
        if not os.geteuid():
            for path in [place, moved, *moved.iterdir()]:
                os.chown(path, NOBODY, NOBODY)
        yield moved
        moved.chmod(0o755)


def test_a_part_that_may_not_be_read(owned: Path, dpocli: Run, same_line: Callable[[Path], str]) -> None:
    path = owned / part_names(owned)[4]
    path.chmod(0)
    with without_privileges():
        result = dpocli(*LINE, "--out", owned)
    assert_refused(result, USAGE, path, "permission denied", "may read and write")
    path.chmod(0o644)
    same_line(owned)


def test_a_directory_that_may_not_be_written(owned: Path, dpocli: Run, same_line: Callable[[Path], str]) -> None:
    (owned / part_names(owned)[4]).unlink()
    owned.chmod(0o555)
    with without_privileges():
        result = dpocli(*LINE, "--out", owned)
    assert_refused(result, USAGE, owned, "ermission denied")
    owned.chmod(0o755)
    same_line(owned)


def test_a_complete_cache_that_may_not_be_written(owned: Path, dpocli: Run) -> None:
    """Nothing is left to do, so nothing has to be written."""
    before = json.loads((owned / "summary.json").read_text())
    for path in owned.iterdir():
        path.chmod(0o444)
    owned.chmod(0o555)
    there = tree(owned)
    with without_privileges():
        again = dpocli(*LINE, "--out", owned, "--json")
        other = dpocli(*LINE, "--out", owned, "--max-length", 50)
    assert again.code == DONE, again.err
    assert f"{owned} is complete and read-only: nothing to do." in again.err
    own = {"out": str(owned), "scoring": None, "notices": None}
    assert again.json | own == before | own
    assert_refused(other, CACHE, "max_length: 2048 -> 50")
    assert tree(owned) == there


@pytest.mark.parametrize("mode", [0o555, 0o000], ids=["reading is left", "nothing is left"])
def test_permission_lost_in_the_middle(
    mode: int, owned: Path, dpocli: Run, same_line: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in part_names(owned)[4:]:
        (owned / name).unlink()
    with monkeypatch.context() as patch, without_privileges():
        on_call(patch, Reference, "complete", 6, lambda: owned.chmod(mode))
        result = dpocli(*LINE, "--out", owned)
    assert_refused(result, USAGE, f"{owned}/rows-", "permission denied", "may read and write")
    owned.chmod(0o755)
    assert 4 < len(part_names(owned)) < NUM_PARTS
    same_line(owned)


def test_a_directory_that_vanishes(
    tmp_path: Path, dpocli: Run, same_line: Callable[[Path], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "ref"
    with monkeypatch.context() as patch:
        on_call(patch, Reference, "complete", 6, lambda: shutil.move(out, tmp_path / "elsewhere"))
        result = dpocli(*LINE, "--out", out)
    assert_refused(result, USAGE, f"Writing {out}/rows-", "no such file or directory", "Check the path")
    same_line(tmp_path / "elsewhere")


# what dead writers leave


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_temporary_files_of_dead_writers_are_no_parts_and_go(ref: Path, same_line: Callable[[Path], str]) -> None:
    first, second, *_ = part_names(ref)
    host = os.uname().nodename
    stale = [ref / f".{name}~{host}~{dead_process()}~0badcafe.tmp" for name in (first, second)]
    (ref / first).rename(stale[0])  # whole, but for its name
    stale[1].write_bytes((ref / second).read_bytes()[:1000])
    young = ref / f".{second}~another-node~1~0badcafe.tmp"
    young.write_bytes(b"half")
    age(stale, ABANDONED_HERE_SECONDS + 1)
    same_line(ref)
    assert temporaries(ref) == [young]


FILES_BESIDE_THE_PARTS = ("status.json", "config.yaml", "summary.json", ".hashes.json")


@pytest.mark.parametrize("name", FILES_BESIDE_THE_PARTS)
@pytest.mark.parametrize("content", [b"", b"\0" * 200, b"{", b"\xff\xfe{}", b"[1]", b"null"], ids=repr)
def test_damaged_files_beside_the_parts_cost_nothing(
    name: str, content: bytes, ref: Path, same_line: Callable[[Path], str]
) -> None:
    (ref / name).write_bytes(content)
    before = parts_of(ref)
    same_line(ref)
    assert parts_of(ref) == before


def test_a_wrong_hash_that_is_remembered(ref: Path, same_line: Callable[[Path], str]) -> None:
    memory = ref / ".hashes.json"
    memory.write_text(re.sub(r'"sha256": "....', '"sha256": "0000', memory.read_text()))
    same_line(ref)


@pytest.mark.parametrize(
    "change",
    [{"pid": "x"}, {"pid": 1.5}, {"pid": None}, {"pid": 10**30}, {"heartbeat": "x", "host": "another-node"}],
    ids=str,
)
def test_a_status_with_values_of_other_types(
    change: dict[str, Any], ref: Path, same_line: Callable[[Path], str]
) -> None:
    status = json.loads((ref / "status.json").read_text()) | {"state": "running"} | change
    (ref / "status.json").write_text(json.dumps(status))
    same_line(ref)


# a finished result


@pytest.fixture(scope="module")
def finished_run(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[object], Path]:
    """A finished training, and its command line."""
    out = tmp_path_factory.mktemp("finished") / "run"
    line = ["train", "--model", MODEL, "--reference", whole, "--max-steps", 1, "--batch-size", 4, "--out", out]
    quiet(*line)
    return line, out


def by_another_process(directory: Path) -> None:
    """A status that this process wrote would stay for that reason alone."""
    path = directory / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"pid": 1, "pid_started": 1}))


def everything(directory: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("more", "code"),
    [
        (("--max-length", 256), CACHE),
        (("--data", HELD_OUT), CACHE),
        (("--dtype", "bfloat16"), CACHE),
        (("--limit", 9), CACHE),
        (("--model", "nowhere"), USAGE),
        (("--maxlength", 256), USAGE),
        (("--shard", "0/2", "--max-length", 256), CACHE),
    ],
    ids=str,
)
def test_a_refused_precompute_leaves_a_finished_cache_as_it_is(
    more: tuple[object, ...], code: int, ref: Path, dpocli: Run
) -> None:
    (ref / ".status-0-of-2.lock").touch()
    (ref / ".hashes.json").unlink()
    by_another_process(ref)
    before = everything(ref)
    assert_refused(dpocli(*LINE, *more, "--out", ref), code)
    assert everything(ref) == before


@pytest.mark.parametrize(
    "more",
    [("--beta", 0.3), ("--model", "nowhere"), ("--bete", 1), ("--reference", "nowhere"), ("--max-steps", 2)],
    ids=str,
)
def test_a_refused_train_leaves_a_finished_run_as_it_is(
    more: tuple[object, ...], finished_run: tuple[list[object], Path], dpocli: Run
) -> None:
    line, out = finished_run
    by_another_process(out)
    before = everything(out)
    assert_refused(dpocli(*line, *more), USAGE)
    assert everything(out) == before


@pytest.mark.parametrize("state", ["preempted", "failed"])
def test_a_refused_start_of_what_is_not_finished_is_recorded(state: str, ref: Path, dpocli: Run) -> None:
    """Otherwise a script that requeues while the state is "preempted" does so for ever."""
    by_another_process(ref)
    path = ref / "status.json"
    for more, code in ((("--max-length", 256), CACHE), (("--maxlength", 256), USAGE)):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"state": state, "exit_code": 75, "pid": 1}))
        assert_refused(dpocli(*LINE, *more, "--out", ref), code)
        status = json.loads(path.read_text())
        assert (status["state"], status["exit_code"]) == ("failed", code)


@pytest.mark.parametrize("asked", ["dry_run: true", "verify: 3"])
def test_a_look_that_a_file_asks_for_is_not_recorded(asked: str, ref: Path, tmp_path: Path, dpocli: Run) -> None:
    by_another_process(ref)
    path = ref / "status.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"state": "preempted"}))
    before = everything(ref)
    (config := tmp_path / "config.yaml").write_text(f"out: {ref}\nmodel: nowhere\ndata: [{TRAIN}]\n")
    for more, is_recorded in ((asked, False), ("limit: 9", True)):
        config.write_text(
            config.read_text() + more + "\n" if not is_recorded else config.read_text().replace(asked, more)
        )
        assert_refused(dpocli("precompute", "--config", config), USAGE, "nowhere")
        assert (everything(ref) != before) == is_recorded


def test_a_killed_writer_that_nobody_has_waited_for_is_dead(tmp_path: Path) -> None:
    """As in containers whose first process waits for nobody."""
    script = (
        "import pathlib, sys, time; from dpocli.run.status import StatusFile, new_status; "
        "StatusFile(pathlib.Path(sys.argv[1])).write(new_status('train')); print(flush=True); time.sleep(99)"
    )
    with subprocess.Popen([sys.executable, "-c", script, tmp_path], stdout=subprocess.PIPE, cwd=ROOT) as writer:
        assert writer.stdout
        writer.stdout.readline()
        status = StatusFile(tmp_path).read()
        assert status
        was_alive = status.is_alive
        writer.kill()
        os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)  # it has ended, and stays to be waited for
        is_alive_after = status.is_alive
    assert was_alive
    assert not is_alive_after
