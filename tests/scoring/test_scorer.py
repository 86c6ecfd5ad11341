"""The scoring path against a plain `model(input_ids)` with log_softmax in float64, for every tiny architecture."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout, Packing, pack
from dpocli.data.preference import EncodedPair, TokenIds
from dpocli.errors import UsageError
from dpocli.objective.logps import LogpColumns
from dpocli.scoring import head as head_module
from dpocli.scoring.head import Head, LogitMap, token_logps
from dpocli.scoring.head_probe import HeadKind
from dpocli.scoring.scorer import PairScorer
from dpocli.scoring.token_logps import pair_logps
from tests.support.pairs import random_pairs
from tests.support.tiny_models import FAMILIES, build, families, length_dependent

BATCHING_TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
"""Nats per token in float32: what another batch shape may change."""


def plain_logps(model: PreTrainedModel, prompt: TokenIds, side: TokenIds) -> Tensor:
    """The oracle: one sequence, all logits, log-softmax in float64."""
    ids = torch.from_numpy(np.concatenate([prompt, side]).astype(np.int64))[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0].double()
    log_probs = torch.log_softmax(logits, dim=-1)
    return log_probs[len(prompt) - 1 : -1].gather(-1, ids[0, len(prompt) :, None])[:, 0]


def plain_batch(model: PreTrainedModel, pairs: Sequence[EncodedPair]) -> tuple[Tensor, Tensor]:
    chosen = [plain_logps(model, pair.prompt_ids, pair.chosen_ids) for pair in pairs]
    rejected = [plain_logps(model, pair.prompt_ids, pair.rejected_ids) for pair in pairs]
    return torch.cat(chosen), torch.cat(rejected)


@pytest.mark.parametrize("family", families(FAMILIES))
def test_every_architecture_agrees_with_the_plain_model_in_float64(family: str) -> None:
    model = build(family)
    pairs = random_pairs(5, longest=20)
    scorer = PairScorer(model)
    with torch.no_grad():
        tokens = scorer(PairBatch.of(pairs))
    chosen, rejected = plain_batch(model, pairs)
    assert scorer.head_kind is not HeadKind.OWN
    assert tokens.chosen.std() > 0.1, "a model this flat would hide a wrong map"
    torch.testing.assert_close(tokens.chosen.double(), chosen, **BATCHING_TOLERANCE)
    torch.testing.assert_close(tokens.rejected.double(), rejected, **BATCHING_TOLERANCE)


def test_an_unknown_map_behind_the_head_falls_back_to_the_models_own_logits() -> None:
    model = build("llama-untied")
    plain_forward = type(model).forward

    class Squared(type(model)):  # type: ignore[misc]
        def forward(self, *args: object, **kwargs: object) -> object:
            output = plain_forward(self, *args, **kwargs)
            output.logits = output.logits + 0.01 * output.logits**2
            return output

    model.__class__ = Squared
    pairs = random_pairs(3)
    scorer = PairScorer(model, collision=True)
    assert scorer.head_kind is HeadKind.OWN
    with torch.no_grad():
        tokens = scorer(PairBatch.of(pairs))
    chosen, rejected = plain_batch(model, pairs)
    torch.testing.assert_close(tokens.chosen.double(), chosen, **BATCHING_TOLERANCE)
    torch.testing.assert_close(tokens.rejected.double(), rejected, **BATCHING_TOLERANCE)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2-capped", "cohere-scaled", "gptj-biased"])
def test_gradients_agree_with_the_plain_model(family: str) -> None:
    pairs = random_pairs(3, longest=10)
    model = build(family)
    tokens = PairScorer(model)(PairBatch.of(pairs))
    weights = torch.linspace(-1, 1, len(tokens.chosen))
    (tokens.chosen * weights).sum().backward()
    ours = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    oracle = []
    for pair in pairs:
        ids = torch.from_numpy(np.concatenate([pair.prompt_ids, pair.chosen_ids]).astype(np.int64))[None]
        log_probs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)
        start = len(pair.prompt_ids)
        oracle.append(log_probs[start - 1 : -1].gather(-1, ids[0, start:, None])[:, 0])
    (torch.cat(oracle) * weights).sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=2e-4, atol=2e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_the_result_does_not_depend_on_how_pairs_are_batched() -> None:
    model = build("llama-tied")
    pairs = random_pairs(16, longest=30, masked=True)
    scorer = PairScorer(model, collision=True)
    with torch.no_grad():
        alone = [scorer(PairBatch.of([pair])) for pair in pairs]
        for budget in (1, 64, 200, 10_000):
            sizes = [Layout.PADDED.size(*map(len, p.all_ids)) for p in pairs]
            for batch in pack(sizes, Packing(Layout.PADDED, budget)):
                tokens = scorer(PairBatch.of([pairs[i] for i in batch]))
                for column in ("chosen", "rejected", "chosen_collision", "rejected_collision"):
                    expected = torch.cat([getattr(alone[i], column) for i in batch])
                    torch.testing.assert_close(getattr(tokens, column), expected, **BATCHING_TOLERANCE)


def test_collision_is_the_log_sum_of_squared_probabilities() -> None:
    model = build("llama-untied")
    (pair,) = random_pairs(1, longest=20)
    tokens = PairScorer(model, collision=True)(PairBatch.of([pair]))
    ids = torch.from_numpy(np.concatenate([pair.prompt_ids, pair.chosen_ids]).astype(np.int64))[None]
    log_probs = torch.log_softmax(model(input_ids=ids).logits[0].double(), dim=-1)[len(pair.prompt_ids) - 1 : -1]
    assert tokens.chosen_collision is not None
    assert not tokens.chosen_collision.requires_grad
    torch.testing.assert_close(
        tokens.chosen_collision.double(), torch.logsumexp(2 * log_probs, dim=-1), rtol=1e-5, atol=1e-5
    )


def test_masked_tokens_are_scored_but_not_summed() -> None:
    model = build("llama-untied")
    pairs = random_pairs(4, masked=True, reference=True)
    batch = PairBatch.of(pairs)
    with torch.no_grad():
        tokens = PairScorer(model)(batch)
    sums = pair_logps(tokens, batch, pairs, LogpColumns(reference=True))
    for index, pair in enumerate(pairs):
        chosen = plain_logps(model, pair.prompt_ids, pair.chosen_ids)
        torch.testing.assert_close(
            sums.policy_chosen[index], chosen[torch.from_numpy(pair.chosen_mask)].sum(), rtol=1e-5, atol=1e-4
        )
        assert sums.reference_rejected is not None
        assert sums.reference_rejected[index].item() == pytest.approx(pair.reference_sums[1], abs=1e-9)
        assert sums.chosen_tokens[index] == pair.num_chosen_tokens


def test_the_head_is_never_larger_than_a_tile() -> None:
    """A vocabulary of 49k at 2 × 40 positions: the plain way would hold 15 MB of float32 logits, a tile is 8 MB / 12."""
    seen: list[torch.Size] = []

    class Diagnostics(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = function(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.dim() == 2:
                seen.append(result.shape)
            return result

    from tests.support.tiny_models import llama

    torch.manual_seed(0)
    model = llama(vocab_size=49_152)
    scorer = PairScorer(model)
    with Diagnostics():
        tokens = scorer(PairBatch.of(random_pairs(2, longest=40)))
        tokens.chosen.sum().backward()
    weight_shapes = {tuple(p.shape) for p in model.parameters()} | {
        tuple(reversed(p.shape)) for p in model.parameters()
    }
    assert max(s[0] * s[1] for s in seen if tuple(s) not in weight_shapes) <= 1024 * 2048


def test_the_routers_loss_is_the_models_own() -> None:
    model = build("qwen3-moe")
    pairs = random_pairs(3)
    tokens = PairScorer(model, router_loss=True)(PairBatch.of(pairs))
    assert tokens.router_loss is not None
    assert tokens.router_loss.requires_grad
    sides = [(pair.prompt_ids, getattr(pair, name)) for name in ("chosen_ids", "rejected_ids") for pair in pairs]
    rows = [np.concatenate(parts) for parts in sides]
    padded = torch.nn.utils.rnn.pad_sequence([torch.from_numpy(r.astype(np.int64)) for r in rows], batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones(len(r), dtype=torch.long) for r in rows], batch_first=True)
    expected = model(input_ids=padded, attention_mask=mask, output_router_logits=True).aux_loss
    torch.testing.assert_close(tokens.router_loss, expected, rtol=1e-5, atol=1e-5)


def test_frequencies_that_depend_on_the_length_do_not_leak_to_other_rows() -> None:
    """A long row changes them for its whole batch; each row must be scored with the frequencies of its own length."""
    model = length_dependent("longrope")
    pairs = random_pairs(12, longest=14)
    assert {pair.num_tokens_longer > 16 for pair in pairs} == {True, False}
    with torch.no_grad():
        tokens = PairScorer(model)(PairBatch.of(pairs))
    chosen, rejected = plain_batch(model, pairs)
    torch.testing.assert_close(tokens.chosen.double(), chosen, **BATCHING_TOLERANCE)
    torch.testing.assert_close(tokens.rejected.double(), rejected, **BATCHING_TOLERANCE)


def test_frequencies_that_depend_on_what_came_before_are_refused_beyond_their_limit() -> None:
    scorer = PairScorer(length_dependent("dynamic"))
    short, long = random_pairs(1, longest=5), random_pairs(1, seed=3, longest=40)
    scorer(PairBatch.of(short))
    with pytest.raises(UsageError, match="Give --max-length 16 or less"):
        scorer(PairBatch.of(long))


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_a_frozen_head_gives_the_values_and_gradients_of_a_trained_one(
    cap: float | None, with_bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over several tiles, the last of them smaller."""
    monkeypatch.setattr(head_module, "CPU_TILE", (7, 13))
    torch.manual_seed(0)
    weight, bias = torch.randn(61, 8), torch.randn(61) if with_bias else None
    targets, direction = torch.randint(61, (20,)), torch.randn(20)
    results = []
    for is_frozen in (False, True):
        hidden = torch.randn(20, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        head = Head(weight.clone().requires_grad_(not is_frozen), bias, LogitMap(scale=1.5, cap=cap))
        logps, _ = token_logps(hidden, head, targets)
        assert ("Frozen" in type(logps.grad_fn).__name__) is is_frozen
        (logps * direction).sum().backward()
        results.append((logps.detach(), hidden.grad))
    for trained, frozen in zip(*results, strict=True):
        torch.testing.assert_close(frozen, trained, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bytes_kept", [0, 10**9])
def test_logits_that_are_kept_change_nothing(bytes_kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "CPU_TILE", (7, 13))
    monkeypatch.setattr(head_module, "CPU_CACHED_BYTES", bytes_kept)
    torch.manual_seed(0)
    hidden, weight = torch.randn(20, 8, requires_grad=True), torch.randn(61, 8, requires_grad=True)
    targets = torch.randint(61, (20,))
    logps, _ = token_logps(hidden, Head(weight, None, LogitMap(cap=4.0)), targets)
    found = torch.autograd.grad(logps.sum(), (hidden, weight), retain_graph=True)
    again = torch.autograd.grad(logps.sum(), (hidden, weight))
    logits = 4.0 * torch.tanh(hidden @ weight.T / 4.0)
    plain = torch.log_softmax(logits, -1).gather(-1, targets[:, None]).sum()
    for expected, *gradients in zip(torch.autograd.grad(plain, (hidden, weight)), found, again, strict=True):
        for gradient in gradients:
            torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("head", ["known", "own"])
@pytest.mark.parametrize("layout", [Layout.SHARED, Layout.PACKED])
def test_nothing_is_read_back_from_the_device(layout: Layout, head: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the meta device, whose tensors have no values: what would wait for a device to give one raises.

    In the padded layout transformers itself looks for packed sequences.
    """
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)  # needs an accelerator
    scorer = PairScorer(build("llama-untied").to("meta"), collision=True)
    scorer.head_kind = HeadKind.OWN if head == "own" else LogitMap()
    scorer.lay_out(layout)
    pairs = random_pairs(4, masked=True, reference=True)
    batch = PairBatch.of(pairs)
    logps = pair_logps(scorer(batch), batch, pairs, LogpColumns(reference=True, collision=True, tails=True))
    assert {column.device.type for column in logps.columns().values()} == {"meta"}
    (logps.policy_chosen.sum() - logps.policy_rejected.sum()).backward()
    assert all(parameter.grad is not None for parameter in scorer.parameters())
