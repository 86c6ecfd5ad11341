"""The one path that makes log-probs, in all three commands: a module from a batch of pairs to per-token log-probs.

The module holds the whole model, so that every distributed wrapper can wrap it as its root; what it takes and gives is
ragged and free of padding, so that how the pairs are laid out inside can change without anyone noticing. Its faster
layouts rest on what a model does with positions and attention, which `engine.exactness` checks before they are used.
"""

import platform
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import dpocli
from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout, Packing
from dpocli.errors import UsageError
from dpocli.scoring import attention
from dpocli.scoring.head import Head, LogitMap, token_logps
from dpocli.scoring.head_probe import HeadKind, probe_head
from dpocli.scoring.layout import TokenCounter, TokenRows
from dpocli.scoring.token_logps import TokenLogps


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
        token_budget: tokens of a forward pass, padding included, that callers are asked to stay within.
        device: to compute on, where that is not where the model's parameters are.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        collision: bool = False,
        router_loss: bool = False,
        token_budget: int = 1024,
        device: torch.device | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.collision = collision
        self.router_loss = router_loss
        if router_loss and not hasattr(model.config, "num_experts_per_tok"):
            raise UsageError(
                f"--router-aux-loss-coef: {model.config.model_type} has no experts to route to; leave the option out."
            )
        self.device = device or model.device
        self.is_blank = any(parameter.is_meta for parameter in model.parameters())
        """Whether the weights are still to come."""
        # Where they are, they may also be in pieces, which come together in a forward pass.
        self.head_kind: HeadKind | LogitMap | None = None if self.is_blank else probe_head(model)
        self.rotary_limit = RotaryLimit.of(model)
        self.num_embeddings: int = model.get_input_embeddings().weight.shape[0]

        self.packing = Packing(Layout.PADDED, token_budget)
        """How callers put pairs together for a forward pass."""
        self.uses_flex = False
        self.tally = TokenCounter()
        self.compute_dtype = model.dtype
        """Of the forward pass; a wrapper that changes it says so."""
        self._current_row = attention.install(model)
        self._plain_attention: str = model.config._attn_implementation

    def lay_out(self, layout: Layout, *, flex: bool = False) -> None:
        """Sets how pairs are laid out from now on; at first they are padded.

        Args:
            layout: one in which this model is known to give the values of the padded one.
            flex: compute one-row layouts with FlexAttention.

        Raises:
            ValueError: the model does not let its attention be replaced.
        """
        self._attend_for(layout)
        self.packing = replace(self.packing, layout=layout)
        self.uses_flex = flex and not layout.pads

    @property
    def way(self) -> dict[str, str]:
        """How pairs are scored: information, never a reason to refuse a value."""
        attention_of_rows = "flex_attention" if self.uses_flex else "segments"
        layout = self.packing.layout
        return {"scoring": str(layout), "attention": self._plain_attention if layout.pads else attention_of_rows}

    def forward(self, batch: PairBatch) -> TokenLogps:
        """Log-probs of every token of both sides, masked ones included.

        Args:
            batch: on the CPU, where it is laid out.

        Returns:
            On the model's device, in the order of the batch's ragged tokens; shapes (chosen tokens,) and (rejected
            tokens,), float32, nats.
        """
        if self.head_kind is None:
            self._attend_for(Layout.PADDED)
            self.head_kind = probe_head(self.model)
        rows = self._rows(batch).to(self.device)
        self._current_row.set(rows, flex=self.uses_flex and bool(rows.segments))
        if isinstance(self.head_kind, LogitMap):
            hidden, router_loss = self._hidden_states(rows)
            logps, collisions = token_logps(hidden, self._head(self.head_kind), rows.targets, collision=self.collision)
        else:
            logps, collisions, router_loss = self._through_own_head(rows)
        self.tally.add(batch, rows)
        split = len(batch.chosen_ids)
        chosen, rejected = _halves(logps, split)
        if collisions is None:
            return TokenLogps(chosen, rejected, router_loss=router_loss)
        return TokenLogps(chosen, rejected, *_halves(collisions, split), router_loss)

    def _rows(self, batch: PairBatch) -> TokenRows:
        layout = self.packing.layout
        if self.rotary_limit is not None and max(batch.longer_lengths) > self.rotary_limit.tokens:
            layout = Layout.PADDED  # in which each row can go alone
        self._attend_for(layout)
        rows = TokenRows.of(batch, layout)
        return rows.widened(self.packing.fixed_width(rows.input_ids.shape[1])) if self.uses_flex else rows

    def _attend_for(self, layout: Layout) -> None:
        """Stays until the next forward pass, since the backward pass may compute layers again."""
        name = self._plain_attention if layout.pads else attention.NAME
        if self.model.config._attn_implementation != name:
            self.model.set_attn_implementation(name)
            if self.model.config._attn_implementation != name:
                raise ValueError("the model's attention does not go through transformers' attention interface")

    def _head(self, logit_map: LogitMap) -> Head:
        embeddings = self.model.get_output_embeddings()
        return Head(embeddings.weight, getattr(embeddings, "bias", None), logit_map)

    def _hidden_states(self, rows: TokenRows) -> tuple[Tensor, Tensor | None]:
        """States that predict the sides' tokens, shape (chosen + rejected tokens, hidden), and the router's loss."""
        options = {"output_router_logits": True} if self.router_loss else {}
        if self.rotary_limit is not None and not rows.segments and rows.input_ids.shape[1] > self.rotary_limit.tokens:
            return self._row_by_row(rows).flatten(0, 1)[rows.predicting], None
        output = self.model.get_decoder()(**rows.inputs, use_cache=False, **options)
        hidden = output.last_hidden_state.flatten(0, 1)[rows.predicting]
        return hidden, self._balance(output.router_logits, rows) if self.router_loss else None

    def _row_by_row(self, rows: TokenRows) -> Tensor:
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

    def _balance(self, router_logits: tuple[Tensor, ...], rows: TokenRows) -> Tensor:
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = self.model.config
        num_experts = getattr(config, "num_experts", None) or config.num_local_experts
        loss: Tensor = load_balancing_loss_func(
            router_logits, num_experts, config.num_experts_per_tok, rows.is_token.long()
        )
        return loss

    def _through_own_head(self, rows: TokenRows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """The way for heads that fit no known map: the model's own logits, made only at the columns that are scored."""
        width = rows.input_ids.shape[1]
        if self.rotary_limit is not None and not rows.segments and width > self.rotary_limit.tokens:
            raise UsageError(
                f"--max-length: give {self.rotary_limit.tokens} or less, beyond which this model is not scored."
            )
        columns, inverse = torch.unique(rows.predicting % width, return_inverse=True)
        options = {"output_router_logits": True} if self.router_loss else {}
        output = self.model(**rows.inputs, use_cache=False, logits_to_keep=columns, **options)
        scored = output.logits[rows.predicting // width, inverse].float()
        log_probs = torch.log_softmax(scored, dim=-1)
        collisions = torch.logsumexp(2 * log_probs.detach(), dim=-1) if self.collision else None
        router_loss = self._balance(output.router_logits, rows) if self.router_loss else None
        return log_probs.gather(-1, rows.targets[:, None])[:, 0], collisions, router_loss


def environment(device: torch.device, scorer: PairScorer | None = None) -> dict[str, str]:
    """Versions, hardware and way of scoring: information beside values, never a reason to refuse them."""
    import transformers

    return {
        "dpocli": dpocli.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    } | (scorer.way if scorer else {})
