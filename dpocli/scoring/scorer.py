"""The module that turns a batch of pairs into per-token log-probs, for all three commands.

It contains the whole model, so that distributed wrappers can use it as their root module. Its input and output are ragged,
without padding: the layout of the pairs in rows is internal. Layouts other than the padded one rely on how the model
treats positions and attention; `layout_check` verifies them before they are used.
"""

import platform
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

import dpocli
from dpocli.data.batch import PairBatch, transfer
from dpocli.data.packing import Layout, Packing
from dpocli.errors import UsageError
from dpocli.scoring import attention
from dpocli.scoring.head import Head, LogitMap, token_logps
from dpocli.scoring.head_probe import HeadKind, decoder_of, probe_head
from dpocli.scoring.layout import TokenCounter, TokenRows
from dpocli.scoring.token_logps import TokenLogps


@dataclass(frozen=True, slots=True)
class RotaryLimit:
    """The row length from which a model changes its rotary frequencies, for all rows of the batch."""

    tokens: int
    is_dynamic: bool
    """Whether the frequencies also depend on the rows scored before (the type "dynamic")."""

    @classmethod
    def of(cls, model: PreTrainedModel) -> "RotaryLimit | None":
        """None for models with the same frequencies at every length, which are nearly all."""
        config = model.config.get_text_config()
        parameters = getattr(config, "rope_parameters", None) or {}
        kind = parameters.get("rope_type")
        if kind not in ("longrope", "dynamic"):
            return None
        tokens = parameters.get("original_max_position_embeddings") or config.max_position_embeddings
        return cls(int(tokens), kind == "dynamic")

    def is_exceeded(self, rows: TokenRows) -> bool:
        return not rows.segments and rows.input_ids.shape[1] > self.tokens


class PairScorer(nn.Module):
    """Score pairs with a causal language model, from token ids to log-probs.

    Args:
        model: any model that `AutoModelForCausalLM` loads.
        collision: also compute log Σ_v p(v)² per token.
        router_loss: also compute the load-balancing loss of a mixture-of-experts router.
        token_budget: tokens per forward pass, with padding, that callers are to stay within.
        device: to compute on; by default that of the model's parameters.

    Raises:
        UsageError: `router_loss` with a model that has no experts.
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
        """Whether the weights are not loaded yet."""
        # A blank model is probed in its first forward pass: the weights may be sharded, and are gathered there.
        self.head_kind: HeadKind | LogitMap | None = None if self.is_blank else probe_head(model)
        self.rotary_limit = RotaryLimit.of(model)
        self.num_embeddings: int = model.get_input_embeddings().weight.shape[0]

        self.packing = Packing(Layout.PADDED, token_budget)
        """How callers combine pairs to micro-batches."""
        self.uses_flex = False
        self.rows_alone = False
        """Whether padded rows are computed one by one, for models on which padding has an effect."""
        self.tally = TokenCounter()
        self.compute_dtype = model.dtype
        """Of the forward pass; set by a wrapper that casts."""
        self._current_row = attention.install(model)
        self._plain_attention: str = model.config._attn_implementation

    def lay_out(self, layout: Layout, *, flex: bool = False) -> None:
        """Set the layout of all later passes; it is padded at first.

        Args:
            layout: one known to give this model's log-probs of the padded layout.
            flex: use FlexAttention in one-row layouts.

        Raises:
            ValueError: the model's attention cannot be replaced.
        """
        self._attend_for(layout)
        self.packing = replace(self.packing, layout=layout)
        self.uses_flex = flex and not layout.pads

    @property
    def layout_info(self) -> dict[str, str]:
        """Layout and attention, as recorded beside the values. They affect speed only."""
        attention_of_rows = "flex_attention" if self.uses_flex else "segments"
        layout = self.packing.layout
        name = "one by one" if layout.pads and self.rows_alone else str(layout)
        return {"scoring": name, "attention": self._plain_attention if layout.pads else attention_of_rows}

    def forward(self, batch: PairBatch | Tensor) -> TokenLogps | Tensor:
        """Compute log-probs of every token of both sides, masked ones included.

        Args:
            batch: on the CPU, where it is laid out in rows; or the ids of one sequence, shape (tokens,), to get the model's
                own logits, shape (tokens, vocabulary).

        Returns:
            On `device`, in the order of the batch's ragged tokens; shapes (chosen tokens,) and (rejected tokens,),
            float32, nats.

        Raises:
            UsageError: a row is longer than the limit of rotary frequencies that depend on other rows.
        """
        if isinstance(batch, Tensor):
            self._attend_for(Layout.PADDED)
            logits: Tensor = self.model(input_ids=batch[None].to(self.device), use_cache=False).logits
            return logits[0]
        if self.head_kind is None:
            self._attend_for(Layout.PADDED)
            self.head_kind = probe_head(self.model)
        rows_on_cpu = self._rows(batch)
        rows = rows_on_cpu.to(self.device)
        self._current_row.set(rows, flex=self.uses_flex and bool(rows.segments))
        if isinstance(self.head_kind, LogitMap):
            hidden, router_loss = self._hidden_states(rows)
            head = self._head(self.head_kind)
            # Mamba keeps its residual stream in float32, and casts before its head.
            hidden = hidden.to(head.weight.dtype)
            logps, collisions = token_logps(hidden, head, rows.targets, collision=self.collision)
        else:
            logps, collisions, router_loss = self._through_own_head(rows, rows_on_cpu.scored_columns())
        self.tally.add(batch, rows)
        split = len(batch.chosen_ids)
        columns = (logps,) if collisions is None else (logps, collisions)
        # Copies: distributed wrappers register hooks on a module's outputs, and a view could lose them.
        sides = [side.clone() for column in columns for side in (column[:split], column[split:])]
        return TokenLogps(*sides)._replace(router_loss=router_loss)

    def _rows(self, batch: PairBatch) -> TokenRows:
        layout = self.packing.layout
        if self.rotary_limit is not None and max(batch.longer_lengths) > self.rotary_limit.tokens:
            layout = Layout.PADDED  # in which each row can be scored alone
        self._attend_for(layout)
        rows = TokenRows.of(batch, layout)
        return rows.widened(self.packing.fixed_width(rows.input_ids.shape[1])) if self.uses_flex else rows

    def _attend_for(self, layout: Layout) -> None:
        """Set the attention for the next forward pass, and for its backward pass, which may recompute layers."""
        name = self._plain_attention if layout.pads else attention.NAME
        if self.model.config._attn_implementation != name:
            self.model.set_attn_implementation(name)
            if self.model.config._attn_implementation != name:
                raise ValueError("the model's attention does not go through transformers' attention interface")

    def _head(self, logit_map: LogitMap) -> Head:
        embeddings = self.model.get_output_embeddings()
        return Head(embeddings.weight, getattr(embeddings, "bias", None), logit_map)

    def _hidden_states(self, rows: TokenRows) -> tuple[Tensor, Tensor | None]:
        """States that predict the targets, shape (chosen + rejected tokens, hidden), and the router loss."""
        if self._is_beyond_rotary_limit(rows) or (self.rows_alone and not rows.segments):
            return self._row_by_row(rows).flatten(0, 1)[rows.predicting], None
        output = decoder_of(self.model)(**rows.inputs, **self._model_options)
        return output.last_hidden_state.flatten(0, 1)[rows.predicting], self._router_loss(output, rows)

    @property
    def _model_options(self) -> dict[str, bool]:
        return {"use_cache": False} | ({"output_router_logits": True} if self.router_loss else {})

    def _is_beyond_rotary_limit(self, rows: TokenRows) -> bool:
        limit = self.rotary_limit
        if limit is None or not limit.is_exceeded(rows):
            return False
        if limit.is_dynamic or self.router_loss:
            raise UsageError(
                f"--max-length: rows of more than {limit.tokens:,} tokens change this model's rotary frequencies for the "
                f"rows scored with and after them. Give --max-length {limit.tokens} or less."
            )
        return True

    def _row_by_row(self, rows: TokenRows) -> Tensor:
        """States of each row scored alone: shape (rows, width, hidden)."""
        if self.router_loss:
            raise UsageError(
                f"--router-aux-loss-coef: padding changes what {self.model.config.model_type} computes, so its rows are scored "
                "one by one, and the router's loss of a batch is not defined. Leave the option out."
            )
        decoder = decoder_of(self.model)
        states = [
            decoder(input_ids=row[None, :length], use_cache=False).last_hidden_state[0]
            for row, length in zip(rows.input_ids, rows.lengths, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(states, batch_first=True)

    def _router_loss(self, output: ModelOutput, rows: TokenRows) -> Tensor | None:
        if not self.router_loss:
            return None
        from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

        config = self.model.config
        num_experts = getattr(config, "num_experts", None) or config.num_local_experts
        loss: Tensor = load_balancing_loss_func(
            output["router_logits"], num_experts, config.num_experts_per_tok, rows.is_token.long()
        )
        return loss

    def _through_own_head(
        self, rows: TokenRows, scored_columns: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Log-probs, collisions and router loss from the model's own logits, computed at the scored columns only.

        For heads that no `LogitMap` describes.
        """
        width = rows.input_ids.shape[1]
        if self.rotary_limit is not None and self.rotary_limit.is_exceeded(rows):
            raise UsageError(
                f"--max-length: give {self.rotary_limit.tokens} or less; this model cannot be scored beyond."
            )
        columns, index = (transfer(tensor, self.device) for tensor in scored_columns)
        if self.rows_alone and not rows.segments:
            logits = [
                self.model(input_ids=row[None, :length], use_cache=False).logits[0]
                for row, length in zip(rows.input_ids, rows.lengths, strict=True)
            ]
            return *self._from_logits(
                nn.utils.rnn.pad_sequence(logits, batch_first=True).flatten(0, 1)[rows.predicting], rows
            ), None
        output = self.model(**rows.inputs, **self._model_options, logits_to_keep=columns)
        row, num_columns = rows.predicting // width, output.logits.shape[1]
        if num_columns == width:  # the model ignores `logits_to_keep`
            index = rows.predicting % width
        elif num_columns != len(columns):
            raise UsageError(
                f"--model: {self.model.config.model_type} returns logits of {num_columns} positions where {len(columns)} of "
                f"{width} were asked for, so its log-probs cannot be read. It cannot be used."
            )
        return *self._from_logits(output.logits[row, index], rows), self._router_loss(output, rows)

    def _from_logits(self, logits: Tensor, rows: TokenRows) -> tuple[Tensor, Tensor | None]:
        """Log-probs of the targets and collisions, from logits of shape (targets, vocabulary)."""
        log_probs = torch.log_softmax(logits.float(), dim=-1)
        collisions = torch.logsumexp(2 * log_probs.detach(), dim=-1) if self.collision else None
        return log_probs.gather(-1, rows.targets[:, None])[:, 0], collisions


def environment(device: torch.device, scorer: PairScorer | None = None) -> dict[str, str]:
    """Versions, hardware, layout and attention, as recorded beside the values.

    Args:
        device: that computes.
        scorer: adds its layout and attention.
    """
    import transformers

    return {
        "dpocli": dpocli.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
    } | (scorer.layout_info if scorer else {})
