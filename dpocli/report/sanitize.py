r"""Text from data, made harmless to show: invisible characters, and marks that reorder a line, are replaced by their names.

The template escapes HTML. This module replaces what escaping keeps: NUL and other control characters, marks of direction,
halves of surrogate pairs.
"""

import re
from collections.abc import Iterable

from markupsafe import Markup, escape

_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"

_DIRECTION = "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"

_INVISIBLE = "[\u00ad\u200b\u2028\u2029\u2060\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"

_SURROGATE = "[\ud800-\udfff]"

_NONCHARACTER = "[\ufdd0-\ufdef\ufffe\uffff]"

_UNSHOWABLE = re.compile("|".join((_CONTROL, _DIRECTION, _INVISIBLE, _SURROGATE, _NONCHARACTER)))

_MARKED = re.compile(f"(?P<unshowable>{_UNSHOWABLE.pattern})|(?P<newline>\n)|(?P<tab>\t)|(?P<spaces> {{2,}}|^ +$)")


def plain(text: str) -> str:
    """Replace every character that cannot be shown by its name: `⟨U+202E⟩`."""
    return _UNSHOWABLE.sub(lambda match: _name(match[0]), text)


def one_line(text: str, longest: int = 60) -> str:
    """Make a label: `plain`, on one line, cut in the middle, since labels may differ at either end."""
    text = " ".join(plain(text).split())
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[len(text) - tail :]}"


def distinct_labels(labels: Iterable[str], longest: int = 60) -> dict[str, str]:
    """Each label of a table → `one_line` of it; labels that would look the same are numbered."""
    shown: dict[str, str] = {}
    for label in dict.fromkeys(labels):
        text, number = one_line(label, longest), 1
        while text in shown.values():
            number += 1
            end = f" ({number})"
            text = one_line(label, longest - len(end)) + end
        shown[label] = text
    return shown


def marked(text: str) -> Markup:
    """HTML that keeps white space and marks it: line ends, tabs, several spaces, and what cannot be shown.

    A reader who copies from the page does not copy the marks (see `.mark` in the template).
    """
    pieces: list[Markup] = []
    end = 0
    for match in _MARKED.finditer(text):
        pieces += [escape(text[end : match.start()]), _mark(match)]
        end = match.end()
    return Markup("").join([*pieces, escape(text[end:])])


def _mark(match: re.Match[str]) -> Markup:
    found = match[0]
    if match["newline"]:
        return Markup('<i class="mark">↵</i>\n')
    if match["tab"]:
        return Markup('<i class="mark">⇥</i>\t')
    if match["spaces"]:
        return Markup('<i class="mark spaces">{}</i>').format(found)
    return Markup('<i class="mark name">{}</i>').format(_name(found))


def _name(character: str) -> str:
    return f"⟨U+{ord(character):04X}⟩"
