"""Each optimizer moves the weights as its definition says."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from dpocli.config.commands import TrainOptions
from dpocli.config.flags import build_options
from dpocli.distributed.processes import Processes, init_processes
from dpocli.errors import UsageError
from dpocli.scoring.scorer import PairScorer
from dpocli.training import optimizers
from dpocli.training.optimizers import STATE_BYTES, allocate_state, make_optimizer, state_bytes
from dpocli.training.policy import Policy
from tests.tiny_models import build

RATE = 1e-3
STEPS = 6
# Some of its parts warn on import that they have no kernels for this CPU.
needs_bitsandbytes = pytest.mark.filterwarnings("ignore:::bitsandbytes")


@pytest.fixture(scope="module")
def alone() -> Iterator[Processes]:
    with init_processes(torch.device("cpu"), even_alone=True) as processes:
        yield processes


def options(**given: object) -> TrainOptions:
    return build_options(
        TrainOptions,
        **{"model": "m", "out": "o", "reference": "r", "learning_rate": RATE} | given,  #
    )


def gradient(step: int, index: int, like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(100 * step + index)) * 0.01


def moved(optimizer: torch.optim.Optimizer, master_weights: list[nn.Parameter]) -> list[Tensor]:
    """The weights after some steps by gradients of our own."""
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * (step + 1)  # set at every step, as training does
        for index, parameter in enumerate(master_weights):
            local = gradient(step, index, parameter)
            parameter.grad = like(parameter, local)
        optimizer.step()
        optimizer.zero_grad()
    return [whole(parameter.detach()).clone() for parameter in master_weights]


def like(parameter: Tensor, values: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return values
    return DTensor.from_local(values, parameter.device_mesh, parameter.placements)


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def both(name: str, plain: Any, alone: Processes, **given: object) -> tuple[list[Tensor], list[Tensor]]:
    """The weights moved by our optimizer on a sharded policy, and by a plain one on plain parameters."""
    model = build("llama-untied")
    ordinary = [parameter for _, parameter in copy.deepcopy(model).named_parameters()]
    policy = Policy(PairScorer(model), options(optimizer=name, **given), torch.float32, alone)
    ours = make_optimizer(policy, options(optimizer=name, **given).optimizer)
    return moved(ours, [parameter for _, parameter in policy.master_weights]), moved(plain(ordinary), ordinary)


def test_fused_adamw_is_adamw(alone: Processes) -> None:
    settings: dict[str, Any] = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    given = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.1}
    found, expected = both("adamw", lambda p: torch.optim.AdamW(p, **settings, foreach=False), alone, **given)
    for ours, plain in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-7)


def test_rmsprop_is_that_of_the_original_code(alone: Processes) -> None:
    """`torch.optim.RMSprop(parameters, lr)` and nothing else."""
    found, expected = both("rmsprop", lambda p: torch.optim.RMSprop(p, lr=RATE), alone)
    assert all(map(torch.equal, found, expected))


@needs_bitsandbytes
def test_8_bit_adamw_goes_about_where_adamw_goes(alone: Processes) -> None:
    pytest.importorskip("bitsandbytes")
    begin = [parameter.detach().clone() for _, parameter in build("llama-untied").named_parameters()]
    found, expected = both("adamw-8bit", lambda p: torch.optim.AdamW(p, weight_decay=0), alone)
    for before, ours, plain in zip(begin, found, expected, strict=True):
        way, theirs = (ours - before).flatten(), (plain - before).flatten()
        assert torch.cosine_similarity(way, theirs, dim=0) > 0.97
        if before.numel() < 4096:
            torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-6)  # whose moments are float32


@needs_bitsandbytes
def test_8_bit_moments_take_8_bits_and_survive_a_checkpoint_exactly() -> None:
    pytest.importorskip("bitsandbytes")
    from dpocli.training.eight_bit import EightBitAdamW

    shapes = [(70, 90), (300,)]  # the last block of the first is not full

    def parameters() -> list[nn.Parameter]:
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]

    first, second = parameters(), parameters()
    one, other = (
        EightBitAdamW(some, lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0) for some in (first, second)
    )
    assert first[0] not in one.state, "no state before the first step"
    moved(one, first)
    assert {key: str(value.dtype) for key, value in one.state[first[0]].items()} == {
        "step": "torch.float32", "state1": "torch.uint8", "absmax1": "torch.float32", "state2": "torch.uint8",
        "absmax2": "torch.float32",
    }  # fmt: skip
    assert {key: value.dtype for key, value in one.state[first[1]].items()} == dict.fromkeys(
        ("step", "state1", "state2"), torch.float32
    )
    for old, new in zip(first, second, strict=True):
        new.data.copy_(old.data)
        other.state[new] = {key: value.clone() for key, value in one.state[old].items()}
    assert all(map(torch.equal, moved(one, first), moved(other, second)))


@needs_bitsandbytes
@pytest.mark.parametrize("name", STATE_BYTES)
def test_allocated_state_changes_no_weight_no_gradient_and_no_later_step(name: str, alone: Processes) -> None:
    """To the bit: the rehearsal of the largest pass runs beside it, and training starts afterwards."""
    if name == "adamw-8bit":
        pytest.importorskip("bitsandbytes")
    given = options(optimizer=name) if name == "rmsprop" else options(optimizer=name, weight_decay=0.1)

    def start() -> tuple[torch.optim.Optimizer, list[nn.Parameter]]:
        policy = Policy(PairScorer(build("llama-untied")), given, torch.float32, alone)
        weights = [parameter for _, parameter in policy.master_weights]
        with torch.no_grad():
            whole_local = weights[0].to_local()  # type: ignore[operator]
            whole_local.view(-1)[:2] = torch.tensor([-0.0, 0.0])
        return make_optimizer(policy, given.optimizer), weights

    (fresh, untouched), (allocated, weights) = start(), start()
    before = bits(weights)
    allocate_state(allocated)
    assert all(map(torch.equal, bits(weights), before))
    assert all(weight.grad is None for weight in weights)
    assert all(float(state["step"]) == 0 for state in allocated.state.values())
    assert len(allocated.state) == len(weights)
    assert allocated.param_groups[0]["lr"] == RATE
    assert all(map(torch.equal, moved(allocated, weights), moved(fresh, untouched)))
    for one, other in zip(weights, untouched, strict=True):
        for key, value in fresh.state[other].items():
            assert torch.equal(whole(allocated.state[one][key]), whole(value)), key


def bits(weights: list[nn.Parameter]) -> list[Tensor]:
    return [whole(weight.detach()).view(torch.int32).clone() for weight in weights]


@needs_bitsandbytes
def test_8_bit_moments_are_refused_where_they_are_not_available(
    alone: Processes, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = options(optimizer="adamw-8bit")
    policy = Policy(PairScorer(build("llama-untied")), given, torch.float32, alone)
    with monkeypatch.context() as patch:
        patch.setattr(optimizers, "find_spec", lambda _: None)
        with pytest.raises(UsageError, match=r"pip install 'dpocli\[quantization\]'"):
            make_optimizer(policy, given.optimizer)
    pytest.importorskip("bitsandbytes")
    with monkeypatch.context() as patch:
        patch.setattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", lambda *_: False)
        with pytest.raises(UsageError, match="no kernel for cpu"):
            make_optimizer(policy, given.optimizer)
    policy.is_sharded = True
    with pytest.raises(UsageError, match="do not end where shards do"):
        make_optimizer(policy, given.optimizer)


@pytest.mark.parametrize("name", STATE_BYTES)
def test_the_bytes_that_a_plan_counts(name: str, alone: Processes) -> None:
    policy = Policy(PairScorer(build("llama-untied")), options(optimizer=name), torch.float32, alone)
    assert state_bytes(policy, options(optimizer=name).optimizer) == policy.num_parameters() * STATE_BYTES[name]
    if name != "adamw-8bit":  # which keeps small parameters in float32
        optimizer = make_optimizer(policy, options(optimizer=name).optimizer)
        moved(optimizer, [parameter for _, parameter in policy.master_weights])
        kept = [value for state in optimizer.state.values() for value in state.values() if value.dim()]
        assert sum(value.numel() * value.element_size() for value in kept) == state_bytes(
            policy, options(optimizer=name).optimizer
        )
