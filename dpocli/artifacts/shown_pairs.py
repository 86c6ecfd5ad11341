"""Pairs as people read them: text, and what every token of an answer did to its reward."""

from dataclasses import dataclass


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
