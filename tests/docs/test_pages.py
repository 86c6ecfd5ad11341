"""The README and `docs/` are checked like code: commands parse and run, tables are the declarations, links resolve."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from dpocli import __version__
from dpocli.cache.schema import SMALL_COLUMNS, TOKEN_COLUMNS
from dpocli.cli import run_command_line
from dpocli.config.commands import TrainOptions
from dpocli.config.loss_expression import LossChoice
from dpocli.config.losses import CATALOGUE
from dpocli.config.options import DataOptions
from dpocli.config.other_tools import answers
from dpocli.config.parsing import load_options
from dpocli.data.formats import to_preference
from dpocli.data.row_file import RawRow
from dpocli.errors import ExitCode
from dpocli.evaluation.figures import FIGURES
from tests.docs.first_hour import first_hour
from tests.docs.generate import PARTS, flags, generated, options
from tests.docs.pages import ALIGN, DOCS, EVERY_PAGE, PAGES, README, ROOT, Page, commands
from tests.docs.test_align import assert_torchrun_knows

BLOCKS = [block for page in EVERY_PAGE for block in page.blocks]
SHELL = [block for block in BLOCKS if block.language == "sh"]
PYTHON = [block for block in BLOCKS if block.language == "python"]
LINES = [words for block in SHELL for words in commands(block.text)]
DPOCLI_LINES = [words[1:] for words in LINES if words[0].endswith("dpocli")]
(TUTORIAL,) = (block.text for block in PAGES["index"].blocks if block.text.startswith("dpocli precompute"))

LAUNCHERS = {"--shutdown-timeout", "--signals-to-handle", "--signal", "--multi_gpu", "--num_processes", "--cpu"}
OTHER_PROGRAMS = {"--pictures"}
"""Flags in the text that are not dpocli's."""


# shell blocks and commands


@pytest.mark.parametrize(
    "text", [*{block.text: block for block in SHELL}, ALIGN.read_text()], ids=lambda text: text[:40]
)
def test_shell_blocks_are_valid(text: str) -> None:
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    checks = [["bash", "-n"]] + ([[shellcheck, "--shell=bash", "-"]] if shellcheck else [])
    for check in checks:
        done = subprocess.run(check, input=text, text=True, capture_output=True)
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("line", DPOCLI_LINES, ids=" ".join)
def test_command_lines_parse(
    line: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: Any, terminal: Any) -> None:
        if hasattr(options, "loss"):
            options.loss.loss_choices()

    for name in options():
        monkeypatch.setitem(sys.modules, f"dpocli.commands.{name}", SimpleNamespace(run=run))
    assert run_command_line(line) == 0, capsys.readouterr().err


def test_there_are_command_lines_to_parse() -> None:
    assert {line[0] for line in DPOCLI_LINES} == {*options(), "--help"}


def test_torchrun_lines_parse() -> None:
    lines = [words for words in LINES if words[0] == "torchrun"]
    assert lines
    for words in lines:
        assert_torchrun_knows(words[1:])


@pytest.mark.parametrize("page", EVERY_PAGE, ids=str)
def test_every_flag_that_is_mentioned_exists(page: Page) -> None:
    text = re.sub(r"^```sh\n(?:torchrun|accelerate launch).*?^```$", "", page.text, flags=re.MULTILINE | re.DOTALL)
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9_-]*", text))
    assert mentioned - LAUNCHERS - OTHER_PROGRAMS <= {"--help", "--version", "--no-"} | flags()


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for page in EVERY_PAGE:
        for target in re.findall(r"`make ([\w-]+)|^make ([\w-]+)", page.text, re.MULTILINE):
            assert f"\n{''.join(target)}:" in makefile, (str(page), target)


@pytest.fixture
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("_one_thread")
def test_the_quickstart_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And then the examples of the page on Python, on what it wrote."""
    monkeypatch.chdir(tmp_path)
    for name, source, count in (("prefs.jsonl", "train.jsonl", 24), ("heldout.jsonl", "heldout.jsonl", 8)):
        rows = (ROOT / "sample_data" / source).read_text(encoding="utf-8").splitlines(keepends=True)
        Path(name).write_text("".join(rows[:count]), encoding="utf-8")
    Path("my-model").symlink_to(ROOT / "sample_data" / "tiny-model")
    for words in commands(TUTORIAL):
        if words[0] == "dpocli":
            assert run_command_line(words[1:]) == 0, capsys.readouterr().err
        else:
            subprocess.run(words, check=True, stdout=subprocess.DEVNULL)
    assert json.loads(Path("run/status.json").read_text())["state"] == "done"
    assert Path("run/model/dpocli.json").is_file()
    before, after = (json.loads(Path(f"report-{when}/metrics.json").read_text()) for when in ("before", "after"))
    assert abs(before["rewards/margins"]) < 1e-5 < abs(after["rewards/margins"])

    Path("report").symlink_to("report-after")
    examples = [block for block in PYTHON if block.page == PAGES["python"].name]
    assert len(examples) == 4
    for block in examples:
        names: dict[str, Any] = {}
        exec(compile(block.text, block.page, "exec"), names)
        assert names.get("code", 0) == 0, capsys.readouterr().err


@pytest.mark.slow
def test_the_readme_shows_what_the_first_hour_prints(tmp_path: Path) -> None:
    """Numbers, times and line breaks aside. A line `...` leaves something out."""
    printed = _without_numbers("\n".join(f"$ {command}\n{output}" for command, output in first_hour(tmp_path / "hour")))
    shown = [block.text for block in README.blocks if block.language == "console"]
    pieces = [piece for text in shown for piece in re.split(r"^\.\.\.\n", text, flags=re.MULTILINE)]
    assert len(pieces) > 3
    for piece in pieces:
        assert _without_numbers(piece) in printed, piece


def _without_numbers(text: str) -> str:
    """Each number as `#`, white space of any length as one space."""
    return " ".join(re.sub(r"[+-]?\d[\d.,:]*(?:e[+-]\d+)?k?", "#", text.replace("\\\n", " ")).split())


# examples


def test_python_examples_are_valid() -> None:
    assert PYTHON
    for block in PYTHON:
        ast.parse(block.text, block.page)


def test_the_examples_of_rows_are_read() -> None:
    options = DataOptions()
    examples = PAGES["data-formats"].table("Rows")
    assert len(examples) == 7
    for form, example in examples:
        preference = to_preference(RawRow(0, "data-formats.md", json.loads(example.strip("`"))), options)
        assert "Name a tree." in str(preference.prompt), form
        assert "Oak." in str(preference.chosen), form
        assert "Granite." in str(preference.rejected), form


def test_the_sum_in_yaml_is_the_sum_of_the_command_line(tmp_path: Path) -> None:
    (block,) = (block for block in PAGES["losses"].blocks if block.language == "yaml")
    (tmp_path / "c.yaml").write_text(block.text)
    given = {"model": "m", "out": "o", "reference": "r", "config": str(tmp_path / "c.yaml")}
    (line,) = [line for line in DPOCLI_LINES if "run-sum" in line]
    assert load_options(TrainOptions, given).loss_choice() == LossChoice.of(line[line.index("--loss") + 1])


# tables


@pytest.mark.parametrize("stem", PARTS)
def test_the_generated_parts_are_up_to_date(stem: str) -> None:
    assert generated(PAGES[stem]) == PAGES[stem].text, "`make docs-pages` writes them"


def test_every_loss_is_in_the_table_of_the_readme_once() -> None:
    names = [name for losses, _ in README.table("Losses") for name in re.findall(r"`(\w+)`", losses)]
    assert sorted(names) == sorted(CATALOGUE)


def test_every_column_of_the_cache_is_described() -> None:
    described = {name for names, *_ in PAGES["cache"].table("Format") for name in re.findall(r"`(\w+)`", names)}
    assert described == {*SMALL_COLUMNS.names, *TOKEN_COLUMNS.names}


def test_the_table_of_exit_codes_is_the_enumeration() -> None:
    rows = {int(code): state for code, _, state in PAGES["resuming-and-exit-codes"].table("Exit codes")}
    states = {ExitCode.DONE: "done", ExitCode.PREEMPTED: "preempted"}
    assert rows == {code: states.get(code, "failed") for code in ExitCode}


def test_every_name_that_gates_know_is_listed() -> None:
    assert {figure.name for figure in FIGURES} <= {*re.findall(r"`(\w+)`", PAGES["evaluation"].section("Gates"))}


def test_names_from_trl_are_recognised() -> None:
    known = answers("options").keys() | {flag.removeprefix("--").replace("-", "_") for flag in flags()}
    rows = PAGES["coming-from-trl"].table("Options")
    assert len(rows) > 15
    for theirs, _ in rows:
        assert set(re.findall(r"`([a-z]\w+)", theirs)) <= known


def test_the_changelog_names_this_version() -> None:
    assert f"\n## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


# links and the site


def anchors(page: Page) -> set[str]:
    """The anchors of the headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```$", "", page.text, flags=re.MULTILINE | re.DOTALL), re.M)
    return {re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


@pytest.mark.parametrize("page", EVERY_PAGE, ids=str)
def test_internal_links_resolve(page: Page) -> None:
    by_path = {page.path: page for page in EVERY_PAGE}
    for target in re.findall(r"\]\(([^)\s]+)\)", page.text):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.path.parent / name).resolve() if name else page.path
        assert path.exists(), target
        assert not anchor or anchor in anchors(by_path[path]), target


def test_the_index_of_the_readme_names_every_page() -> None:
    linked = set(re.findall(r"\]\(docs/([\w-]+)\.md\)", README.section("Documentation")))
    assert linked == PAGES.keys()


def test_the_navigation_of_the_site_names_every_page() -> None:
    text = (DOCS / "mkdocs" / "mkdocs.yml").read_text(encoding="utf-8")
    assert sorted(re.findall(r"[\w-]+(?=\.md$)", text, re.MULTILINE)) == sorted(PAGES)
    assert yaml.safe_load(text)["theme"]["font"] is False


def test_the_readme_is_short_and_its_images_are_small() -> None:
    assert len(README.text.splitlines()) <= 200
    images = list((DOCS / "images").iterdir())
    assert images
    for image in images:
        assert image.stat().st_size < 200_000, image


def test_pins_of_the_site_and_of_the_package_agree() -> None:
    def pins(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if "==" in line and not line.startswith("#")]
        return {
            name.lower().replace("_", "-"): version for name, _, version in (line.partition("==") for line in lines)
        }

    site, package = pins(DOCS / "mkdocs" / "requirements.txt"), pins(ROOT / "requirements.txt")
    assert site.keys() & package.keys()
    assert {name: site[name] for name in site.keys() & package.keys()}.items() <= package.items()
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]
    assert {re.split(r"[<>=]", requirement)[0] for requirement in groups["docs"]} <= site.keys()
