"""Pairs laid out in rows: which tokens stand where, who may see whom, and which states predict what is scored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from dpocli.data.batch import PairBatch, transfer
from dpocli.data.packing import Layout, Lengths


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row that sees nothing outside itself: a trunk, and branches that each continue it."""

    trunk: int
    """Tokens that all branches see; 0 where nothing is shared."""
    branches: Lengths
    """Tokens of each branch, in their order in the row; they do not see each other."""

    @property
    def size(self) -> int:
        return self.trunk + sum(self.branches)


@dataclass(slots=True)
class TokenCounter:
    """What went through a model."""

    computed: int = 0
    """Tokens, padding and repeated prompts included."""
    padding: int = 0
    unique: int = 0
    """Tokens of the pairs, each prompt once."""
    scored: int = 0
    """Tokens of the sides, whose log-probs were taken."""
    attended: float = 0.0
    """(Query, key) pairs that attention has to look at, each prompt once."""
    splits: int = 0
    """Passes that did not fit into memory, and were made in two."""
    with_gradient_only: bool = False
    """Whether passes without a graph are left out."""

    def add(self, batch: PairBatch, rows: "TokenRows") -> None:
        if self.with_gradient_only and not torch.is_grad_enabled():
            return
        self.computed += rows.input_ids.numel()
        self.padding += rows.input_ids.numel() - sum(rows.lengths)
        self.unique += batch.num_tokens
        self.scored += len(rows.targets)
        for prompt, *sides in zip(batch.prompt_lengths, batch.chosen_lengths, batch.rejected_lengths, strict=True):
            self.attended += prompt * prompt / 2 + sum(side * (prompt + side / 2) for side in sides)


@dataclass(frozen=True, slots=True)
class TokenRows:
    """What goes through the model for a batch of pairs."""

    input_ids: Tensor
    """Shape (rows, width), int64."""
    predicting: Tensor
    """Shape (chosen + rejected tokens,): flat indices into (rows · width) of the states that predict them."""
    targets: Tensor
    """Shape (chosen + rejected tokens,), int64: all chosen tokens, then all rejected ones."""
    lengths: Lengths
    """Tokens of each row, without padding."""
    position_ids: Tensor | None = None
    """Shape (rows, width), int64: places in the pair's own sequences; None where they count from the row's start."""
    segments: tuple[Segment, ...] = ()
    """Of the one row; empty where pairs have rows of their own."""

    @classmethod
    def of(cls, batch: PairBatch, layout: Layout) -> "TokenRows":
        """The rows of a batch, on the CPU as it is."""
        match layout:
            case Layout.SHARED:
                return _shared(batch)
            case Layout.PACKED:
                return _packed(batch)
            case Layout.PADDED:
                return _padded(batch)

    def to(self, device: torch.device) -> "TokenRows":
        """The same rows on `device`."""
        return replace(
            self,
            input_ids=transfer(self.input_ids, device),
            predicting=transfer(self.predicting, device),
            targets=transfer(self.targets, device),
            position_ids=None if self.position_ids is None else transfer(self.position_ids, device),
        )

    def widened(self, width: int) -> "TokenRows":
        """The same one row with padding up to `width`, as a segment of its own: kernels then see few shapes."""
        missing = width - self.input_ids.shape[1]
        if missing <= 0 or self.position_ids is None:
            return self
        return replace(
            self,
            input_ids=nn.functional.pad(self.input_ids, (0, missing)),
            # All at 0: positions beyond those of the pairs could leave a model's table, or change its frequencies.
            position_ids=nn.functional.pad(self.position_ids, (0, missing)),
            segments=(*self.segments, Segment(0, (missing,))),
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keywords of the model."""
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids} | positions

    @property
    def is_token(self) -> Tensor:
        """What is no padding: shape (rows, width), bool."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return columns < torch.tensor(self.lengths, device=columns.device)[:, None]


@dataclass(slots=True)
class _RowUnderWay:
    """One row of many segments, put together piece by piece."""

    pieces: list[Tensor] = field(default_factory=list)
    positions: list[Tensor] = field(default_factory=list)
    segments: list[Segment] = field(default_factory=list)
    states: tuple[list[Tensor], list[Tensor]] = field(default_factory=lambda: ([], []))
    """Places that predict the tokens of the chosen and of the rejected sides."""
    length: int = 0

    def add(self, segment: Segment, pieces: Sequence[Tensor], positions: Sequence[Tensor]) -> None:
        self.segments.append(segment)
        self.pieces += pieces
        self.positions += positions
        self.length += segment.size

    def finished(self, batch: PairBatch) -> TokenRows:
        chosen, rejected = self.states
        return TokenRows(
            torch.cat(self.pieces)[None],
            torch.cat([*chosen, *rejected]),
            _targets(batch),
            lengths=(self.length,),
            position_ids=torch.cat(self.positions)[None],
            segments=tuple(self.segments),
        )


def _shared(batch: PairBatch) -> TokenRows:
    row = _RowUnderWay()
    of_chosen, of_rejected = row.states
    for prompt, chosen, rejected in _pairs(batch):
        trunk, start = len(prompt), row.length
        end_of_chosen = trunk + len(chosen)
        # The prompt's last state predicts the first token of either side.
        of_chosen.append(torch.arange(start + trunk - 1, start + end_of_chosen - 1))
        of_rejected += [torch.tensor([start + trunk - 1]), torch.arange(len(rejected) - 1) + start + end_of_chosen]
        row.add(
            Segment(trunk, (len(chosen), len(rejected))),
            [prompt, chosen, rejected],
            [torch.arange(end_of_chosen), torch.arange(trunk, trunk + len(rejected))],
        )
    return row.finished(batch)


def _packed(batch: PairBatch) -> TokenRows:
    row = _RowUnderWay()
    for prompt, *sides in _pairs(batch):
        for side, states in zip(sides, row.states, strict=True):
            length = len(prompt) + len(side)
            states.append(torch.arange(row.length + len(prompt) - 1, row.length + length - 1))
            row.add(Segment(0, (length,)), [prompt, side], [torch.arange(length)])
    return row.finished(batch)


def _padded(batch: PairBatch) -> TokenRows:
    """A token only sees what stands left of it, so padding on the right reaches nobody: no mask is needed, and without
    one attention takes its fastest form."""
    pairs = list(_pairs(batch))
    sides = [(prompt, side) for which in (1, 2) for prompt, side in ((pair[0], pair[which]) for pair in pairs)]
    lengths = tuple(len(prompt) + len(side) for prompt, side in sides)
    width = max(lengths)
    states = [
        torch.arange(row * width + len(prompt) - 1, row * width + lengths[row] - 1)
        for row, (prompt, _) in enumerate(sides)
    ]
    # Any id pads: nothing looks at it.
    input_ids = nn.utils.rnn.pad_sequence([torch.cat(side) for side in sides], batch_first=True, padding_value=0)
    return TokenRows(input_ids, torch.cat(states), _targets(batch), lengths)


def _pairs(batch: PairBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The token ids of prompt, chosen and rejected, pair by pair."""
    return zip(
        torch.split(batch.prompt_ids, list(batch.prompt_lengths)),
        torch.split(batch.chosen_ids, list(batch.chosen_lengths)),
        torch.split(batch.rejected_ids, list(batch.rejected_lengths)),
        strict=True,
    )


def _targets(batch: PairBatch) -> Tensor:
    return torch.cat([batch.chosen_ids, batch.rejected_ids])
