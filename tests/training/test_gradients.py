"""The gradient of a batch is that of one big batch, whatever it is cut into: also where a pair's loss depends on others."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.config.hyperparameters import Need
from dpocli.config.loss_expression import LossChoice
from dpocli.data.batch import PairBatch
from dpocli.data.preference import EncodedPair, ReferenceLogps
from dpocli.distributed.processes import Processes, init_processes
from dpocli.objective import losses
from dpocli.objective.logps import LogpColumns, PairLogps
from dpocli.objective.metrics import batch_loss
from dpocli.scoring import passes
from dpocli.scoring.passes import FILLER
from dpocli.scoring.scorer import PairScorer
from dpocli.scoring.token_logps import TokenLogps, pair_logps
from dpocli.training import gradients
from dpocli.training.gradients import GlobalBatch, Gradients, MicroBatch, Step
from dpocli.training.policy import Policy
from tests.pairs import random_pairs
from tests.tiny_models import SHAPE, build

PAIRS = 8
SEED = 3
WHOLE_BATCH = [
    "aot",
    "aot(label_smoothing=0.1)",
    "aot_unpaired",
    "beta_dpo",
    "bco_pair(beta=0.1)",
    "0.8*dpo+0.2*bco_pair+sft",
    "mpo",
    "0.5*aot+beta_dpo+sft(reduction=sum)",
    "bco_pair+dpo(ld_alpha=0.5, weighting=wpo)",
]
PER_PAIR = ["dpo", "simpo", "wpo", "dpo(ld_alpha=0.5)", "rpo", "dpo+0.2*sft"]
EARLIER: losses.States = {"bco_pair": {"pairs": 6.0, "mean": 0.4}, "beta_dpo": {"mean": -0.7}}
"""What losses with a memory remember of the batches before."""

Grads = dict[str, Tensor]
Summed = Callable[[list[MicroBatch], list[PairLogps]], Tensor]
"""The loss of a batch from the live log-probs of its micro-batches."""


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    with init_processes(torch.device("cpu"), even_alone=True) as processes:
        yield processes


@dataclass(frozen=True)
class Batch:
    """A global batch: pairs in its order, their positions among the training pairs, and their weights."""

    pairs: list[EncodedPair]
    positions: NDArray[np.int64]
    weights: Tensor

    def cut(self, parts: int) -> list[MicroBatch]:
        """Micro-batches, to which the pairs are dealt in another order than the batch's."""
        order = np.random.default_rng(5).permutation(len(self.pairs))
        return [
            (self.positions[members], [self.pairs[index] for index in members])
            for members in np.array_split(order, parts)
        ]


def nobody(batch: Batch) -> MicroBatch:
    """What a process has where only others still have pairs."""
    return batch.positions[[]], []


def batch_for(model: PreTrainedModel, loss: str) -> Batch:
    """Pairs whose reference is the model, shaken: the ranks of their margins are others under the two."""
    generator = np.random.default_rng(11)
    scorer = PairScorer(model)

    def shaken(values: Tensor) -> NDArray[np.float32]:
        return (values.numpy() + generator.normal(0.2, 1.5, len(values))).astype(np.float32)

    pairs = []
    for pair in random_pairs(PAIRS, seed=1, masked=True):
        with torch.no_grad():
            tokens = scorer(PairBatch.of([pair]))
        pairs.append(replace(pair, reference=ReferenceLogps(shaken(tokens.chosen), shaken(tokens.rejected))))
    takes_weights = all(term.spec.takes_weights for term in LossChoice.of(loss).terms)
    weights = [0.5, 1.0, 2.5, 0.0, 1.0, 3.0, 0.25, 1.5] if takes_weights else [1.0] * PAIRS
    return Batch(pairs, generator.permutation(100)[:PAIRS], torch.tensor(weights, dtype=torch.float64))


def wanted_by(choice: LossChoice) -> LogpColumns:
    return LogpColumns.by(choice.needs, has_reference=True)


def joined_logps(parts: Sequence[PairLogps]) -> PairLogps:
    """Of several micro-batches, one after the other, with their graphs."""
    names = parts[0].columns()
    columns = {name: torch.cat([part.columns()[name] for part in parts]) for name in names}
    return PairLogps(**({"reference_chosen": None, "reference_rejected": None} | columns))  # type: ignore[arg-type]


@dataclass
class Recorder:
    """Stands in for `score` in the engine: what each forward pass saw and gave."""

    pairs: list[Sequence[EncodedPair]] = field(default_factory=list)
    with_graph: list[bool] = field(default_factory=list)
    random_states: list[Tensor] = field(default_factory=list)
    tokens: list[TokenLogps] = field(default_factory=list)

    def __call__(self, scorer: PairScorer, pairs: Sequence[EncodedPair]) -> tuple[PairBatch, TokenLogps]:
        self.pairs.append(pairs)
        self.with_graph.append(torch.is_grad_enabled())
        self.random_states.append(torch.get_rng_state())
        batch, tokens = passes.score(scorer, pairs)
        self.tokens.append(TokenLogps(tokens.chosen.detach().clone(), tokens.rejected.detach().clone()))
        return batch, tokens


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(gradients, "score", recorder)
    return recorder


@dataclass(frozen=True)
class Found:
    """What a way to the gradient gives."""

    loss: float
    grads: Grads
    states: losses.States


def by_the_engine(
    model: PreTrainedModel,
    loss: str,
    batch: Batch,
    micro_batches: list[MicroBatch],
    processes: Processes,
    *,
    router: float = 0.0,
    states: losses.States = EARLIER,
    number: int = 7,
    **given: object,
) -> Found:
    """The gradient as training computes it; the model is left as it was."""
    choice = LossChoice.of(loss)
    options = build_options(TrainOptions, **{"model": "m", "out": "o", "reference": "r"} | given)
    scorer = PairScorer(copy.deepcopy(model), collision=Need.COLLISION in choice.needs, router_loss=router > 0)
    policy = Policy(scorer, options, torch.float32, processes)
    wanted = wanted_by(choice)
    step = Step(number, micro_batches, GlobalBatch(batch.positions, wanted, processes), batch.weights)
    logps, after = Gradients(policy, choice, wanted, router, SEED).accumulate(step, states)
    value = batch_loss(losses.compute(choice, logps, after).losses, batch.weights)
    grads = {name: cast(DTensor, parameter.grad).full_tensor() for name, parameter in policy.master_weights}
    return Found(float(value), grads, after)


def by_autograd(
    model: PreTrainedModel,
    loss: str,
    micro_batches: list[MicroBatch],
    summed: Summed,
    *,
    router: float = 0.0,
    router_shares: Sequence[Tensor] = (),
    random_states: Sequence[Tensor] = (),
) -> tuple[float, Grads]:
    """One graph over all micro-batches, on a plain model: what the gradient is by definition."""
    choice = LossChoice.of(loss)
    plain = copy.deepcopy(model)
    plain.train(bool(len(random_states)))
    scorer = PairScorer(plain, collision=Need.COLLISION in choice.needs, router_loss=router > 0)
    live, router_losses = [], []
    for index, (_, pairs) in enumerate(micro_batches):
        if len(random_states):
            torch.set_rng_state(random_states[index])
        batch = PairBatch.of(pairs)
        tokens = scorer(batch)
        live.append(pair_logps(tokens, batch, pairs, wanted_by(choice)))
        router_losses.append(tokens.router_loss)
    total = summed(micro_batches, live)
    objective = total
    if router:
        objective = total + router * sum(
            share * value for share, value in zip(router_shares, router_losses, strict=True)
        )
    objective.backward()  # type: ignore[no-untyped-call]
    grads = {name: parameter.grad for name, parameter in plain.named_parameters() if parameter.grad is not None}
    return float(total.detach()), grads


def as_one_batch(batch: Batch, loss: str, states: losses.States = EARLIER) -> Summed:
    """The loss of all pairs together."""

    def summed(micro_batches: list[MicroBatch], live: list[PairLogps]) -> Tensor:
        choice, logps = LossChoice.of(loss), joined_logps(live)
        after = losses.next_states(choice, logps, states)
        return batch_loss(losses.compute(choice, logps, after).losses, weights_of(batch, micro_batches))

    return summed


def each_on_its_own(batch: Batch, loss: str) -> Summed:
    """A wrong scheme: every micro-batch is taken for a batch."""

    def summed(micro_batches: list[MicroBatch], live: list[PairLogps]) -> Tensor:
        choice = LossChoice.of(loss)
        parts = [
            (weights_of(batch, [micro_batch]) * losses.compute(choice, logps, after).losses).sum()
            for micro_batch, logps in zip(micro_batches, live, strict=True)
            for after in [losses.next_states(choice, logps, EARLIER)]
        ]
        return torch.stack(parts).sum() / batch.weights.sum()

    return summed


def weights_of(batch: Batch, micro_batches: Sequence[MicroBatch]) -> Tensor:
    places = {position: place for place, position in enumerate(batch.positions.tolist())}
    return batch.weights[[places[position] for mine, _ in micro_batches for position in mine.tolist()]]


def expected_of(model: PreTrainedModel, loss: str, batch: Batch, states: losses.States = EARLIER) -> Found:
    """All pairs in one batch."""
    value, grads = by_autograd(model, loss, batch.cut(1), as_one_batch(batch, loss, states))
    return Found(value, grads, {})


def assert_same(found: Grads, expected: Grads) -> None:
    """Equal to the rounding of float32."""
    assert found.keys() == expected.keys()
    scale = max(float(grad.abs().max()) for grad in expected.values())
    assert scale > 1e-4
    for name, grad in expected.items():
        np.testing.assert_allclose(found[name], grad, rtol=1e-4, atol=1e-5 * scale, err_msg=name)


def with_dropout(share: float = 0.3) -> PreTrainedModel:
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(**SHAPE, attention_dropout=share))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.2)
    return cast(PreTrainedModel, model.eval())


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("loss", WHOLE_BATCH + PER_PAIR)
def test_loss_and_gradient_are_those_of_one_batch(loss: str, parts: int, alone: Processes) -> None:
    model = build("llama-tied")
    batch = batch_for(model, loss)
    expected = expected_of(model, loss, batch)
    found = by_the_engine(model, loss, batch, batch.cut(parts), alone)
    assert found.loss == pytest.approx(expected.loss, rel=1e-6)
    assert_same(found.grads, expected.grads)


@pytest.mark.parametrize("parts", [1, 4])
@pytest.mark.parametrize("loss", [*WHOLE_BATCH, "dpo"])
def test_with_gradient_checkpointing_too(loss: str, parts: int, alone: Processes) -> None:
    model = build("qwen3")
    batch = batch_for(model, loss)
    found = by_the_engine(model, loss, batch, batch.cut(parts), alone, gradient_checkpointing=True)
    assert_same(found.grads, expected_of(model, loss, batch).grads)


@pytest.mark.parametrize("family", ["llama-untied", "gemma2-capped", "gptj-biased"])
def test_on_other_heads_too(family: str, alone: Processes) -> None:
    model = build(family)
    batch = batch_for(model, "aot+wpo")
    found = by_the_engine(model, "aot+wpo", batch, batch.cut(3), alone)
    assert_same(found.grads, expected_of(model, "aot+wpo", batch).grads)


@pytest.mark.parametrize("parts", [2, 4, 8])
@pytest.mark.parametrize("loss", WHOLE_BATCH)
def test_micro_batches_that_are_taken_for_batches_are_told_apart(
    loss: str, parts: int, alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the other tests could not see would prove nothing."""
    model = build("llama-tied")
    batch = batch_for(model, loss)
    right = expected_of(model, loss, batch).grads
    _, wrong = by_autograd(model, loss, batch.cut(parts), each_on_its_own(batch, loss))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(wrong, right)
    monkeypatch.setattr(LossChoice, "is_whole_batch", property(lambda _: False))
    mistaken = by_the_engine(model, loss, batch, batch.cut(parts), alone).grads
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(mistaken, right)


@pytest.mark.parametrize("states", [{}, EARLIER], ids=["first batch", "later"])
@pytest.mark.parametrize("loss", ["bco_pair(beta=0.1)", "beta_dpo", "0.8*dpo+0.2*bco_pair+sft", "bco_pair+beta_dpo"])
def test_what_is_remembered_is_the_same_too(loss: str, states: losses.States, alone: Processes) -> None:
    model = build("llama-tied")
    batch = batch_for(model, loss)
    whole = by_the_engine(model, loss, batch, batch.cut(1), alone, states=states)
    cut = by_the_engine(model, loss, batch, batch.cut(4), alone, states=states)
    assert_same(cut.grads, expected_of(model, loss, batch, states).grads)
    assert cut.states.keys() == whole.states.keys() == {name for name in EARLIER if name in loss}
    for name, state in whole.states.items():
        assert cut.states[name] == pytest.approx(state, rel=1e-5)
        assert cut.states[name] != EARLIER[name]
        if name == "bco_pair":
            assert cut.states[name]["pairs"] == PAIRS + (EARLIER[name]["pairs"] if states else 0)


@pytest.mark.parametrize("loss", ["aot", "beta_dpo", "bco_pair", "mpo", "dpo", "wpo"])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_pairs_are_scored_no_more_often_than_they_must(
    loss: str, parts: int, alone: Processes, recorder: Recorder
) -> None:
    model = build("llama-tied")
    batch = batch_for(model, loss)
    by_the_engine(model, loss, batch, batch.cut(parts), alone)
    twice = parts > 1 and LossChoice.of(loss).is_whole_batch
    assert recorder.with_graph == [False] * (parts if twice else 0) + [True] * parts
    rows = sorted(pair.row for pairs in recorder.pairs for pair in pairs)
    assert rows == sorted((1 + twice) * list(range(PAIRS)))


@pytest.mark.parametrize("where", [0, 2, 4], ids=["first", "between", "last"])
@pytest.mark.parametrize("loss", ["aot", "bco_pair", "mpo", "dpo"])
def test_a_micro_batch_without_pairs_contributes_nothing(
    loss: str, where: int, alone: Processes, recorder: Recorder
) -> None:
    model = build("llama-tied")
    batch = batch_for(model, loss)
    micro_batches = batch.cut(4)
    micro_batches.insert(where, nobody(batch))
    found = by_the_engine(model, loss, batch, micro_batches, alone)
    assert_same(found.grads, expected_of(model, loss, batch).grads)
    # It goes through the model all the same: other processes wait for it.
    times = 2 if LossChoice.of(loss).is_whole_batch else 1
    assert [list(pairs) for pairs in recorder.pairs].count([FILLER]) == times


@pytest.mark.parametrize("loss", ["bco_pair", "beta_dpo", "dpo"])
def test_a_batch_of_weightless_pairs_asks_for_nothing(loss: str, alone: Processes) -> None:
    model = build("llama-tied")
    batch = replace(batch_for(model, loss), weights=torch.zeros(PAIRS, dtype=torch.float64))
    found = by_the_engine(model, loss, batch, batch.cut(2), alone)
    assert found.loss == 0
    assert not any(grad.any() for grad in found.grads.values())


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("loss", ["aot", "beta_dpo", "bco_pair", "mpo"])
def test_a_batch_that_is_scored_twice_has_the_same_dropout_twice(
    loss: str, checkpointing: bool, alone: Processes, recorder: Recorder
) -> None:
    """And its gradient is that of one graph over all micro-batches, under just that dropout."""
    model, parts = with_dropout(), 3
    batch = batch_for(model, loss)
    micro_batches = batch.cut(parts)
    found = by_the_engine(
        model, loss, batch, micro_batches, alone, model_dropout=True, gradient_checkpointing=checkpointing
    )
    first, second = recorder.tokens[:parts], recorder.tokens[parts:]
    assert recorder.with_graph == [False] * parts + [True] * parts
    for before, after in zip(first, second, strict=True):
        assert torch.equal(before.chosen, after.chosen)
        assert torch.equal(before.rejected, after.rejected)
    value, grads = by_autograd(
        model, loss, micro_batches, as_one_batch(batch, loss), random_states=recorder.random_states[:parts]
    )
    assert found.loss == pytest.approx(value, rel=1e-6)
    assert_same(found.grads, grads)
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(expected_of(model, loss, batch).grads, grads)  # which is without dropout


@pytest.mark.parametrize("loss", ["aot", "dpo"])
def test_dropout_is_another_in_every_micro_batch_and_step_and_the_same_in_a_repeated_one(
    loss: str, alone: Processes, recorder: Recorder
) -> None:
    model = with_dropout()
    batch = batch_for(model, loss)
    same_pairs = [batch.cut(2)[0]] * 2  # twice the same pairs, in two micro-batches
    drawn = []
    for number in (7, 7, 8):
        recorder.tokens.clear()
        by_the_engine(model, loss, batch, same_pairs, alone, number=number, model_dropout=True)
        drawn.append([tokens.chosen for tokens in recorder.tokens[-2:]])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


@pytest.mark.parametrize("parts", [1, 2, 4])
@pytest.mark.parametrize("loss", ["aot", "bco_pair", "dpo"])
def test_the_routers_loss_has_the_share_of_each_micro_batch(loss: str, parts: int, alone: Processes) -> None:
    """Itself it depends on what goes through the model together; its weight in the batch does not."""
    model, router = build("qwen3-moe"), 0.5
    batch = batch_for(model, loss)
    micro_batches = batch.cut(parts)
    found = by_the_engine(model, loss, batch, micro_batches, alone, router=router)
    shares = [weights_of(batch, [micro_batch]).sum() / batch.weights.sum() for micro_batch in micro_batches]
    value, grads = by_autograd(
        model, loss, micro_batches, as_one_batch(batch, loss), router=router, router_shares=shares
    )
    assert found.loss == pytest.approx(value, rel=1e-6)
    assert_same(found.grads, grads)
    _, without = by_autograd(model, loss, micro_batches, as_one_batch(batch, loss))
    with pytest.raises(AssertionError, match="Not equal to tolerance"):
        assert_same(without, grads)
