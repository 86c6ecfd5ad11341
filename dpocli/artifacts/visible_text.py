r"""Text that comes from data, made harmless to read: what is invisible is shown, what would reorder a line is named.

Escaping for HTML is the template's business (autoescape); here is what escaping leaves alone and a page should not hold:
NUL and other control characters, marks that turn the direction of a line around, halves of surrogate pairs.
"""

import re

from markupsafe import Markup, escape

_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
_DIRECTION = "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"
_INVISIBLE = "[\u00ad\u200b\u2028\u2029\u2060\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"
_SURROGATE = "[\ud800-\udfff]"
_NONCHARACTER = "[\ufdd0-\ufdef\ufffe\uffff]"
_UNSHOWABLE = re.compile("|".join((_CONTROL, _DIRECTION, _INVISIBLE, _SURROGATE, _NONCHARACTER)))
_MARKED = re.compile(f"(?P<unshowable>{_UNSHOWABLE.pattern})|(?P<newline>\n)|(?P<tab>\t)|(?P<spaces> {{2,}}|^ +$)")


def plain(text: str) -> str:
    """The same text with every character that cannot be shown replaced by its name: `⟨U+202E⟩`."""
    return _UNSHOWABLE.sub(lambda match: _name(match[0]), text)


def one_line(text: str, longest: int = 60) -> str:
    """For a label: `plain`, on one line, cut where it is longer."""
    text = " ".join(plain(text[: 4 * longest]).split())
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def marked(text: str) -> Markup:
    """As HTML that keeps white space and shows it: ends of lines, tabs, several spaces, and what cannot be shown.

    The marks are not part of what a reader copies from the page (see `.mark` in the template).
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
