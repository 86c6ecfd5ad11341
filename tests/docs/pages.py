"""The README and the pages of `docs/`, as the tests and the generator see them."""

import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"


@dataclass(frozen=True)
class Block:
    """A fenced code block."""

    page: str
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}: {(self.text.splitlines() or [''])[0][:50]}"


@dataclass(frozen=True)
class Page:
    """A Markdown file."""

    path: Path

    def __str__(self) -> str:
        return self.name

    @property
    def name(self) -> str:
        return str(self.path.relative_to(ROOT))

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def blocks(self) -> list[Block]:
        found = re.findall(r"^```([\w-]*)\n(.*?)^```$", self.text, re.MULTILINE | re.DOTALL)
        return [Block(self.name, language, text) for language, text in found]

    @property
    def written(self) -> str:
        """The text without what `generate` writes."""
        return re.sub(r"^<!-- (\w+) -->\n.*?^<!-- /\1 -->$", "", self.text, flags=re.MULTILINE | re.DOTALL)

    def section(self, heading: str) -> str:
        """What is below a heading of the second level."""
        return self.text.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]

    def table(self, heading: str) -> list[list[str]]:
        """The cells of the first table below a heading, without its head."""
        lines: list[str] = []
        for line in self.section(heading).splitlines():
            if line.startswith("|"):
                lines.append(line)
            elif lines:
                break
        return [[cell.strip() for cell in line[1:-1].split("|")] for line in lines[2:]]


README = Page(ROOT / "README.md")
PAGES = {path.stem: Page(path) for path in sorted(DOCS.glob("*.md"))}
EVERY_PAGE = [README, *PAGES.values(), Page(ROOT / "CONTRIBUTING.md"), Page(ROOT / "CHANGELOG.md")]
ALIGN = DOCS / "examples" / "align.sh"


def commands(block: str) -> list[list[str]]:
    """The words of each command of a shell block that has no variables."""
    lines = block.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]
