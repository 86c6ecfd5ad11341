import pytest
from markupsafe import Markup

from dpocli.report.sanitize import distinct_labels, marked, one_line, plain


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
    assert one_line("x" * 10, 10) == "x" * 10


@pytest.mark.parametrize(("longest", "shown"), [(11, "01234…56789"), (10, "01234…6789"), (2, "0…"), (1, "…")])
def test_a_long_label_keeps_both_ends(longest, shown):
    assert one_line(f"01234{'x' * 90}56789", longest) == shown


def test_no_label_grows_by_what_is_named():
    assert len(one_line("\u202e" * 1000, 10)) == 10


@pytest.mark.parametrize(
    "labels",
    [
        [f"the same beginning, {place:05} and the same end" for place in range(20)],
        ["a" * 50 + "1" + "b" * 50 + end for end in ("x", "y")] + ["a" * 50 + "2" + "b" * 50 + "x"],
        ["run a", "run  a", "run\na", "run\ta", " run a"],
        ["x" * 30 + str(place) + "y" * 300 + str(place % 7) + "z" * 30 for place in range(40)],
        ["\u202e" * 40 + letter + "\u202e" * 40 for letter in "ab"],
        ["", " ", "\n"],
    ],
)
def test_labels_of_a_table_differ_as_they_are_shown(labels):
    shown = distinct_labels(labels, 28)
    assert list(shown) == labels
    assert len({*shown.values()}) == len(labels)
    assert all(len(text) <= 28 and plain(text) == text and "\n" not in text for text in shown.values())


def test_labels_that_look_the_same_are_numbered():
    ends = [f"{'some/long/path/' * 3}{name}{'/and/so/on' * 4}" for name in ("oak", "elm")]
    first, second = distinct_labels(ends, 28).values()
    assert (first[:12], second[:12], second[-4:]) == ("some/long/pa", "some/long/pa", " (2)")
    assert distinct_labels(["plain", "plain and\nsimple"]) == {
        "plain": "plain",
        "plain and\nsimple": "plain and simple",
    }
