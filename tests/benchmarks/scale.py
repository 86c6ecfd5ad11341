"""What a cache of a million pairs costs: to open, to read, to look through, and in the commands (Linux, no GPU):

    python tests/benchmarks/scale.py [--pairs 1000000] [--rows-per-part 4096 408] [--directory DIRECTORY]

Everything is random (`scale_world.py`): two models as small as can be, a file of rows, and the finished cache of them,
650 tokens a pair, that `CacheWriter` writes. A tenth of the pairs (`--repeated`) has the prompt of another. At a million
pairs the rows take 3 GB and each cache about as much; `--directory` says where, and keeps them.

For each size of parts, one process measures (`scale_store.py`) `PairStore.open`, batches of a permutation as training
reads them, all pairs of some windows as `evaluate` reads them, and the triage. Memory there is anonymous memory (RssAnon):
pages of files that the kernel keeps do not count.

With the first size of parts the commands are run (`scale_commands.py`), beside the same on a cache of one part: `train`
for two steps, `evaluate` until it is stopped, `precompute` once more. Memory there is the largest resident memory.

The files are in the page cache as far as they fit: a cold disk adds its own time. The tables go to stdout and to
RESULTS.md.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

from environments import append_to_results, in_own_process, machine, markdown_table, say
from scale_commands import Took, commands
from scale_world import World

FEW = 4096


def store_table(found: dict[str, Any]) -> str:
    def cells(name: str, phase: dict[str, Any]) -> list[str]:
        left, peak = ((phase[when] - phase["before"]) / 1e6 for when in ("after", "peak"))
        rate = phase["num_pairs"] / phase["seconds"]
        seconds = (f"{phase[kind]:,.2f}" for kind in ("seconds", "cpu_seconds"))
        return [
            name,
            f"{phase['num_pairs']:,}",
            *seconds,
            f"{rate:,.0f}",
            f"{left:+,.0f}",
            f"{peak:,.0f}",
        ]

    header = ["", "pairs", "seconds", "CPU seconds", "pairs/s", "memory left, MB", "peak above start, MB"]
    return markdown_table(header, [cells(*item) for item in found["phases"].items()])


def commands_table(few: Iterable[Took], many: Iterable[Took]) -> str:
    def cells(took: Took) -> list[str]:
        return [_seconds(took.until_milestone), _seconds(took.until_end), f"{took.peak_bytes / 1e6:,.0f}"]

    rows = []
    for small, large in zip(few, many, strict=True):
        milestone = f"; to: {large.milestone}" if large.milestone else ""
        stopped = "" if large.after_stop is None else f"; ended {large.after_stop:.2f} s after the stop"
        rows.append([f"{large.label}{milestone}{stopped}", *cells(large), *cells(small)])
    columns = ("to there, s", "to the end, s", "peak MB")
    return markdown_table(["", *columns, *(f"{name}, {FEW:,} pairs" for name in columns)], rows)


def _seconds(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def measured(world: World, processes: int) -> tuple[str, str]:
    """What is said of a cache, in a line, and the table."""
    say(f"{world.pairs:,} pairs in parts of {world.rows_per_part:,} rows: writing.")
    began = time.perf_counter()
    world.make(processes)
    seconds = time.perf_counter() - began
    say("Measuring.")
    found = in_own_process(
        Path(sys.executable), "dpocli", "scale", "scale_store.py", str(world.cache), str(world.pairs)
    )
    about = (
        f"{world.pairs:,} pairs, {found['tokens']:,} tokens, {world.num_parts:,} parts of {world.rows_per_part:,} rows, "
        f"{world.cache_bytes / 1e9:.2f} GB; made in {seconds:,.0f} s by {processes} processes."
    )
    return about, store_table(found)


def both_sizes(world: World, processes: int) -> str:
    """The table of the commands, on a small cache and on this one."""
    few = replace(world, pairs=FEW)
    few.make(processes)
    say("The commands, on few pairs and on many.")
    return commands_table(list(commands(few)), list(commands(world)))


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--rows-per-part", type=int, nargs="+", default=[4096, 408])
    parser.add_argument("--repeated", type=float, default=0.1, help="share of the pairs whose prompt others have too")
    parser.add_argument("--processes", type=int, default=2, help="that write the cache")
    parser.add_argument("--directory", type=Path, help="where everything is kept, or was; else it is temporary")
    parser.add_argument("--no-commands", action="store_true", help="measure the stores only")
    parser.add_argument("--no-write", action="store_true", help="leave RESULTS.md alone")
    return parser.parse_args()


def main() -> None:
    options = parsed()
    with tempfile.TemporaryDirectory() as temporary:
        root = (options.directory or Path(temporary)).absolute()
        root.mkdir(parents=True, exist_ok=True)
        worlds = [World(root, options.pairs, options.repeated, rows) for rows in options.rows_per_part]
        stores = [measured(world, options.processes) for world in worlds]
        running = "" if options.no_commands else both_sizes(worlds[0], options.processes)
    lines = [f"### {about}\n\n{table}\n" for about, table in stores]
    if running:
        lines.append(f"### The commands, parts of {options.rows_per_part[0]:,} rows\n\n{running}\n")
    body = "\n".join(lines)
    parts = " ".join(map(str, options.rows_per_part))
    heading = "One million pairs" if options.pairs == 1_000_000 else f"Scale: {options.pairs:,} pairs"
    section = f"""
## {heading}, {date.today().isoformat()}

`python tests/benchmarks/scale.py --pairs {options.pairs} --rows-per-part {parts} --repeated {options.repeated:g}`

- Machine: {machine()}.
- MB = 10⁶ bytes. In the tables of stores: anonymous memory (RssAnon); of commands: the largest resident memory, Python,
  torch and transformers included.
- Files are in the page cache as far as they fit.

{body}"""
    print(section)
    if not options.no_write:
        append_to_results(section)


if __name__ == "__main__":
    main()
