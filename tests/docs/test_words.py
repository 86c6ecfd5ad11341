"""Phrases that plain technical English does without are not in the documents."""

import re
from pathlib import Path

import pytest

from tests.docs.pages import ROOT, Page

ROOTS = ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "sample_data")
"""Files, and folders whose text files are searched."""

SUFFIXES = {".md", ".py", ".sh", ".yml", ".yaml", ".j2", ".css"}

BANNED = (
    "anew",
    "mend",
    "mends",
    "mended",
    "gone",
    "told",
    "says what is wrong",
    "gives way",
    "stands",
    "those of",
    "to go on",
    "goes on",
    "going on",
    "one's own line",
    "in words",
    "by hand of",
    "peers",
    "taken for",
    "liked",
    "whoever",
)

EXCEPTIONS: dict[str, set[str]] = {}
"""Path → phrases that are right there. Each with a comment that says why."""

PATTERN = re.compile(rf"\b(?:{'|'.join(map(re.escape, BANNED))})\b", re.IGNORECASE)


def searched() -> list[Path]:
    roots = [ROOT / name for name in ROOTS]
    inside = (path for root in roots if root.is_dir() for path in sorted(root.rglob("*")))
    return [path for path in (*(root for root in roots if root.is_file()), *inside) if path.suffix in SUFFIXES]


def phrases(path: Path) -> list[str]:
    """The banned phrases in a file, each with what is around it. What `generate` writes is checked at its source."""
    text = Page(path).written if path.suffix == ".md" else path.read_text(encoding="utf-8")
    line = " ".join(text.split())  # a phrase may be broken over two lines
    allowed = EXCEPTIONS.get(str(path.relative_to(ROOT)), set())
    return [
        f"{match[0]}: {line[max(match.start() - 30, 0) : match.end() + 30]}"
        for match in PATTERN.finditer(line)
        if match[0].lower() not in allowed
    ]


def test_roots_exist() -> None:
    assert all((ROOT / name).exists() for name in ROOTS)
    assert len(searched()) > 20


def test_exceptions_are_needed() -> None:
    for path, allowed in EXCEPTIONS.items():
        text = (ROOT / path).read_text(encoding="utf-8").lower()
        assert all(re.search(rf"\b{phrase}\b", text) for phrase in allowed), path


def test_no_banned_phrase() -> None:
    found = {str(path.relative_to(ROOT)): phrases(path) for path in searched()}
    assert {path: text for path, text in found.items() if text} == {}


def test_a_banned_phrase_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.docs.test_words.ROOT", tmp_path)
    path = tmp_path / "x.py"
    path.write_text("# Whoever it is, it goes\n  on. A foregone conclusion, and recommended.\n")
    assert [found.partition(":")[0] for found in phrases(path)] == ["Whoever", "goes on"]
