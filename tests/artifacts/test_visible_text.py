import pytest
from markupsafe import Markup

from dpocli.artifacts.visible_text import marked, one_line, plain


@pytest.mark.parametrize(
    "character", ["\x00", "\x1b", "\x7f", "\x85", "\u202e", "\u2066", "\u200f", "\ufeff", "\u2028", "\ud800", "\uffff"]
)
def test_what_cannot_be_shown_is_named(character):
    name = f"⟨U+{ord(character):04X}⟩"
    assert plain(f"a{character}b") == f"a{name}b"
    assert name in marked(f"a{character}b")
    assert character not in marked(character)


@pytest.mark.parametrize(
    "text", ["Größe 東京 עברית عربى", "👩\u200d👩\u200d👧 👍🏽 🇩🇪", "e\u0301", "a\nb\tc", "\ufffd", ""]
)
def test_scripts_of_all_kinds_stay_as_they_are(text):
    assert plain(text) == text


def test_white_space_is_marked_and_kept():
    assert marked("a\n\tb") == 'a<i class="mark">↵</i>\n<i class="mark">⇥</i>\tb'
    assert marked("a b") == "a b"
    assert marked("a  b") == 'a<i class="mark spaces">  </i>b'
    assert marked(" ") == '<i class="mark spaces"> </i>'


def test_markup_is_escaped():
    assert marked("<b>&\"'\n</b>").startswith("&lt;b&gt;&amp;&#34;&#39;<i")
    assert isinstance(marked(""), Markup)


def test_a_label_is_one_short_line():
    assert one_line("a\nb\t c") == "a b c"
    assert one_line("x" * 100, 10) == "x" * 9 + "…"
    assert one_line("x" * 10, 10) == "x" * 10
    assert len(one_line("\u202e" * 1000, 10)) == 10
