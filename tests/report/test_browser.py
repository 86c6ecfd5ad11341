"""The report in a real browser: its parts are there, its console is silent, and nothing is asked for.

Skipped where there is no Chromium. Pages with planted faults go the same way, so that silence means something.
"""

import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path

import pytest

from dpocli.report.html import write_html_report
from tests.support.html_pages import Page
from tests.support.reports import made_up_examples, made_up_report, made_up_table

NAMES = ("chromium", "chromium-browser", "chrome", "google-chrome", "google-chrome-stable", "headless_shell")
BROWSER = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} on PATH, and CHROMIUM is not set"
    ),
]


@dataclass(frozen=True)
class Visit:
    dom: str
    console: list[str]
    requests: list[str]
    """Addresses that the page asked for, not those that the browser asks for by itself."""


def visit(page: Path, scratch: Path, *options: str) -> Visit:
    assert BROWSER
    net_log = scratch / "net.json"
    command = [
        BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-extensions",
        "--enable-logging=stderr", f"--log-net-log={net_log}", f"--user-data-dir={scratch / 'profile'}",
        "--virtual-time-budget=3000", *options, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if re.search(r"\bCONSOLE\b", line)]
    return Visit(done.stdout, console, asked_for(net_log))


def asked_for(net_log: Path) -> list[str]:
    text = net_log.read_text(encoding="utf-8", errors="replace").rstrip().rstrip(",")
    try:
        events = json.loads(text)["events"]
    except json.JSONDecodeError:  # the browser ended before it closed the list
        events = json.loads(text + "]}")["events"]
    starts = [event.get("params") or {} for event in events]
    return [
        start["url"]
        for start in starts
        # What the browser asks for itself has no page that began it.
        if re.match(r"(https?|ftp|wss?):", str(start.get("url", "")))
        and start.get("initiator") not in (None, "not an origin")
    ]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("report")
    table = made_up_table()
    hostile = "</style><script>console.error('ran')</script><img src=http://127.0.0.1:9/x.png>"
    shown = made_up_examples(prompt=hostile, source=hostile)
    write_html_report(directory, made_up_report(table, model=hostile), table, shown)
    return directory / "report.html"


def test_its_parts_are_there_and_nothing_is_asked_for(report: Path, tmp_path: Path) -> None:
    found = visit(report, tmp_path)
    page = Page(found.dom)
    assert {"headline", "figures", "slices", "calibration", "models", "pairs", "made"} <= set(page.ids)
    assert page.tags.count("svg") == 5
    assert "console.error('ran')" in page.text
    assert found.console == []
    assert found.requests == []


def test_a_planted_message_and_a_planted_request_would_be_seen(tmp_path: Path) -> None:
    page = tmp_path / "planted.html"
    page.write_text("<script>console.error('planted')</script><img src='http://127.0.0.1:9/planted.png'>")
    found = visit(page, tmp_path)
    assert any("planted" in line for line in found.console)
    assert any(address.endswith("planted.png") for address in found.requests)


@pytest.mark.parametrize("width", [1500, 420])
def test_it_can_be_seen_in_wide_and_in_narrow_windows(report: Path, tmp_path: Path, width: int) -> None:
    picture = tmp_path / "seen.png"
    visit(report, tmp_path, f"--window-size={width},2400", f"--screenshot={picture}")
    assert picture.read_bytes().startswith(b"\x89PNG")


MEASURE = """<script>addEventListener('load', () => {
    const width = found => document.querySelector(found).getBoundingClientRect().width;
    const hidden = [...document.querySelectorAll('.wide')].filter(part => part.scrollWidth > part.clientWidth);
    parent.document.body.dataset.widths = JSON.stringify({
        window: innerWidth, page: document.documentElement.scrollWidth, plot: width('#plot-checkpoints .plot'),
        hinted: hidden.every(part => getComputedStyle(part).backgroundImage.includes('gradient')), hidden: hidden.length,
        heads: [...document.querySelectorAll('#models thead, #figures .wide:not(:has(.figures)) thead')].map(
            head => head.clientHeight),
    });
})</script>"""


@pytest.mark.parametrize("width", [1500, 420])
def test_a_page_is_as_wide_as_its_window_and_what_is_wider_scrolls(tmp_path: Path, width: int) -> None:
    usual = made_up_report()
    by_loss = {name: usual["models"][0] | {"loss_choice": usual["loss_choice"]} for name in ("dpo", "ipo")}
    write_html_report(tmp_path, usual | {"by_loss": by_loss}, made_up_table(), made_up_examples())
    page = tmp_path / "report.html"
    html = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8"))  # which forbids scripts
    inner = escape(html.replace("</main>", f"</main>{MEASURE}"))
    # A window is never narrower than 500 pixels, a frame may be.
    page.write_text(f'<iframe width="{width}" height="2400" style="border: 0" srcdoc="{inner}"></iframe>', "utf-8")
    dom = visit(page, tmp_path, "--window-size=1600,2400").dom
    found = json.loads(unescape(re.search(r'data-widths="([^"]*)"', dom)[1]))  # type: ignore[index]
    assert found["page"] <= found["window"] == width
    assert found["plot"] >= 600
    assert (found["hidden"] > 0) == (width == 420)
    assert found["hinted"]
    assert len(found["heads"]) == 2
    assert all(found["heads"])
