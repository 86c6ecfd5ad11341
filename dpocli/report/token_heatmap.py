"""Pairs as people read them: text, and what every token of an answer did to its reward."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from dpocli.report.sanitize import marked


@dataclass(frozen=True, slots=True)
class ShownToken:
    """A token of an answer, or a few that share a character."""

    text: str
    log_ratio: float
    """log policy - log reference, nats; without a reference the policy's log-prob. Of several tokens, their sum."""
    scored: bool
    """Whether it counts in the reward."""


@dataclass(frozen=True, slots=True)
class ShownPair:
    """A pair with the rewards of the first loss."""

    row: int
    pair_id: str
    source: str
    margin: float
    chosen_reward: float
    rejected_reward: float
    prompt: str
    chosen: tuple[ShownToken, ...]
    rejected: tuple[ShownToken, ...]


@dataclass(frozen=True, slots=True)
class Showcase:
    """The pairs at both ends of an evaluation."""

    worst: tuple[ShownPair, ...]
    """Lowest margin first."""
    best: tuple[ShownPair, ...]
    """Highest margin first."""
    has_reference: bool
    """Whether the tokens hold log-ratios; else log-probs."""

    @property
    def pairs(self) -> tuple[ShownPair, ...]:
        return self.worst + self.best


def strongest(tokens: tuple[ShownToken, ...], count: int = 3) -> list[ShownToken]:
    """The scored tokens that moved most, either way, the strongest first."""
    scored = [token for token in tokens if token.scored and token.log_ratio == token.log_ratio]
    return sorted(scored, key=lambda token: -abs(token.log_ratio))[:count]


LEVELS = 5

FULL = 0.95
"""Quantile of what is shown from which on the colour is at its strongest: one odd token must not pale the others."""

HEAD_TOKENS, HEAD_CHARACTERS, TAIL_CHARACTERS = 160, 300, 600
"""How much of a long text is seen before it is unfolded; of a prompt also the end, where the question is."""


@dataclass(frozen=True, slots=True)
class Folded:
    """A text, of which the middle is folded away if it is long."""

    head: Markup
    middle: Markup | str = ""
    tail: Markup | str = ""
    hidden: str = ""
    """How much is folded away: "120 tokens"."""


@dataclass(frozen=True, slots=True)
class Palette:
    """How values become colours."""

    strongest: float
    """|value| from which on the colour is at its strongest, nats."""
    has_reference: bool

    @classmethod
    def of(cls, showcase: Showcase) -> "Palette":
        """One scale for all tokens that are shown, so that pairs can be compared."""
        sides = [side for pair in showcase.pairs for side in (pair.chosen, pair.rejected)]
        values = np.array([abs(token.log_ratio) for side in sides for token in side if token.scored])
        values = values[np.isfinite(values)]
        return cls(float(np.quantile(values, FULL)) if len(values) else 0.0, showcase.has_reference)

    def color(self, token: ShownToken) -> str:
        """The class of a token in the page: `u3`, `d1`, `s5` (up, down, surprising), `off`, or none."""
        if not token.scored:
            return "off"
        level = self._level(token.log_ratio)
        kind = "s" if not self.has_reference else "u" if token.log_ratio > 0 else "d"
        return f"{kind}{level}" if level else ""

    def legend(self) -> list[tuple[str, str]]:
        """Classes with what they stand for, from the one end to the other."""
        if not self.strongest:
            return [("", "0")]
        steps = [(level, self.strongest * level / LEVELS) for level in range(1, LEVELS + 1)]
        if not self.has_reference:
            return [(f"s{level}", f"−{value:.2g}") for level, value in steps]
        falling = [(f"d{level}", f"−{value:.2g}") for level, value in reversed(steps)]
        return [*falling, ("", "0"), *((f"u{level}", f"+{value:.2g}") for level, value in steps)]

    def _level(self, value: float) -> int:
        if not np.isfinite(value) or not self.strongest:
            return 0
        return min(LEVELS, round(LEVELS * abs(value) / self.strongest))


def colored(tokens: Sequence[ShownToken], palette: Palette) -> Folded:
    """An answer."""
    if len(tokens) <= HEAD_TOKENS + HEAD_TOKENS // 2:
        return Folded(_spans(tokens, palette))
    hidden = f"{len(tokens) - HEAD_TOKENS:,} more tokens"
    return Folded(_spans(tokens[:HEAD_TOKENS], palette), _spans(tokens[HEAD_TOKENS:], palette), hidden=hidden)


def folded(text: str) -> Folded:
    """A prompt."""
    if len(text) <= 2 * (HEAD_CHARACTERS + TAIL_CHARACTERS):
        return Folded(marked(text))
    middle = text[HEAD_CHARACTERS:-TAIL_CHARACTERS]
    return Folded(
        marked(text[:HEAD_CHARACTERS]),
        marked(middle),
        marked(text[-TAIL_CHARACTERS:]),
        f"{len(middle):,} more characters",
    )


def signed(value: float) -> str:
    """`+0.52`, `−1.4`: with a minus that reads as one."""
    return f"{value:+.3g}".replace("-", "−")


def _spans(tokens: Sequence[ShownToken], palette: Palette) -> Markup:
    return Markup("").join(_span(token, palette) for token in tokens)


def _span(token: ShownToken, palette: Palette) -> Markup:
    color = palette.color(token)
    if color == "off":
        return Markup('<span class="off">{}</span>').format(marked(token.text))
    kind = Markup(' class="{}"').format(color) if color else Markup("")
    return Markup('<span{} title="{}">{}</span>').format(kind, signed(token.log_ratio), marked(token.text))
