"""The fastest layout with the log-probs of the padded one is chosen; if it is not the first candidate, the reasons are logged."""

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.data.batch import PairBatch
from dpocli.data.packing import Layout
from dpocli.data.preference import EncodedPair
from dpocli.distributed.processes import Processes, init_processes
from dpocli.errors import NumericsError, ResourceError, UsageError
from dpocli.scoring import attention
from dpocli.scoring.layout_check import MAX_TOKENS, PairsInMemory, choose_layout, sample, window_of
from dpocli.scoring.scorer import PairScorer
from dpocli.training.policy import Policy
from tests.support.pairs import random_pairs
from tests.support.sized_pairs import pairs_of
from tests.support.tiny_models import FAMILIES, RECURRENT, TRAPS, WINDOW, build, families

ALONE = Processes(0, 1, torch.device("cpu"))
LONG = ((20, 30, 25), (3, 4, 5), (1, 1, 1), (28, 2, 17))
"""Pairs beyond every window, and others."""

Output = tuple[Tensor, None]
Attention = Callable[..., Output]


@dataclass
class Settled:
    """The scorer after `choose_layout`, and the logged lines."""

    scorer: PairScorer
    said: list[str] = field(default_factory=list)

    @property
    def layout(self) -> Layout:
        return self.scorer.packing.layout


def outer_gradient(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    def gradient(loss: Tensor) -> Tensor:
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        model.zero_grad()
        return flat

    return gradient


def settled(
    model: PreTrainedModel | PairScorer,
    pairs: Sequence[EncodedPair] | None = None,
    asked: str = "auto",
    *,
    training: bool = False,
    processes: Processes = ALONE,
) -> Settled:
    scorer = PairScorer(model) if isinstance(model, PreTrainedModel) else model
    outcome = Settled(scorer)
    gradient = outer_gradient(scorer.model) if training else None
    choose_layout(scorer, pairs or pairs_of(*LONG), asked, processes, outcome.said.append, gradient)
    return outcome


def altered(monkeypatch: pytest.MonkeyPatch, alter: Callable[[Attention, dict[str, Any]], Output]) -> None:
    """Puts something between a model and the attention by segment: gets that attention and its arguments."""
    plain = attention.segment_attention

    def other(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> Output:
        arguments = {"module": module, "query": query, "key": key, "value": value, "attention_mask": attention_mask}
        return alter(plain, arguments | options)

    monkeypatch.setitem(attention.AttentionInterface._global_mapping, attention.NAME, other)


def is_shared(arguments: dict[str, Any]) -> bool:
    return any(segment.trunk for segment in arguments["module"]._dpocli_row.segments)


def raising(error: BaseException, *, shared_only: bool = False) -> Callable[[Attention, dict[str, Any]], Output]:
    def alter(plain: Attention, arguments: dict[str, Any]) -> Output:
        if shared_only and not is_shared(arguments):
            return plain(**arguments)
        raise error

    return alter


def twice_the_gradient(plain: Attention, arguments: dict[str, Any]) -> Output:
    output = plain(**arguments)[0]
    return output + (output - output.detach()), None


def without_window(plain: Attention, arguments: dict[str, Any]) -> Output:
    return plain(**(arguments | {"sliding_window": None}))


class NoBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, _: Tensor) -> Tensor:
        raise RuntimeError("no backward kernel")


@pytest.mark.parametrize("training", [False, True], ids=["scoring", "training"])
@pytest.mark.parametrize("family", families(family for family in (*FAMILIES, *TRAPS) if family != "gptj-biased"))
def test_the_prompt_is_shared_where_that_is_exact_and_nothing_is_said(family: str, training: bool) -> None:
    model = build(family)
    outcome = settled(model, training=training)
    assert outcome.layout is Layout.SHARED
    assert outcome.said == []
    assert outcome.scorer.layout_info == {"scoring": "shared", "attention": "segments"}
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("asked", ["shared", "packed", "padded"])
def test_what_is_forced_and_exact_is_taken(asked: str) -> None:
    outcome = settled(build("llama-tied"), asked=asked, training=True)
    assert outcome.layout == asked
    assert outcome.said == []


@pytest.mark.parametrize("family", ["mistral-window", "gemma3-window", "gpt-oss-sinks"])
def test_a_window_that_the_fast_way_ignores_is_noticed(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, without_window)
    outcome = settled(build(family))
    assert outcome.layout is Layout.PADDED
    (said,) = outcome.said
    assert said.startswith("Scoring is padded with ")
    assert "shared: log-probs differ in the " in said
    assert "packed: log-probs differ in the " in said


@pytest.mark.parametrize(("option", "family"), [("softcap", "gemma2-window-softcap"), ("s_aux", "gpt-oss-sinks")])
def test_soft_caps_and_sinks_that_the_fast_way_ignores_are_noticed(
    option: str, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(monkeypatch, lambda plain, arguments: plain(**(arguments | {option: None})))
    outcome = settled(build(family))
    assert outcome.layout is Layout.PADDED
    assert "log-probs differ" in outcome.said[0]


def test_layers_that_do_not_go_through_the_interface_are_noticed() -> None:
    model = build("llama-tied")
    for layer in model.model.layers:
        layer.self_attn.config = copy.deepcopy(layer.self_attn.config)  # out of reach of the name we set
    outcome = settled(model)
    assert outcome.layout is Layout.PADDED
    assert "shared: log-probs differ" in outcome.said[0]


def test_positions_that_a_model_counts_for_itself_leave_packed_rows() -> None:
    """Rotary attention knows distances only, which rows of whole sequences keep and a shared prompt does not."""

    def counting_for_itself() -> PreTrainedModel:
        model = build("llama-tied")
        plain = model.model.rotary_emb.forward
        model.model.rotary_emb.forward = lambda states, position_ids: plain(
            states, torch.arange(position_ids.shape[-1])[None]
        )
        return model

    outcome = settled(counting_for_itself(), training=True)
    assert outcome.layout is Layout.PACKED
    (said,) = outcome.said
    assert said.startswith("Scoring is packed with segments")
    assert "shared: log-probs differ" in said
    assert "packed: " not in said
    with pytest.raises(
        NumericsError, match=r"--scoring shared is wrong for this model \(shared: log-probs differ .*auto"
    ):
        settled(counting_for_itself(), asked="shared")


@pytest.mark.parametrize("declared", [True, False], ids=["declared", "not declared"])
@pytest.mark.parametrize("family", RECURRENT)
def test_models_with_a_memory_keep_a_row_for_each_side(
    family: str, declared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(family)
    assert model._is_stateful
    monkeypatch.setattr(type(model), "_is_stateful", declared)
    own = model.config._attn_implementation
    outcome = settled(model)
    assert outcome.layout is Layout.PADDED
    assert model.config._attn_implementation == own
    (said,) = outcome.said
    assert ("recurrent layers" in said) is declared
    assert ("log-probs differ" in said) is not declared


@pytest.mark.parametrize("asked", ["shared", "packed"])
@pytest.mark.parametrize("family", RECURRENT)
def test_models_with_a_memory_refuse_rows_of_several_pairs(family: str, asked: str) -> None:
    with pytest.raises(NumericsError, match=f"--scoring {asked} is wrong for this model"):
        settled(build(family), asked=asked)


@pytest.mark.parametrize(
    ("make", "asked"),
    [
        (lambda: PairScorer(build("mamba")), "packed"),
        (lambda: PairScorer(build("qwen3-moe"), router_loss=True), "shared"),
    ],
    ids=["memory", "router"],
)
def test_a_refusal_without_a_trial_has_a_reason_too(make: Callable[[], PairScorer], asked: str) -> None:
    with pytest.raises(NumericsError, match=r"is wrong for this model \(\w"):
        settled(make(), asked=asked)


def test_rows_in_which_pairs_notice_each_other_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """By so little that the noise of bfloat16 would hide it."""

    def leaking(plain: Attention, arguments: dict[str, Any]) -> Output:
        return plain(**arguments)[0] + 0.01 * arguments["value"][:, :, :1].sum().sin(), None

    altered(monkeypatch, leaking)
    scorer = PairScorer(build("llama-tied"))
    scorer.compute_dtype = torch.bfloat16
    outcome = settled(scorer)
    assert outcome.layout is Layout.PADDED
    assert "shared: log-probs depend on other tokens in the row" in outcome.said[0]


def test_gradients_that_differ_are_noticed_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, twice_the_gradient)
    assert settled(build("llama-tied")).layout is Layout.SHARED
    outcome = settled(build("llama-tied"), training=True)
    assert outcome.layout is Layout.PADDED
    assert "shared: gradients differ by " in outcome.said[0]
    assert "packed: gradients differ by " in outcome.said[0]


def test_an_error_in_the_fast_way_leads_to_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, raising(RuntimeError("no such kernel\nand a long story"), shared_only=True))
    outcome = settled(build("llama-tied"), training=True)
    assert outcome.layout is Layout.PACKED
    assert "shared: RuntimeError: no such kernel)" in outcome.said[0]
    with pytest.raises(NumericsError, match="RuntimeError: no such kernel"):
        settled(build("llama-tied"), asked="shared")


def test_an_error_without_a_message_is_named_by_its_type(monkeypatch: pytest.MonkeyPatch) -> None:
    altered(monkeypatch, raising(NotImplementedError()))
    assert "shared: NotImplementedError: ; packed: NotImplementedError: " in settled(build("llama-tied")).said[0]


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
    ids=["device", "host", "torch on the host"],
)
def test_where_no_way_fits_the_memory_the_plain_one_is_taken(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    altered(monkeypatch, raising(error))
    outcome = settled(build("llama-tied"))
    assert outcome.layout is Layout.PADDED
    assert "(shared: out of memory; packed: out of memory)" in outcome.said[0]
    with pytest.raises(ResourceError, match=r"--scoring shared cannot be tried .* Use --scoring auto"):
        settled(build("llama-tied"), asked="shared")


def rows_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tokens: int) -> list[int]:
    """Memory runs out over rows of more tokens, however pairs are laid out; gives the sizes of all passes."""
    sizes: list[int] = []
    plain = PairScorer.forward

    def forward(self: PairScorer, batch: PairBatch) -> Any:
        if isinstance(batch, Tensor):
            return plain(self, batch)
        sizes.append(
            sum(map(self.packing.layout.size, batch.prompt_lengths, batch.chosen_lengths, batch.rejected_lengths))
        )
        if sizes[-1] > tokens:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return plain(self, batch)

    monkeypatch.setattr(PairScorer, "forward", forward)
    return sizes


def test_a_trial_that_does_not_fit_the_memory_is_made_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = rows_that_do_not_fit(monkeypatch, 40)
    scorer = PairScorer(build("llama-tied"), token_budget=1024)
    outcome = settled(scorer, pairs_of((9, 8, 7), (3, 4, 5), (4, 2, 6), (5, 5, 5)))
    assert (outcome.layout, outcome.said) == (Layout.SHARED, [])
    assert max(sizes) > 40
    assert scorer.packing.token_budget == 1024, "only the trial is smaller"


def test_a_leak_is_seen_in_a_smaller_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def leaking(plain: Attention, arguments: dict[str, Any]) -> Output:
        return plain(**arguments)[0] + arguments["value"][:, :, :1].sum().sin(), None

    altered(monkeypatch, leaking)
    rows_that_do_not_fit(monkeypatch, 40)
    outcome = settled(build("llama-tied"), pairs_of((9, 8, 7), (3, 4, 5), (4, 2, 6), (5, 5, 5)))
    assert outcome.layout is Layout.PADDED
    assert "out of memory" not in outcome.said[0]


def test_a_pair_that_does_not_fit_alone_is_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    rows_that_do_not_fit(monkeypatch, 20)
    with pytest.raises(torch.OutOfMemoryError):
        settled(build("llama-tied"), pairs_of((9, 8, 7), (3, 4, 5)))


def test_memory_that_runs_out_in_a_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(plain: Attention, arguments: dict[str, Any]) -> Output:
        output = plain(**arguments)[0]
        if output.requires_grad:
            output.register_hook(raising_hook)
        return output, None

    def raising_hook(_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    altered(monkeypatch, hungry)
    with pytest.raises(ResourceError, match="Out of memory while scoring shared was tried with gradients"):
        settled(build("llama-tied"), training=True)


def test_what_is_no_number_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def nothing(plain: Attention, arguments: dict[str, Any]) -> Output:
        return plain(**arguments)[0] * float("nan"), None

    altered(monkeypatch, nothing)
    outcome = settled(build("llama-tied"))
    assert outcome.layout is Layout.PADDED
    assert "nan nats per token" in outcome.said[0]


def test_gradients_that_are_no_numbers_are_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(plain: Attention, arguments: dict[str, Any]) -> Output:
        output = plain(**arguments)[0]
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * float("nan"))
        return output, None

    altered(monkeypatch, broken)
    outcome = settled(build("llama-tied"), training=True)
    assert outcome.layout is Layout.PADDED
    assert "gradients differ by nan" in outcome.said[0]


def test_a_difference_beyond_the_dtypes_noise_is_one_and_within_it_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(plain: Attention, arguments: dict[str, Any]) -> Output:
        return plain(**arguments)[0] * 1.01, None

    altered(monkeypatch, off)
    scorer = PairScorer(build("llama-tied"))
    assert settled(scorer).layout is Layout.PADDED
    scorer.compute_dtype = torch.bfloat16
    assert settled(scorer).layout is Layout.SHARED


def test_bfloat16_is_judged_by_its_own_noise() -> None:
    outcome = settled(build("llama-tied").to(torch.bfloat16), training=True)
    assert outcome.scorer.compute_dtype == torch.bfloat16
    assert outcome.layout is Layout.SHARED


def test_the_routers_loss_wants_each_prompt_as_often_as_in_plain_rows() -> None:
    outcome = settled(PairScorer(build("qwen3-moe"), router_loss=True), training=True)
    assert outcome.layout is Layout.PACKED
    with pytest.raises(NumericsError, match="--scoring shared is wrong"):
        settled(PairScorer(build("qwen3-moe"), router_loss=True), asked="shared")


@dataclass(frozen=True)
class WithAnother(Processes):
    """A process beside one that says yes to the first questions."""

    yes: int = 1
    """After the question about the padded layout."""
    answers: list[bool] = field(default_factory=list)

    def any(self, flag: bool) -> bool:
        self.answers.append(flag or 0 < len(self.answers) <= self.yes)
        return self.answers[-1]


def test_all_processes_leave_a_way_that_one_of_them_refuses() -> None:
    processes = WithAnother(0, 1, torch.device("cpu"))
    outcome = settled(build("llama-tied"), processes=processes)
    assert outcome.layout is Layout.PACKED
    of_the_padded, fault, of_memory, *of_the_next_way = processes.answers
    assert (of_the_padded, fault, of_memory, of_the_next_way) == (False, True, False, [False, False])
    assert "shared: refused on another process" in outcome.said[0]


def test_all_processes_make_the_trial_smaller_where_one_lacks_memory() -> None:
    processes = WithAnother(0, 1, torch.device("cpu"), yes=2)
    outcome = settled(build("llama-tied"), processes=processes)
    assert (outcome.layout, outcome.said) == (Layout.SHARED, [])
    assert processes.answers == [False, True, True, False, False]


def test_a_second_check_compares_with_the_plain_layout_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """As precompute does it when the first pairs come that are longer than the window."""
    altered(monkeypatch, without_window)
    scorer = PairScorer(build("mistral-window"))
    short = pairs_of((2, 3, 4), (4, 5, 1))
    assert settled(scorer, short).layout is Layout.SHARED
    assert settled(scorer).layout is Layout.PADDED


# With the policy of training, whose modules are sharded.


@pytest.fixture(scope="module")
def group() -> Iterator[Processes]:
    with init_processes(torch.device("cpu"), even_alone=True) as processes:
        yield processes


def policy_of(family: str, group: Processes, **given: object) -> Policy:
    options = build_options(TrainOptions, **{"model": "m", "out": "o", "reference": "r"} | given)
    return Policy(PairScorer(build(family)), options, torch.float32, group)


def gradients_after(policy: Policy, pairs: Sequence[EncodedPair]) -> dict[str, Tensor]:
    policy.reduce_gradients_on_backward(True)
    tokens = policy.scorer(PairBatch.of(pairs))
    (tokens.chosen.sum() - tokens.rejected.sum()).backward()
    return {name: parameter.grad.full_tensor() for name, parameter in policy.master_weights}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("family", ["llama-tied", "mistral-window", "gemma2-window-softcap", "gpt2"])
def test_a_policy_shares_prompts_with_the_gradients_of_plain_rows(
    family: str, checkpointing: bool, group: Processes
) -> None:
    pairs, said = pairs_of(*LONG), []
    policy = policy_of(family, group, gradient_checkpointing=checkpointing)
    choose_layout(policy.scorer, pairs, "auto", group, said.append, policy.outer_gradient)
    assert policy.scorer.packing.layout is Layout.SHARED
    assert said == []
    found = gradients_after(policy, pairs)
    for name, gradient in gradients_after(policy_of(family, group), pairs).items():
        torch.testing.assert_close(found[name], gradient, rtol=2e-4, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}")


def test_dropout_that_training_keeps_is_no_difference(group: Processes) -> None:
    said: list[str] = []
    policy = policy_of("gpt2", group, model_dropout=True)
    rates = [module.p for module in policy.scorer.modules() if isinstance(module, nn.Dropout)]
    with policy.dropout_off():
        choose_layout(policy.scorer, pairs_of(*LONG), "auto", group, said.append, policy.outer_gradient)
    assert [module.p for module in policy.scorer.modules() if isinstance(module, nn.Dropout)] == rates
    assert any(rates)
    assert policy.scorer.packing.layout is Layout.SHARED
    assert said == []
    assert policy.scorer.training


def failing_backward(plain: Attention, arguments: dict[str, Any]) -> Output:
    """Only in the first layer, so that the gradients of the last are there when it fails."""
    output = plain(**arguments)[0]
    return (NoBackward.apply(output) if arguments["module"].layer_idx == 0 else output), None


@pytest.mark.parametrize(
    ("alter", "reason"),
    [
        pytest.param(raising(RuntimeError("no kernel")), "no kernel", id="forward"),
        pytest.param(twice_the_gradient, "gradients differ", id="other gradients"),
    ],
)
def test_a_refused_way_leaves_no_trace_in_the_first_step(
    alter: Callable[[Attention, dict[str, Any]], Output],
    reason: str,
    group: Processes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    altered(monkeypatch, alter)
    pairs, said = pairs_of(*LONG), []
    policy = policy_of("llama-tied", group)
    choose_layout(policy.scorer, pairs, "auto", group, said.append, policy.outer_gradient)
    assert policy.scorer.packing.layout is Layout.PADDED
    assert reason in said[0]
    assert all(parameter.grad is None for parameter in policy.scorer.parameters())
    found = gradients_after(policy, pairs)
    for name, gradient in gradients_after(policy_of("llama-tied", group), pairs).items():
        assert torch.equal(found[name], gradient), name


def test_a_backward_pass_that_fails_ends_the_run(group: Processes, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sharded module would silently leave out gradients for the rest of the run."""
    altered(monkeypatch, failing_backward)
    policy = policy_of("llama-tied", group)
    with pytest.raises(
        UsageError, match=r"backward pass of scoring shared failed .*no backward kernel.*--scoring packed"
    ):
        choose_layout(policy.scorer, pairs_of(*LONG), "auto", group, lambda _: None, policy.outer_gradient)


# The pairs to try it on.


def drawn(family: str, sizes: Sequence[tuple[int, int, int]], seed: int = 0) -> list[EncodedPair]:
    pairs = pairs_of(*sizes)
    return sample(PairScorer(build(family)), [PairsInMemory(pairs)], seed)


def test_the_longest_pair_is_always_tried_and_the_seed_draws_the_others() -> None:
    sizes = [(3, 4, 5)] * 50 + [(9, 9, 30)] + [(3, 4, 5)] * 50
    for seed in range(5):
        rows = [pair.row for pair in drawn("llama-tied", sizes, seed)]
        assert 50 in rows
        assert 3 <= len(rows) <= 5
        assert rows == [pair.row for pair in drawn("llama-tied", sizes, seed)]
    assert len({tuple(pair.row for pair in drawn("llama-tied", sizes, seed)) for seed in range(5)}) == 5


def test_a_single_pair_is_enough() -> None:
    pair, with_a_short_prompt = drawn("llama-tied", [(3, 4, 5)])
    assert [len(ids) for ids in pair.all_ids] == [3, 4, 5]
    assert [len(ids) for ids in with_a_short_prompt.all_ids] == [1, 4, 5]


@pytest.mark.parametrize("family", ["llama-tied", "mistral-window"])
def test_long_pairs_are_cut_unless_a_window_ends_before_they_do(family: str) -> None:
    half = MAX_TOKENS // 2
    sizes = [(half + 40, half + 3, 7), (5, 600, half)]
    found = drawn(family, sizes)
    whole = pairs_of(*sizes)
    assert window_of(PairScorer(build(family))) == (WINDOW if "window" in family else None)
    if "window" in family:
        assert [[len(ids) for ids in pair.all_ids] for pair in found[:-1]] == [list(size) for size in sizes]
        return
    assert [[len(ids) for ids in pair.all_ids] for pair in found[:-1]] == [[half, half, 7], [5, half, half]]
    assert found[0].prompt_ids.tolist() == whole[0].prompt_ids.tolist()[-half:]
    assert found[0].chosen_ids.tolist() == whole[0].chosen_ids.tolist()[:half]


def test_a_window_that_no_pair_leaves_is_no_reason_to_try_long_ones() -> None:
    model = build("mistral-window")
    model.config.sliding_window = 5000
    pairs = pairs_of((600, 600, 3))
    pair, _ = sample(PairScorer(model), [PairsInMemory(pairs)], 0)
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == MAX_TOKENS


def test_a_cut_pair_has_no_masks_and_no_reference() -> None:
    pairs = random_pairs(4, longest=10, masked=True, reference=True)
    scorer = PairScorer(build("llama-tied"))
    tried = sample(scorer, [PairsInMemory(pairs)], 0)
    assert all(pair.reference is pair.chosen_mask is pair.rejected_mask is None for pair in tried)
    assert settled(scorer, tried).layout is Layout.SHARED


def test_the_longest_held_out_pair_is_tried_too() -> None:
    training, held_out = pairs_of((3, 4, 5), (4, 4, 4)), pairs_of((2, 2, 2), (40, 5, 5))
    tried = sample(PairScorer(build("mistral-window")), [PairsInMemory(training), PairsInMemory(held_out)], 0)
    assert [len(pair.prompt_ids) for pair in tried] == [3, 4, 40, 1]
