"""The report as a page: its parts are there, it asks nobody for anything, and what comes from data stays text."""

import re

import pytest

from dpocli.report.html import html_report, write_html_report
from dpocli.report.token_heatmap import ExamplePairs, ExampleToken
from tests.support.html_pages import Page
from tests.support.reports import made_up_examples, made_up_pair, made_up_report, made_up_table

HOSTILE = [
    "<script>alert(1)</script>",
    "</style></title><img src=https://example.com/x.png onerror=alert(1)>",
    "\"'><b onmouseover='x'>",
    "nul\x00 bell\x07 escape\x1b[31m",
    "turned \u202egnp.exe\u202c, isolated \u2067x\u2069",
    "{{ 7 * 7 }} {% raw %} ${x} $x_1^$ &amp; &lt;",
    "half \ud83d, file \udcff",
    "https://example.com/",
]


@pytest.fixture(scope="module")
def report_directory(tmp_path_factory):
    """A report with everything in it. Drawing takes seconds, so it is made once."""
    directory = tmp_path_factory.mktemp("report")
    table = made_up_table()
    settings = {
        "Options given": {"model": "run/model"},
        "Reference cache": {"fingerprint": "ab12", "settings": {"a": 1}},
    }
    write_html_report(directory, made_up_report(table), table, made_up_examples(), settings)
    return directory


@pytest.fixture(scope="module")
def page(report_directory):
    return Page((report_directory / "report.html").read_text(encoding="utf-8"))


def page_of(report=None, shown=None, settings=None):
    """Without plots, which is fast."""
    return Page(html_report(report or made_up_report(), [], shown or made_up_examples(), settings or {}))


def assert_harmless(page):
    assert not {"script", "iframe", "object", "embed", "link", "base", "form", "img"} & set(page.tags)
    assert not page.handlers
    for address in page.addresses:
        assert address.startswith(("#", "data:image/png;base64,")), address
    for style in page.styles:
        assert "@import" not in style
        assert all(found.startswith("#") for found in re.findall(r"url\(\s*['\"]?([^)]*)", style)), style


def test_its_parts_are_there(page):
    parts = ["headline", "figures", "slices", "calibration", "models", "pairs", "made"]
    assert [name for name in page.ids if name in parts] == parts
    plots = {f"plot-{name}" for name in ("margins", "rewards", "slices", "reliability", "checkpoints")}
    assert plots <= set(page.ids)
    assert page.tags.count("svg") == 5
    assert len(page.ids) == len(set(page.ids))


def test_it_asks_nobody_for_anything(page, report_directory):
    assert_harmless(page)
    html = (report_directory / "report.html").read_text(encoding="utf-8")
    assert "default-src 'none'; style-src 'unsafe-inline'; img-src data:" in html
    assert "http" not in html.replace("http-equiv", "")


def test_it_follows_the_reader_s_colours(report_directory):
    html = (report_directory / "report.html").read_text(encoding="utf-8")
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    svgs = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert "var(--up)" in svgs
    assert "var(--quiet)" in svgs
    assert set(re.findall(r"#[0-9a-f]{6}\b(?=[;\"])", svgs)) <= {"#000000", "#ffffff"}


def test_the_figures_say_what_the_numbers_are(page):
    text = page.text
    assert "reward accuracy" in text
    assert "95% interval" in text
    assert "bootstrap over prompts, 2,000 resamples" in text
    assert "too uncertain to tell" in text
    assert "beta x summed log-ratio" in text
    assert "Not a KL divergence" in text
    assert "run/checkpoints/step-200" in text
    assert "Name a tree, please." in text
    assert "settings.a" in text


def test_the_plots_are_pictures_too(report_directory):
    for name in ("margins", "rewards", "slices", "reliability", "checkpoints"):
        assert (report_directory / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_plots_without_data_are_left_out(tmp_path):
    one = made_up_report()["models"][:1]
    report = made_up_report(models=one, comparisons=[], slices={}, calibration={"bins": [], "brier": 0.2})
    write_html_report(tmp_path, report, made_up_table(30))
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {"margins.png", "rewards.png"}
    assert {"slices", "calibration", "models"}.isdisjoint(Page((tmp_path / "report.html").read_text("utf-8")).ids)


@pytest.mark.parametrize("hostile", HOSTILE)
def test_what_comes_from_data_stays_text(hostile):
    report = made_up_report(model=hostile, reference=hostile, dtype=hostile)
    report["slices"] = {hostile: [entry | {"name": hostile} for entry in report["slices"]["source"]]}
    report["interval"]["method"] = hostile
    report["environment"] = {hostile: hostile}
    for entry in (*report["models"], *report["comparisons"]):
        entry |= {key: hostile for key in ("name", "model", "against") if key in entry}
    tokens = (
        ExampleToken(hostile, 0.5, True),
        ExampleToken(hostile, float("nan"), True),
        ExampleToken(hostile, 1.0, False),
    )
    pair = made_up_pair(source=hostile, pair_id=hostile, prompt=hostile * 60, chosen=tokens, rejected=tokens * 150)
    page = page_of(report, ExamplePairs((pair,), (pair,), has_reference=True), {hostile: {hostile: hostile}})
    assert_harmless(page)
    usual = page_of()
    assert set(page.tags) <= set(usual.tags) | {"em"}
    shown = page.text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", shown)
    readable = re.sub("[\x00-\x1f\u202a-\u202e\u2066-\u2069\ud800-\udfff]", "\n", hostile)
    for piece in readable.split("\n"):
        assert shown.count(piece) > 8
    shown.encode()


def test_what_is_wide_scrolls_by_itself_and_paths_break_between_their_parts(report_directory):
    html = (report_directory / "report.html").read_text(encoding="utf-8")
    assert len(re.findall(r'<div class="wide">\s*<(?:table|svg)', html)) == html.count("<table") + html.count("<svg")
    assert "<bdi>run/<wbr>checkpoints/<wbr>step-100</bdi>" in html
    hostile = "a_b/\x00<b>&lt;/x"
    page = html_report(made_up_report(model=hostile), [], made_up_examples(), {})
    assert "<bdi>a_<wbr>b/<wbr>⟨U+0000⟩&lt;b&gt;&amp;lt;/<wbr>x</bdi></h1>" in page


def test_names_in_plots_are_no_formulas_and_no_elements(tmp_path):
    report = made_up_report()
    report["slices"] = {
        "<script>x</script>": [
            entry | {"name": name}
            for entry, name in zip(
                report["slices"]["source"], ["$\\frac{1$ & <b>\x00", "東京 👍 עברית", "</svg><script>"], strict=True
            )
        ]
    }
    write_html_report(tmp_path, report, made_up_table(50))
    html = (tmp_path / "report.html").read_text(encoding="utf-8")
    page = Page(html)
    assert_harmless(page)
    assert "$\\frac{1$ & <b>⟨U+0000⟩" in page.text
    assert "東京" in re.search(r'<figure id="plot-slices">.*?</figure>', html, flags=re.DOTALL)[0]


@pytest.mark.parametrize(
    "gone",
    [
        *("accuracies", "displacement", "reference", "dtype", "environment", "scoring", "by_loss", "training"),
        *("rewards/accuracies_interval", "rewards/margins_quantiles", "correlation/reward_length", "over_length"),
    ],
)
def test_figures_that_are_not_there_are_left_out(gone):
    report = made_up_report()
    report.pop(gone, None)
    for found in (report, report | {gone: None}):
        assert "None" not in page_of(found).text


def test_without_reference_tokens_show_log_probs():
    pair = made_up_pair(chosen=(ExampleToken("sure", -0.1, True), ExampleToken(" odd", -9.0, True)))
    text = page_of(shown=ExamplePairs((pair,), (), has_reference=False)).text
    assert "looks at no reference" in text
    assert "more likely" not in text.split("Worst and best pairs")[1]


def test_long_texts_are_folded_and_lose_nothing():
    prompt = "A long story. " * 300
    words = tuple(ExampleToken(f" w{place}w", 0.1, True) for place in range(900))
    page = page_of(shown=ExamplePairs((made_up_pair(prompt=prompt, chosen=words),), (), has_reference=True))
    assert page.tags.count("details") == 2
    whole = re.sub(r"\d+,?\d* more \w+", "", page.text)
    assert prompt in whole
    assert "".join(word.text for word in words) in whole


def test_white_space_and_line_ends_are_seen_and_kept():
    pair = made_up_pair(chosen=(ExampleToken("a\n\tb", 0.1, True), ExampleToken("  ", 0.2, True)))
    assert "a↵\n⇥\tb  " in page_of(shown=ExamplePairs((pair,), (), has_reference=True)).text


def test_no_pairs_to_show_is_no_section():
    page = page_of(shown=ExamplePairs((), (), has_reference=True))
    assert "pairs" not in page.ids
