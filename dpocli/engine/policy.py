"""The policy under training: float32 master weights, a forward pass in `--dtype`, spread over the processes."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dpocli.artifacts.model_files import ModelFiles
from dpocli.config.hyperparameters import Need
from dpocli.config.loss_choice import LossChoice
from dpocli.config.models import TrainOptions
from dpocli.engine import adapter as adapters
from dpocli.engine.mesh import Processes, replica_mesh
from dpocli.engine.model import load_base, without_dropout
from dpocli.engine.passes import token_budget
from dpocli.objective.scoring import PairScorer

if TYPE_CHECKING:
    from peft import PeftModel


def load_policy(
    options: TrainOptions, loss: LossChoice, files: ModelFiles, dtype: torch.dtype, processes: Processes
) -> "Policy":
    """The model to train, all of it or an adapter on top of a frozen base.

    Raises:
        UsageError: the model cannot be loaded, or cannot be trained as it is asked for.
    """
    adapter = None
    if files.adapter or options.lora_rank:
        # The base is frozen, so it needs no float32 master of its own.
        model = load_base(files, options, dtype, processes.device)
        model.requires_grad_(False)
        adapter = (
            adapters.put_on(model, files.adapter, trainable=True) if files.adapter else adapters.new(model, options)
        )
    else:
        model = load_base(files, options, torch.float32, processes.device)
    scorer = PairScorer(
        model,
        collision=Need.COLLISION in loss.needs,
        router_loss=options.router_aux_loss_coef > 0,
        token_budget=token_budget(options.token_budget, processes.device),
    )
    return Policy(scorer, options, dtype, processes, adapter)


class Policy:
    """A scorer whose parameters can be trained.

    The scoring module is the root and the decoder layers are its only units: the head's weight is then read inside the
    root's forward, where it is a plain tensor. The mixed-precision policy makes the forward pass equal to a plain load
    in that dtype, which autocast does not.
    """

    def __init__(
        self,
        scorer: PairScorer,
        options: TrainOptions,
        dtype: torch.dtype,
        processes: Processes,
        adapter: "PeftModel | None" = None,
    ) -> None:
        self.adapter = adapter
        """Where one is trained instead of the model."""
        self.source_config = copy.deepcopy(scorer.model.config)
        """As it was, to be saved with the trained model."""
        if not options.model_dropout:
            without_dropout(scorer.model, but="lora_dropout")  # which has an option of its own
        scorer.train()
        if options.gradient_checkpointing:
            # The name changed in transformers 5.2x.
            enable = getattr(
                scorer.model, "activation_checkpointing_enable", scorer.model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        self.scorer = scorer
        scorer.compute_dtype = dtype
        saved = scorer.model.state_dict().keys()
        self.buffers = {name: buffer for name, buffer in scorer.model.named_buffers() if name in saved}
        """Those that belong to the saved model (a router's bias, say): no optimizer moves them, but nobody may lose them."""
        self.processes = processes
        mesh = replica_mesh(processes)
        inner = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
        outer = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, output_dtype=torch.float32)
        layers = decoder_layers(scorer)
        frozen = {parameter for parameter in scorer.parameters() if not parameter.requires_grad}
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=inner, reshard_after_forward=False, ignored_params=frozen)
        fully_shard(scorer, mesh=mesh, mp_policy=outer, reshard_after_forward=False, ignored_params=frozen)
        # Taken now: between a forward pass and its backward pass the module shows its copies in `dtype` instead.
        self.masters: list[tuple[str, nn.Parameter]] = [
            (name, parameter) for name, parameter in scorer.model.named_parameters() if parameter.requires_grad
        ]
        """The float32 master weights that are trained: names as the source model knows them, each tensor once."""
        ends = [layers[0], layers[-1]] if layers else [scorer]
        self._outer_layers = [parameter for layer in ends for parameter in layer.parameters()]

    def reduce_gradients_on_backward(self, now: bool) -> None:
        """With several replicas, gradients travel once a step, with its last micro-batch."""
        assert isinstance(self.scorer, FSDPModule)
        self.scorer.set_requires_gradient_sync(now or self.processes.count == 1)
        # Between micro-batches the weights stay as they are, so the copy that computes stays too.
        self.scorer.set_reshard_after_backward(now)

    def num_parameters(self) -> int:
        """Trainable ones."""
        return sum(parameter.numel() for _, parameter in self.masters)

    @contextmanager
    def dropout_off(self) -> Iterator[None]:
        """In training mode, but without anything random."""
        put_back = without_dropout(self.scorer.model)
        try:
            yield
        finally:
            put_back()

    @contextmanager
    def at_rest(self) -> Iterator[None]:
        """Without dropout and without a graph, for measuring."""
        self.scorer.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.scorer.train()

    def gradient_of(self, loss: Tensor) -> Tensor:
        """Back-propagates `loss`; what this process holds of the gradient of the first and the last layer, flat, on the
        CPU. All gradients are gone afterwards."""
        self.reduce_gradients_on_backward(True)
        loss.backward()  # type: ignore[no-untyped-call]
        found = (parameter.grad for parameter in self._outer_layers)
        local = [grad.to_local() if isinstance(grad, DTensor) else grad for grad in found if grad is not None]
        flat = torch.cat([grad.detach().float().flatten() for grad in local]).cpu()
        self.scorer.zero_grad()
        return flat

    def weights(self) -> dict[str, Tensor]:
        """Full float32 tensors on the CPU: all of them on the first process, none on the others, which help."""
        return self.collect((name, parameter.detach()) for name, parameter in self.masters)

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Full tensors of sharded ones, for the first process. Every process must call it with the same names."""
        full: dict[str, Tensor] = {}
        for name, tensor in tensors:
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.processes.is_first:
                full[name] = value.detach().cpu().clone()
        return full


def decoder_layers(scorer: PairScorer) -> list[nn.Module]:
    """The repeated blocks of the model, by transformers' own list of what must not be split."""
    names = set(getattr(scorer.model, "_no_split_modules", None) or ())
    return [module for module in scorer.model.modules() if type(module).__name__ in names]


def place(value: Tensor, into: Tensor) -> None:
    """Copies a full tensor into a sharded one, each process taking its part."""
    if isinstance(into, DTensor):
        mine = distribute_tensor(value.to(into.device), into.device_mesh, into.placements, src_data_rank=None)
        into.to_local().copy_(mine.to_local())
    else:
        into.copy_(value)
