"""Rows of several pairs give the values and the gradients of one padded row a side, whatever the model's attention does."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpocli.config.options import ModelOptions
from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.model.identity import ModelFiles
from dpocli.model.load import load_model, without_dropout
from dpocli.scoring import attention
from dpocli.scoring.head_probe import HeadKind
from dpocli.scoring.scorer import PairScorer
from tests.scoring.test_scorer import BATCHING_TOLERANCE, plain_batch
from tests.support.pairs import random_pairs
from tests.support.sized_pairs import pairs_of
from tests.support.tiny_models import FAMILIES, TRAPS, WINDOW, build, families, length_dependent

WITHOUT_INTERFACE = {"gptj-biased"}
REPLACEABLE = [family for family in (*FAMILIES, *TRAPS) if family not in WITHOUT_INTERFACE]
ONE_ROW = [Layout.SHARED, Layout.PACKED]
GRADIENT_TOLERANCE = {"rtol": 2e-4, "atol": 2e-5}


def awkward_pairs() -> list[EncodedPair]:
    """Several for one row: shorter and much longer than the window, ending where it does, and parts of one token."""
    return pairs_of(
        (1, 9, 4), (30, 1, 1), (WINDOW, 7, 2 * WINDOW), (WINDOW - 1, 1, 20), (1, 1, 1), (28, 31, 17), (5, WINDOW - 4, 6),
        (2, WINDOW - 2, WINDOW - 1),
    )  # fmt: skip


def scorer_of(model: PreTrainedModel, layout: Layout) -> PairScorer:
    scorer = PairScorer(model)
    scorer.lay_out(layout)
    return scorer


def gradients(scorer: PairScorer, batch: PairBatch) -> dict[str, Tensor]:
    """Of a sum in which every token weighs something else."""
    without_dropout(scorer.model)
    tokens = scorer(batch)
    loss = (tokens.chosen * torch.linspace(-1, 2, len(tokens.chosen))).sum()
    loss = loss - (tokens.rejected * torch.linspace(-2, 1, len(tokens.rejected))).sum()
    loss.backward()
    return {name: p.grad for name, p in scorer.model.named_parameters() if p.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = float(gradient.abs().max().clamp(min=1.0))
        torch.testing.assert_close(
            found[name] / scale, gradient / scale, **GRADIENT_TOLERANCE, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_same(found: Sequence[Tensor], expected: Sequence[Tensor]) -> None:
    for side, expected_side in zip(found, expected, strict=True):
        torch.testing.assert_close(side.double(), expected_side.double(), **BATCHING_TOLERANCE)


@pytest.mark.parametrize("family", families(REPLACEABLE))
def test_every_layout_gives_the_values_of_one_sequence_at_a_time(family: str) -> None:
    pairs = awkward_pairs()
    oracle = build(family)
    oracle.set_attn_implementation("eager")
    expected = plain_batch(oracle, pairs)
    assert expected[0].std() > 0.1, "a model this flat would hide a wrong mask"
    scorer = PairScorer(build(family))
    for layout in Layout:
        scorer.lay_out(layout)
        with torch.no_grad():
            tokens = scorer(PairBatch.of(pairs))
        assert_same((tokens.chosen, tokens.rejected), expected)


@pytest.mark.parametrize("layout", ONE_ROW)
@pytest.mark.parametrize("family", families(REPLACEABLE))
def test_gradients_are_those_of_the_padded_layout(family: str, layout: Layout) -> None:
    batch = PairBatch.of(awkward_pairs())
    expected = gradients(scorer_of(build(family), Layout.PADDED), batch)
    found = gradients(scorer_of(build(family), layout), batch)
    assert_same_gradients(found, expected)


@pytest.mark.parametrize("layout", ONE_ROW)
@pytest.mark.parametrize("family", families(["llama-tied", "qwen3-moe", "gpt2", *list(TRAPS)[:5]]))
def test_layers_computed_again_in_the_backward_pass_see_the_same_row(family: str, layout: Layout) -> None:
    batch = PairBatch.of(awkward_pairs())
    expected = gradients(scorer_of(build(family), Layout.PADDED), batch)
    model = build(family)
    model.train()
    # The name changed in transformers 5.2x.
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    enable({"use_reentrant": False})
    scorer = scorer_of(model, layout)
    computed: list[nn.Module] = []
    for module in model.modules():
        if type(module).__name__.endswith("Attention"):
            module.register_forward_hook(lambda module, *_: computed.append(module))
    assert_same_gradients(gradients(scorer, batch), expected)
    assert len(computed) == 2 * len(set(computed)) > 0


def test_padding_behind_the_last_segment_changes_nothing() -> None:
    pairs = awkward_pairs()
    expected = plain_batch(build("mistral-window"), pairs)
    scorer = scorer_of(build("mistral-window"), Layout.SHARED)
    plain_rows = scorer._rows
    scorer._rows = lambda batch: plain_rows(batch).widened(1024)  # type: ignore[method-assign]
    with torch.no_grad():
        tokens = scorer(PairBatch.of(pairs))
    assert scorer.tally.padding == 1024 - PairBatch.of(pairs).num_tokens
    assert_same((tokens.chosen, tokens.rejected), expected)


@pytest.mark.parametrize("family", ["llama-tied", "gemma2-window-softcap"])
def test_the_models_own_attention_comes_back_with_the_padded_layout(family: str) -> None:
    model = build(family)
    own = model.config._attn_implementation
    scorer = PairScorer(model)
    with torch.no_grad():
        before = scorer(PairBatch.of(random_pairs(3)))
        for layout, name in ((Layout.SHARED, attention.NAME), (Layout.PADDED, own), (Layout.PACKED, attention.NAME)):
            scorer.lay_out(layout)
            assert {module.config._attn_implementation for module in model.modules() if hasattr(module, "config")} == {
                name
            }
        scorer.lay_out(Layout.PADDED)
        after = scorer(PairBatch.of(random_pairs(3)))
    assert scorer.layout_info == {"scoring": "padded", "attention": own}
    assert torch.equal(before.chosen, after.chosen)


@pytest.mark.parametrize("family", sorted(WITHOUT_INTERFACE))
def test_a_model_that_has_no_attention_interface_is_not_laid_out_in_one_row(family: str) -> None:
    scorer = PairScorer(build(family))
    with pytest.raises(ValueError, match="attention"):
        scorer.lay_out(Layout.PACKED)
    assert scorer.packing.layout is Layout.PADDED


@pytest.mark.parametrize("layout", ONE_ROW)
def test_frequencies_that_depend_on_the_length_send_long_pairs_through_rows_of_their_own(layout: Layout) -> None:
    short, long = random_pairs(3, longest=5), random_pairs(4, longest=14)
    assert any(pair.num_tokens_longer > 16 for pair in long)
    scorer = scorer_of(length_dependent("longrope"), layout)
    for pairs in (short, long, short):
        with torch.no_grad():
            tokens = scorer(PairBatch.of(pairs))
        assert_same((tokens.chosen, tokens.rejected), plain_batch(length_dependent("longrope"), pairs))


def test_the_routers_loss_in_packed_rows_is_the_padded_one() -> None:
    pairs = awkward_pairs()
    losses = []
    for layout in (Layout.PADDED, Layout.PACKED):
        scorer = PairScorer(build("qwen3-moe"), router_loss=True)
        scorer.lay_out(layout)
        tokens = scorer(PairBatch.of(pairs))
        assert tokens.router_loss is not None
        losses.append(tokens.router_loss)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ONE_ROW)
def test_a_head_that_fits_no_known_map_is_asked_for_the_scored_columns(layout: Layout) -> None:
    pairs = awkward_pairs()
    scorer = PairScorer(build("llama-untied"), collision=True)
    with torch.no_grad():
        expected = scorer(PairBatch.of(pairs))
        scorer.head_kind = HeadKind.OWN
        scorer.lay_out(layout)
        found = scorer(PairBatch.of(pairs))
    for name in ("chosen", "rejected", "chosen_collision", "rejected_collision"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=4e-5)


def test_a_cap_on_the_attention_scores_survives_loading(tmp_path: Path) -> None:
    model = build("gemma2-window-softcap")
    model.save_pretrained(tmp_path)
    options = ModelOptions(model=str(tmp_path), trust_remote_code=False)
    loaded = load_model(ModelFiles(tmp_path), options, torch.float32, torch.device("cpu"))
    pairs = awkward_pairs()
    assert_same(plain_batch(loaded, pairs), plain_batch(model, pairs))
