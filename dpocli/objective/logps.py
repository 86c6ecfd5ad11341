"""The log-probs of pairs that losses read."""

from collections.abc import Collection
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from dpocli.config.hyperparameters import Need


@dataclass(frozen=True, slots=True)
class PairLogps:
    """Log-probs of pairs, summed over the counted tokens: all that a loss may read. Shapes (pairs,), nats, float64."""

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor | None
    reference_rejected: Tensor | None
    """The reference's sums; None for reference-free losses."""
    chosen_tokens: Tensor
    rejected_tokens: Tensor
    """Numbers of counted tokens."""
    policy_chosen_collision: Tensor | None = None
    policy_rejected_collision: Tensor | None = None
    """Sums of log Σ_v p(v)² over the same tokens, for WPO. No gradient."""
    policy_chosen_tail: Tensor | None = None
    policy_rejected_tail: Tensor | None = None
    reference_chosen_tail: Tensor | None = None
    reference_rejected_tail: Tensor | None = None
    """Sums over the tokens beyond the length of the shorter answer, for LD-DPO; 0 on the shorter side."""

    def __len__(self) -> int:
        return len(self.policy_chosen)

    def columns(self) -> dict[str, Tensor]:
        """The columns that are present, by name. Shapes (pairs,)."""
        present = ((column.name, getattr(self, column.name)) for column in fields(self))
        return {name: values for name, values in present if values is not None}

    @classmethod
    def from_matrix(cls, wanted: "LogpColumns", matrix: Tensor) -> "PairLogps":
        """The inverse of `matrix`. `matrix` has shape (pairs, columns)."""
        columns = dict(zip(wanted.names, matrix.unbind(1), strict=True))
        return cls(**{column.name: columns.get(column.name) for column in fields(cls)})  # type: ignore[arg-type]

    def matrix(self) -> Tensor:
        """All columns side by side, without gradient. Shape (pairs, columns), float64."""
        return torch.stack([column.detach().double() for column in self.columns().values()], dim=1)


@dataclass(frozen=True, slots=True)
class LogpColumns:
    """Which of the optional columns of `PairLogps` are present."""

    reference: bool = False
    collision: bool = False
    tails: bool = False

    @classmethod
    def by(cls, needs: Collection[Need], *, has_reference: bool) -> "LogpColumns":
        """The columns that losses with these needs read; the reference also where it is only reported."""
        return cls(has_reference, Need.COLLISION in needs, Need.TAILS in needs)

    @property
    def names(self) -> tuple[str, ...]:
        """The present columns, in the order of `PairLogps`."""
        unwanted = set()
        for name in (column.name for column in fields(PairLogps)):
            for kind, wanted in (("reference", self.reference), ("collision", self.collision), ("tail", self.tails)):
                if kind in name and not wanted:
                    unwanted.add(name)
        return tuple(column.name for column in fields(PairLogps) if column.name not in unwanted)
