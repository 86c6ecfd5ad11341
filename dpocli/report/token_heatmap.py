"""Example pairs as text, each token coloured by its value."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup

from dpocli.report.sanitize import marked

LEVELS = 5

FULL = 0.95
"""Quantile of the values from which on the colour is strongest: one outlier must not pale the others."""

HEAD_TOKENS, HEAD_CHARACTERS, TAIL_CHARACTERS = 160, 300, 600
"""Visible parts of a long text; of a prompt also the end, which asks the question."""


@dataclass(frozen=True, slots=True)
class ExampleToken:
    """A token of an answer, or several that share a character."""

    text: str
    log_ratio: float
    """log policy - log reference, nats; without a reference the policy's log-prob. Of several tokens, their sum."""
    scored: bool
    """Whether it counts in the reward."""


@dataclass(frozen=True, slots=True)
class ExamplePair:
    """A pair with the rewards of the first loss."""

    row: int
    pair_id: str
    source: str
    margin: float
    chosen_reward: float
    rejected_reward: float
    prompt: str
    chosen: tuple[ExampleToken, ...]
    rejected: tuple[ExampleToken, ...]


@dataclass(frozen=True, slots=True)
class ExamplePairs:
    """The pairs with the lowest and the highest margins."""

    worst: tuple[ExamplePair, ...]
    """Lowest margin first."""
    best: tuple[ExamplePair, ...]
    """Highest margin first."""
    has_reference: bool
    """Whether tokens have log-ratios; else log-probs."""

    @property
    def pairs(self) -> tuple[ExamplePair, ...]:
        return self.worst + self.best


@dataclass(frozen=True, slots=True)
class Folded:
    """A text, whose middle is folded away if it is long."""

    head: Markup
    middle: Markup | str = ""
    tail: Markup | str = ""
    hidden: str = ""
    """Length of the middle: "120 tokens"."""


@dataclass(frozen=True, slots=True)
class Palette:
    """The mapping of values to colours."""

    strongest: float
    """|value| from which on the colour is strongest, nats."""
    has_reference: bool

    @classmethod
    def of(cls, examples: ExamplePairs) -> "Palette":
        """One scale for all tokens of the examples, so that pairs can be compared."""
        sides = [side for pair in examples.pairs for side in (pair.chosen, pair.rejected)]
        values = np.array([abs(token.log_ratio) for side in sides for token in side if token.scored])
        values = values[np.isfinite(values)]
        return cls(float(np.quantile(values, FULL)) if len(values) else 0.0, examples.has_reference)

    def color(self, token: ExampleToken) -> str:
        """CSS class of a token: `u3`, `d1`, `s5` (up, down, surprising), `off`, or none."""
        if not token.scored:
            return "off"
        if not np.isfinite(token.log_ratio) or not self.strongest:
            return ""
        level = min(LEVELS, round(LEVELS * abs(token.log_ratio) / self.strongest))
        kind = "s" if not self.has_reference else "u" if token.log_ratio > 0 else "d"
        return f"{kind}{level}" if level else ""

    def legend(self) -> list[tuple[str, str]]:
        """CSS classes with their values, in order of the values."""
        if not self.strongest:
            return [("", "0")]
        steps = [(level, self.strongest * level / LEVELS) for level in range(1, LEVELS + 1)]
        if not self.has_reference:
            return [(f"s{level}", f"−{value:.2g}") for level, value in steps]
        falling = [(f"d{level}", f"−{value:.2g}") for level, value in reversed(steps)]
        return [*falling, ("", "0"), *((f"u{level}", f"+{value:.2g}") for level, value in steps)]


def strongest(tokens: tuple[ExampleToken, ...], count: int = 3) -> list[ExampleToken]:
    """The scored tokens with the largest |value|, largest first."""
    scored = [token for token in tokens if token.scored and token.log_ratio == token.log_ratio]
    return sorted(scored, key=lambda token: -abs(token.log_ratio))[:count]


def colored(tokens: Sequence[ExampleToken], palette: Palette) -> Folded:
    """An answer in colours."""
    if len(tokens) <= HEAD_TOKENS + HEAD_TOKENS // 2:
        return Folded(_spans(tokens, palette))
    hidden = f"{len(tokens) - HEAD_TOKENS:,} more tokens"
    return Folded(_spans(tokens[:HEAD_TOKENS], palette), _spans(tokens[HEAD_TOKENS:], palette), hidden=hidden)


def folded(text: str) -> Folded:
    """A prompt."""
    if len(text) <= 2 * (HEAD_CHARACTERS + TAIL_CHARACTERS):
        return Folded(marked(text))
    head, middle, tail = text[:HEAD_CHARACTERS], text[HEAD_CHARACTERS:-TAIL_CHARACTERS], text[-TAIL_CHARACTERS:]
    return Folded(marked(head), marked(middle), marked(tail), f"{len(middle):,} more characters")


def signed(value: float) -> str:
    """`+0.52`, `−1.4`: with a typographic minus."""
    return f"{value:+.3g}".replace("-", "−")


def _spans(tokens: Sequence[ExampleToken], palette: Palette) -> Markup:
    return Markup("").join(_span(token, palette) for token in tokens)


def _span(token: ExampleToken, palette: Palette) -> Markup:
    color = palette.color(token)
    if color == "off":
        return Markup('<span class="off">{}</span>').format(marked(token.text))
    kind = Markup(' class="{}"').format(color) if color else Markup("")
    return Markup('<span{} title="{}">{}</span>').format(kind, signed(token.log_ratio), marked(token.text))
