"""What a cache of a million pairs costs to open, to read and to look through. Anyone can run it (Linux, no GPU):

    python tests/benchmarks/scale.py [--pairs 1000000] [--repeated 0.1] [--no-write]

The cache is synthetic: `CacheWriter` writes parts of random tokens (about 40 a pair) with random log-probs, several
processes side by side, with the fingerprint of the tiny model. A share of the pairs (`--repeated`) has the prompt of
another pair, since the triage reads the tokens of those. Then one process, which imports no torch, measures

- the start of `train` and `evaluate`: `PairStore.open`,
- random access: batches of 128 pairs at random positions, as training reads them; and all pairs of some parts in order,
- the triage.

Memory is anonymous memory (RssAnon), so that pages of files that the kernel keeps do not count; peaks are sampled every
few milliseconds. The files are in the page cache, since they were written a moment ago: a cold disk adds its own time.

The table goes to stdout and to the end of RESULTS.md.
"""

import argparse
import json
import re
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from environments import ROOT, append_to_results, in_own_process, machine, markdown_table, say

from dpocli.artifacts.cache_reader import PairStore
from dpocli.artifacts.cache_writer import CacheWriter
from dpocli.artifacts.fingerprint import Fingerprint, build_fingerprint
from dpocli.artifacts.model_files import ModelFiles
from dpocli.artifacts.triage import triage
from dpocli.config.shared_options import DataOptions
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.data.rows import ContentPart
from dpocli.data.tokens import pair_id

MODEL = ROOT / "sample_data" / "tiny-model"
ROWS_PER_PART = 4096
VOCABULARY = 49_152
MEAN_TOKENS = (16, 12, 12)
"""Of prompt, chosen and rejected."""
BATCH = 128
SAMPLE_SECONDS = 0.005

Found = TypeVar("Found")


@dataclass(frozen=True)
class Phase:
    """What one part of the measurement took."""

    seconds: float
    before: int
    """Anonymous bytes before it."""
    peak: int
    """Most anonymous bytes during it."""
    after: int


# writing


def fingerprint_of(pairs: int) -> Fingerprint:
    """Of the tiny model and a data file that never was."""
    from transformers import AutoTokenizer

    return build_fingerprint(
        DataOptions(data=["synthetic.jsonl"]),
        tokenizer=AutoTokenizer.from_pretrained(MODEL),
        content=[ContentPart("synthetic.jsonl", "0" * 64, pairs)],
        total_rows=pairs,
        rows_per_part=ROWS_PER_PART,
        model=ModelFiles(MODEL),
        dtype="float32",
    )


def write_share(directory: Path, pairs: int, repeated: float, index: int, count: int) -> None:
    """The tiles that one of several processes writes."""
    writer = CacheWriter(directory, fingerprint_of(pairs), pairs, ROWS_PER_PART)
    writer.check()
    for tile in writer.missing(index, count):
        writer.write(tile, random_pairs(tile.start, tile.stop, pairs, repeated))


def random_pairs(start: int, stop: int, total: int, repeated: float) -> list[EncodedPair]:
    generator = np.random.default_rng([start, total])
    count = stop - start
    lengths = [generator.poisson(mean - 1, count) + 1 for mean in MEAN_TOKENS]
    tokens = [split(generator.integers(3, VOCABULARY, each.sum(), dtype=np.int32), each) for each in lengths]
    logps = [split(-generator.exponential(2.0, each.sum()).astype(np.float32), each) for each in lengths[1:]]
    hashes = generator.integers(0, 2**63, count, dtype=np.uint64)
    shared = generator.random(count) < repeated
    # Two pairs have each of these prompts, on average, wherever in the data they stand.
    hashes[shared] = generator.integers(0, max(int(total * repeated / 2), 1), int(shared.sum()), dtype=np.uint64)
    return [
        EncodedPair(
            row=row,
            pair_id=pair_id(prompt, chosen, rejected),
            prompt_ids=prompt,
            chosen_ids=chosen,
            rejected_ids=rejected,
            source=f"source {row % 7}",
            prompt_hash=int(prompt_hash),
            reference=ReferenceLogps(*references),
        )
        for row, prompt, chosen, rejected, prompt_hash, *references in zip(
            range(start, stop), *tokens, hashes, *logps, strict=True
        )
    ]


def split(values: Any, lengths: Any) -> list[Any]:
    return np.split(values, np.cumsum(lengths)[:-1])


def write(directory: Path, options: argparse.Namespace) -> float:
    """Seconds that it took."""
    began = time.perf_counter()
    with ProcessPoolExecutor(options.processes) as pool:
        shares = [
            pool.submit(write_share, directory, options.pairs, options.repeated, index, options.processes)
            for index in range(options.processes)
        ]
        for share in shares:
            share.result()
    return time.perf_counter() - began


# measuring


def anonymous_bytes() -> int:
    found = re.search(r"^RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found, "the kernel does not tell anonymous memory"
    return int(found[1]) * 1024


def measured(work: Callable[[], Found]) -> tuple[Found, Phase]:
    """What the work gives, and what it took."""
    ended = threading.Event()
    before = anonymous_bytes()
    seen = [before]

    def watch() -> None:
        while not ended.wait(SAMPLE_SECONDS):
            seen.append(anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.perf_counter()
    try:
        result = work()
    finally:
        seconds = time.perf_counter() - began
        ended.set()
        watcher.join()
    after = anonymous_bytes()
    return result, Phase(seconds, before, max(*seen, after), after)


def measure(directory: Path, batches: int) -> dict[str, Any]:
    """For the table; in a process that has done nothing else."""
    store, opened = measured(lambda: PairStore.open(directory))
    generator = np.random.default_rng(0)

    def at_random() -> None:
        for _ in range(batches):
            assert len(store.load(generator.integers(0, len(store), BATCH))) == BATCH

    in_order = min(len(store), 10 * ROWS_PER_PART)

    def one_after_another() -> None:
        for start in range(0, in_order, BATCH):
            store.load(range(start, min(start + BATCH, in_order)))

    _, random_access = measured(at_random)
    _, again = measured(at_random)
    _, ordered = measured(one_after_another)
    _, looked_through = measured(lambda: triage(store))
    return {
        "pairs": len(store),
        "tokens": sum(store.counts[f"{name}_tokens"] for name in ("prompt", "chosen", "rejected")),
        "random_pairs": batches * BATCH,
        "ordered_pairs": in_order,
        "open": asdict(opened),
        "random": asdict(random_access),
        "random again": asdict(again),
        "ordered": asdict(ordered),
        "triage": asdict(looked_through),
    }


# telling


def report(found: dict[str, Any], written_in: float, num_bytes: int, options: argparse.Namespace) -> str:
    """A section of RESULTS.md."""
    pairs = found["pairs"]

    def cells(label: str, name: str, count: int) -> list[str]:
        phase = Phase(**found[name])
        growth, peak = ((value - phase.before) / 1e6 for value in (phase.after, phase.peak))
        return [label, f"{phase.seconds:,.2f}", f"{count / phase.seconds:,.0f}", f"{growth:+,.0f}", f"{peak:,.0f}"]

    rows = [
        [f"write, {options.processes} processes", f"{written_in:,.1f}", f"{pairs / written_in:,.0f}", "", ""],
        cells("open: the start of train and evaluate", "open", pairs),
        cells(f"{found['random_pairs']:,} pairs at random, {BATCH} at a time", "random", found["random_pairs"]),
        cells("as many again", "random again", found["random_pairs"]),
        cells(f"{found['ordered_pairs']:,} pairs in order", "ordered", found["ordered_pairs"]),
        cells(f"triage, {options.repeated:.0%} of the prompts repeated", "triage", pairs),
    ]
    table = markdown_table(["phase", "seconds", "pairs/s", "memory left, MB", "peak above start, MB"], rows)
    return f"""
## Scale: {pairs:,} pairs, {date.today().isoformat()}

`python tests/benchmarks/scale.py --pairs {options.pairs} --repeated {options.repeated:g}`

- Machine: {machine()}.
- The cache: {pairs:,} synthetic pairs, {found["tokens"]:,} tokens, {-(-pairs // ROWS_PER_PART):,} parts, {num_bytes / 1e6:,.0f} MB.
- MB = 10⁶ bytes of anonymous memory (RssAnon). Files are in the page cache.

{table}
"""


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--repeated", type=float, default=0.1, help="share of the pairs whose prompt others have too")
    parser.add_argument("--processes", type=int, default=2, help="that write the cache")
    parser.add_argument("--batches", type=int, default=100, help=f"of {BATCH} random pairs to read")
    parser.add_argument("--directory", type=Path, help="where the cache is kept, or was; else it is temporary")
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md alone")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    options = parsed()
    if options.measure:
        print(json.dumps(measure(options.measure, options.batches)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        directory: Path = options.directory or Path(temporary) / "cache"
        directory.mkdir(parents=True, exist_ok=True)
        say(f"Writing {options.pairs:,} pairs.")
        written_in = write(directory, options)
        num_bytes = sum(path.stat().st_size for path in directory.glob("rows-*"))
        say("Measuring.")
        arguments = ("--measure", str(directory.absolute()), "--batches", str(options.batches))
        found = in_own_process(Path(sys.executable), "dpocli", "scale", "scale.py", *arguments)
    section = report(found, written_in, num_bytes, options)
    print(section)
    if not options.no_write:
        append_to_results(section)


if __name__ == "__main__":
    main()
