"""The one path that makes log-probs, in all three commands: a module from a batch of pairs to per-token log-probs.

The module holds the whole model, so that every distributed wrapper can wrap it as its root; what it takes and gives is
ragged and free of padding, so that how the pairs are laid out inside can change without anyone noticing.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpocli.data.batches import Lengths, PairBatch
from dpocli.errors import UsageError
from dpocli.objective.head import Head, LogitMap, token_logps
from dpocli.objective.head_probe import HeadKind, probe_head
from dpocli.objective.logps import TokenLogps


@dataclass(frozen=True, slots=True)
class _PaddedRows:
    """Two rows a pair, prompt + chosen and prompt + rejected, padded on the right.

    A token only sees what stands left of it, so padding on the right reaches nobody: no mask is needed, and without
    one attention takes its fastest form.
    """

    input_ids: Tensor
    """Shape (2 · pairs, longest row)."""
    positions: Tensor
    """Flat indices into (2 · pairs · longest row) of the states that predict the chosen, then the rejected tokens."""
    is_token: Tensor
    """Shape (2 · pairs, longest row), bool: what is no padding."""
    lengths: tuple[int, ...]
    """Tokens of each row."""

    @classmethod
    def of(cls, batch: PairBatch) -> "_PaddedRows":
        device = batch.prompt_ids.device
        prompts = torch.split(batch.prompt_ids, list(batch.prompt_lengths))
        sides = [
            *torch.split(batch.chosen_ids, list(batch.chosen_lengths)),
            *torch.split(batch.rejected_ids, list(batch.rejected_lengths)),
        ]
        rows = [torch.cat(parts) for parts in zip(prompts * 2, sides, strict=True)]
        # Any id pads: nothing looks at it.
        input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
        lengths = tuple(len(row) for row in rows)
        columns = torch.arange(input_ids.shape[1], device=device)
        positions = _predicting_positions(
            batch.prompt_lengths * 2, batch.chosen_lengths + batch.rejected_lengths, input_ids.shape[1]
        )
        return cls(input_ids, positions.to(device), columns < torch.tensor(lengths, device=device)[:, None], lengths)


def _predicting_positions(prompt_lengths: Lengths, side_lengths: Lengths, width: int) -> Tensor:
    """Flat indices of the states one before each token of each side, row after row."""
    spans = [
        torch.arange(row * width + prompt - 1, row * width + prompt - 1 + side)
        for row, (prompt, side) in enumerate(zip(prompt_lengths, side_lengths, strict=True))
    ]
    return torch.cat(spans)


def _halves(values: Tensor, split: int) -> tuple[Tensor, Tensor]:
    # Copies, because distributed wrappers hang their hooks on a module's outputs, and a view could shed them.
    return values[:split].clone(), values[split:].clone()


@dataclass(frozen=True, slots=True)
class RotaryLimit:
    """The length at which a model takes other rotary frequencies, for all rows of a batch at once."""

    tokens: int
    remembers: bool
    """Whether the frequencies also depend on what was scored before (the type "dynamic")."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "RotaryLimit | None":
        """None for models whose frequencies are the same at every length, which are nearly all."""
        config = model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            return None
        tokens = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        return cls(int(tokens), kind == "dynamic")


class PairScorer(nn.Module):
    """Scores pairs with a causal language model: `forward` is the whole way from token ids to log-probs.

    Args:
        model: any model that `AutoModelForCausalLM` loads.
        collision: also give log Σ_v p(v)² per token.
        router_loss: also give the load-balancing loss of a mixture-of-experts router.
    """

    def __init__(self, model: PreTrainedModel, *, collision: bool = False, router_loss: bool = False) -> None:
        super().__init__()
        self.model = model
        self.collision = collision
        self.router_loss = router_loss
        if router_loss and not hasattr(model.config, "num_experts_per_tok"):
            raise UsageError(
                f"--router-aux-loss-coef: {model.config.model_type} has no experts to route to; leave the option out."
            )
        self.head_kind: HeadKind | LogitMap = probe_head(model)
        self.rotary_limit = RotaryLimit.of(model)
        self.num_embeddings: int = model.get_input_embeddings().weight.shape[0]

    def forward(self, batch: PairBatch) -> TokenLogps:
        """Log-probs of every token of both sides, masked ones included.

        Args:
            batch: on the model's device.

        Returns:
            In the order of the batch's ragged tokens; shapes (chosen tokens,) and (rejected tokens,), float32, nats.
        """
        rows = _PaddedRows.of(batch)
        targets = torch.cat([batch.chosen_ids, batch.rejected_ids])
        if isinstance(self.head_kind, LogitMap):
            hidden, router_loss = self._hidden_states(rows)
            logps, collisions = token_logps(hidden, self._head(self.head_kind), targets, collision=self.collision)
        else:
            logps, collisions, router_loss = self._through_own_head(rows, targets)
        split = len(batch.chosen_ids)
        chosen, rejected = _halves(logps, split)
        if collisions is None:
            return TokenLogps(chosen, rejected, router_loss=router_loss)
        return TokenLogps(chosen, rejected, *_halves(collisions, split), router_loss)

    def _head(self, logit_map: LogitMap) -> Head:
        embeddings = self.model.get_output_embeddings()
        return Head(embeddings.weight, getattr(embeddings, "bias", None), logit_map)

    def _hidden_states(self, rows: _PaddedRows) -> tuple[Tensor, Tensor | None]:
        """States that predict the sides' tokens, shape (chosen + rejected tokens, hidden), and the router's loss."""
        options = {"output_router_logits": True} if self.router_loss else {}
        if self.rotary_limit is not None and rows.input_ids.shape[1] > self.rotary_limit.tokens:
            return self._row_by_row(rows).flatten(0, 1)[rows.positions], None
        output = self.model.get_decoder()(input_ids=rows.input_ids, use_cache=False, **options)
        hidden = output.last_hidden_state.flatten(0, 1)[rows.positions]
        return hidden, self._balance(output.router_logits, rows) if self.router_loss else None

    def _row_by_row(self, rows: _PaddedRows) -> Tensor:
        """States of each row scored alone, shape (2 · pairs, longest row, hidden): its length decides its frequencies."""
        assert self.rotary_limit is not None
        if self.rotary_limit.remembers or self.router_loss:
            raise UsageError(
                f"--max-length: rows of more than {self.rotary_limit.tokens:,} tokens change this model's rotary frequencies "
                f"for what is scored beside and after them. Give --max-length {self.rotary_limit.tokens} or less."
            )
        decoder = self.model.get_decoder()
        states = [
            decoder(input_ids=row[None, :length], use_cache=False).last_hidden_state[0]
            for row, length in zip(rows.input_ids, rows.lengths, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(states, batch_first=True)

    def _balance(self, router_logits: tuple[Tensor, ...], rows: _PaddedRows) -> Tensor:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = self.model.config
        num_experts = getattr(config, "num_experts", None) or config.num_local_experts
        loss: Tensor = load_balancing_loss_func(
            router_logits, num_experts, config.num_experts_per_tok, rows.is_token.long()
        )
        return loss

    def _through_own_head(self, rows: _PaddedRows, targets: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The way for heads that fit no known map: the model's own logits, made only at the columns that are scored."""
        width = rows.input_ids.shape[1]
        if self.rotary_limit is not None and width > self.rotary_limit.tokens:
            raise UsageError(
                f"--max-length: give {self.rotary_limit.tokens} or less, beyond which this model is not scored."
            )
        columns, inverse = torch.unique(rows.positions % width, return_inverse=True)
        options = {"output_router_logits": True} if self.router_loss else {}
        output = self.model(input_ids=rows.input_ids, use_cache=False, logits_to_keep=columns, **options)
        scored = output.logits[rows.positions // width, inverse].float()
        log_probs = torch.log_softmax(scored, dim=-1)
        collisions = torch.logsumexp(2 * log_probs.detach(), dim=-1) if self.collision else None
        router_loss = self._balance(output.router_logits, rows) if self.router_loss else None
        return log_probs.gather(-1, targets[:, None])[:, 0], collisions, router_loss
