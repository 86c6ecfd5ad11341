"""How the pairs of a batch become rows of token ids: segments, position ids, and the states that predict each target.

A *segment* is a stretch of a row that sees nothing outside itself. It has a *trunk* (a shared prompt, or nothing) and
*branches* that continue the trunk and do not see each other. In the shared layout a pair is one segment: the prompt is its
trunk, chosen and rejected are its branches. In the packed layout each side is a segment without a trunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dpocli.data.batch import PairBatch, transfer
from dpocli.data.packing import Layout, Lengths


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a row that sees nothing outside itself."""

    trunk: int
    """Tokens that all branches see; 0 where nothing is shared."""
    branches: Lengths
    """Tokens of each branch, in row order."""

    @property
    def size(self) -> int:
        return self.trunk + sum(self.branches)


@dataclass(slots=True)
class TokenCounter:
    """Counts of tokens that went through a model."""

    computed: int = 0
    """Tokens, with padding and repeated prompts."""
    padding: int = 0
    unique: int = 0
    """Tokens of the pairs, each prompt once."""
    scored: int = 0
    """Tokens of the sides, whose log-probs were computed."""
    attended: float = 0.0
    """(Query, key) pairs of causal attention, each prompt once."""
    splits: int = 0
    """Passes that ran out of memory and were split in two."""
    with_gradient_only: bool = False
    """Whether passes under `torch.no_grad` are not counted."""

    def add(self, batch: PairBatch, rows: "TokenRows") -> None:
        """Count one forward pass over `batch`, laid out as `rows`."""
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
    """The model's input for a batch of pairs, and which of its states predict which tokens."""

    input_ids: Tensor
    """Shape (rows, width), int64."""
    predicting: Tensor
    """Shape (chosen + rejected tokens,): flat indices into (rows · width) of the states that predict the targets."""
    targets: Tensor
    """Shape (chosen + rejected tokens,), int64: all chosen tokens, then all rejected ones."""
    lengths: Lengths
    """Tokens of each row, without padding."""
    position_ids: Tensor | None = None
    """Shape (rows, width), int64: positions within each pair's own sequences; None where they count from the row's start."""
    segments: tuple[Segment, ...] = ()
    """Of the single row; empty in the padded layout."""

    @classmethod
    def of(cls, batch: PairBatch, layout: Layout) -> "TokenRows":
        """Lay out a batch, on the CPU."""
        return _padded(batch) if layout.pads else _one_row(batch, share_prompts=layout is Layout.SHARED)

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
        """The same single row, padded to `width` with one more segment, so that kernels compile for few shapes."""
        missing = width - self.input_ids.shape[1]
        if missing <= 0 or self.position_ids is None:
            return self
        return replace(
            self,
            input_ids=nn.functional.pad(self.input_ids, (0, missing)),
            # All at position 0: larger ones could exceed a position table, or change length-dependent frequencies.
            position_ids=nn.functional.pad(self.position_ids, (0, missing)),
            segments=(*self.segments, Segment(0, (missing,))),
        )

    def scored_columns(self) -> tuple[Tensor, Tensor]:
        """Columns with a state that predicts a target, ascending, and the index into them of each target.

        To be called on the CPU: the number of columns depends on the data, which would synchronize a device.
        """
        columns, index = torch.unique(self.predicting % self.input_ids.shape[1], return_inverse=True)
        return columns, index

    @property
    def inputs(self) -> dict[str, Tensor]:
        """Keyword arguments of the model."""
        positions = {} if self.position_ids is None else {"position_ids": self.position_ids}
        return {"input_ids": self.input_ids} | positions

    @property
    def is_token(self) -> Tensor:
        """What is not padding: shape (rows, width), bool."""
        columns = torch.arange(self.input_ids.shape[1], device=self.input_ids.device)
        return columns < transfer(torch.tensor(self.lengths), columns.device)[:, None]


def _one_row(batch: PairBatch, *, share_prompts: bool) -> TokenRows:
    ids: list[Tensor] = []
    positions: list[Tensor] = []
    segments: list[Segment] = []
    predicting: tuple[list[Tensor], list[Tensor]] = ([], [])
    length = 0
    for prompt, *sides in _pairs(batch):
        for group in ((0, 1),) if share_prompts else ((0,), (1,)):
            ids.append(prompt)
            positions.append(torch.arange(len(prompt)))
            end_of_prompt = length = length + len(prompt)
            for which in group:
                side = sides[which]
                ids.append(side)
                positions.append(torch.arange(len(prompt), len(prompt) + len(side)))
                # The prompt's last state predicts the first token of both sides.
                predicting[which].extend((torch.tensor([end_of_prompt - 1]), torch.arange(len(side) - 1) + length))
                length += len(side)
            branches = tuple(len(sides[which]) for which in group)
            segments.append(
                Segment(len(prompt), branches) if share_prompts else Segment(0, (len(prompt) + branches[0],))
            )
    return TokenRows(
        torch.cat(ids)[None],
        torch.cat([*predicting[0], *predicting[1]]),
        torch.cat([batch.chosen_ids, batch.rejected_ids]),
        lengths=(length,),
        position_ids=torch.cat(positions)[None],
        segments=tuple(segments),
    )


def _padded(batch: PairBatch) -> TokenRows:
    """Padding is on the right, where causal attention never looks: no mask is needed, which is attention's fastest case."""
    pairs = list(_pairs(batch))
    sides = [(prompt, side) for which in (1, 2) for prompt, side in ((pair[0], pair[which]) for pair in pairs)]
    lengths = tuple(len(prompt) + len(side) for prompt, side in sides)
    width = max(lengths)
    predicting = [
        torch.arange(row * width + len(prompt) - 1, row * width + lengths[row] - 1)
        for row, (prompt, _) in enumerate(sides)
    ]
    input_ids = nn.utils.rnn.pad_sequence([torch.cat(side) for side in sides], batch_first=True, padding_value=0)
    targets = torch.cat([batch.chosen_ids, batch.rejected_ids])
    return TokenRows(input_ids, torch.cat(predicting), targets, lengths)


def _pairs(batch: PairBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The token ids of prompt, chosen and rejected, pair by pair."""
    return zip(
        torch.split(batch.prompt_ids, list(batch.prompt_lengths)),
        torch.split(batch.chosen_ids, list(batch.chosen_lengths)),
        torch.split(batch.rejected_ids, list(batch.rejected_lengths)),
        strict=True,
    )
