"""Run the README's first commands on the sample data: `python -m tests.docs.first_hour DIRECTORY [--pictures]`.

Prints what they print at 80 columns, which is what the README quotes. With `--pictures`, which needs Pillow and Debian's
`chromium`, writes `docs/images/curves.png` and `docs/images/report.png` from their output.
"""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.docs.pages import README, ROOT, commands

TUTORIAL = next(block.text for block in README.blocks if block.text.startswith("dpocli precompute"))
COLOURS = 128


def first_hour(directory: Path) -> Iterator[tuple[str, str]]:
    """Run the commands one after the other; yield each with stdout and stderr, in the order of printing."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "sample_data").symlink_to(ROOT / "sample_data")
    environment = os.environ | {
        "COLUMNS": "80",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
    }
    for words in commands(TUTORIAL):
        done = subprocess.run(
            words, cwd=directory, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout
        yield " ".join(words), done.stdout


def write_pictures(directory: Path) -> None:
    """Write the two images of the README, each with a palette of 128 colours to keep it small."""
    page, shot = directory / "report" / "report.html", directory / "report.png"
    browser = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    with tempfile.TemporaryDirectory() as profile:
        subprocess.run(
            [*browser, f"--user-data-dir={profile}", f"--screenshot={shot}", "--window-size=1000,1400", page.as_uri()],
            check=True,
        )
    _write_small(directory / "run" / "curves.png", "curves.png")
    _write_small(shot, "report.png")


def _write_small(source: Path, name: str) -> None:
    from PIL import Image

    image = Image.open(source).convert("RGB")
    image.thumbnail((1200, 1400))
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(ROOT / "docs" / "images" / name, optimize=True)


if __name__ == "__main__":
    where = Path(sys.argv[1])
    for command, output in first_hour(where):
        print(f"$ {command}\n{output}")
    if "--pictures" in sys.argv:
        write_pictures(where)
