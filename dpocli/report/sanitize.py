r"""Text that comes from data, made harmless to read: what is invisible is shown, what would reorder a line is named.

Escaping for HTML is the template's business (autoescape); here is what escaping leaves alone and a page should not hold:
NUL and other control characters, marks that turn the direction of a line around, halves of surrogate pairs.
"""

import re
from collections import defaultdict
from collections.abc import Iterable

from markupsafe import Markup, escape

_CONTROL = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"

_DIRECTION = "[\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]"

_INVISIBLE = "[\u00ad\u200b\u2028\u2029\u2060\ufeff\ufff9-\ufffb\U000e0000-\U000e007f]"

_SURROGATE = "[\ud800-\udfff]"

_NONCHARACTER = "[\ufdd0-\ufdef\ufffe\uffff]"

_UNSHOWABLE = re.compile("|".join((_CONTROL, _DIRECTION, _INVISIBLE, _SURROGATE, _NONCHARACTER)))

_WHITE_SPACE = {ord(" "): "␣", ord("\n"): "↵", ord("\t"): "⇥"}

_MARKED = re.compile(f"(?P<unshowable>{_UNSHOWABLE.pattern})|(?P<newline>\n)|(?P<tab>\t)|(?P<spaces> {{2,}}|^ +$)")


def plain(text: str) -> str:
    """The same text with every character that cannot be shown replaced by its name: `⟨U+202E⟩`."""
    return _UNSHOWABLE.sub(lambda match: _name(match[0]), text)


def one_line(text: str, longest: int = 60) -> str:
    """For a label: `plain`, on one line. Of a longer one both ends stay, since either may be what tells it from others."""
    text = " ".join(plain(text).split())
    if len(text) <= longest:
        return text
    tail = (longest - 1) // 2
    return f"{text[: longest - 1 - tail]}…{text[len(text) - tail :]}"


def told_apart(labels: Iterable[str], longest: int = 60) -> dict[str, str]:
    """Each label of a table → `one_line` of it, but never the same for two of them.

    Where both ends agree, the place is shown where they begin to differ; where they differ in white space alone, white
    space is marked; what still looks the same is numbered.
    """
    shown = {label: one_line(label, longest) for label in labels}
    for alike in _alike(shown):
        shown |= _where_they_differ(alike, longest)
    for alike in _alike(shown):
        for number, label in enumerate(alike[1:], start=2):
            end = f" ({number})"
            shown[label] = one_line(shown[label], longest - len(end)) + end
    return shown


def _alike(shown: dict[str, str]) -> list[list[str]]:
    """The labels that are shown as the same text, where these are several."""
    found = defaultdict(list)
    for label, text in shown.items():
        found[text].append(label)
    return [labels for labels in found.values() if len(labels) > 1]


def _where_they_differ(labels: list[str], longest: int) -> dict[str, str]:
    texts = [" ".join(plain(label).split()) for label in labels]
    if len({*texts}) < len(texts):
        texts = [plain(label.translate(_WHITE_SPACE)) for label in labels]
    shortest = min(map(len, texts))
    place = next((place for place in range(shortest) if len({text[place] for text in texts}) > 1), shortest)
    return {label: _around(text, place, longest) for label, text in zip(labels, texts, strict=True)}


def _around(text: str, place: int, longest: int) -> str:
    """The beginning of a text, and what stands around a place further on."""
    head = longest // 3
    width = longest - head - 2
    if len(text) <= longest:
        return text
    if place + width // 4 < longest - 1:
        return f"{text[: longest - 1]}…"
    start = max(head, min(place - width // 4, len(text) - width))
    stop = start + width
    return f"{text[:head]}{'…' if start > head else ''}{text[start:stop]}{'…' if stop < len(text) else ''}"


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
