"""The policy under training: float32 master weights, a forward pass in `--dtype`, spread over the processes."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from dpocli.checkpoint.storage import MODEL, OPTIMIZER, StoredTensor
from dpocli.config.commands import TrainOptions
from dpocli.config.hyperparameters import Need
from dpocli.config.loss_expression import LossChoice
from dpocli.distributed.fsdp import decoder_layers, shard
from dpocli.distributed.processes import Processes
from dpocli.model import lora
from dpocli.model.identity import ModelFiles
from dpocli.model.load import load_base, without_dropout
from dpocli.model.sharded import check_spreadable, fill, load_spread
from dpocli.scoring.passes import token_budget
from dpocli.scoring.scorer import PairScorer

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
    is_spread = options.model.shards > 1 or options.policy.cpu_offload
    if is_spread:
        check_spreadable(files)
    if files.adapter or options.lora.rank:
        # The base is frozen, so it needs no float32 master of its own.
        model = load_base(files, options.model, dtype, torch.device("cpu") if is_spread else processes.device)
        model.requires_grad_(False)
        adapter = (
            lora.put_on(model, files.adapter, trainable=True)
            if files.adapter
            else lora.new(model, options.lora, options.seed)
        )
    else:
        model = (
            load_spread(files, options.model, torch.float32, processes.device)
            if is_spread
            else load_base(files, options.model, torch.float32, processes.device)
        )
    scorer = PairScorer(
        model,
        collision=Need.COLLISION in loss.needs,
        router_loss=options.policy.router_aux_loss_coef > 0,
        token_budget=token_budget(options.scoring.token_budget, processes.device),
        device=processes.device,
    )
    return Policy(scorer, options, dtype, processes, files, adapter)


class Policy:
    """A scorer whose parameters can be trained."""

    def __init__(
        self,
        scorer: PairScorer,
        options: TrainOptions,
        dtype: torch.dtype,
        processes: Processes,
        files: ModelFiles | None = None,
        adapter: "PeftModel | None" = None,
    ) -> None:
        self.files = files
        """Where it was read from."""
        self.adapter = adapter
        """Where one is trained instead of the model."""
        self.source_config = copy.deepcopy(scorer.model.config)
        """As it was, to be saved with the trained model."""
        if not options.policy.model_dropout:
            without_dropout(scorer.model, but="lora_dropout")  # which has an option of its own
        scorer.train()
        if options.policy.gradient_checkpointing:
            # The name changed in transformers 5.2x.
            enable = getattr(
                scorer.model, "activation_checkpointing_enable", scorer.model.gradient_checkpointing_enable
            )
            enable({"use_reentrant": False})
        self.scorer = scorer
        scorer.compute_dtype = dtype
        saved = scorer.model.state_dict().keys()
        self.buffers = {name: buffer for name, buffer in scorer.model.named_buffers() if name in saved}
        """Not trained; saved with the model (a router's bias, for example)."""
        self.processes = processes
        self.is_sharded = options.model.shards > 1
        """Whether each process holds a part of every weight."""
        frozen = {parameter for parameter in scorer.parameters() if not parameter.requires_grad}
        layers = decoder_layers(scorer.model)
        shard(
            scorer,
            layers,
            processes.mesh(options.model.shards),
            dtype=dtype,
            offload=options.policy.cpu_offload,
            ignored=set() if self.is_sharded else frozen,  # a frozen model that fits has nothing to exchange
        )
        if scorer.is_blank:
            assert files
            fill(scorer, scorer.model, files, processes.device, offload=options.policy.cpu_offload)
        # Taken now: between a forward pass and its backward pass the module shows its copies in `dtype` instead.
        self.master_weights: list[tuple[str, nn.Parameter]] = [
            (name, parameter) for name, parameter in scorer.model.named_parameters() if parameter.requires_grad
        ]
        """The float32 master weights that are trained: names as the source model knows them, each tensor once."""
        ends = [layers[0], layers[-1]] if layers else [scorer]
        self._outer_layers = [parameter for layer in ends for parameter in layer.parameters()]

    def state_tensors(self, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Master weights and moments by their names in a checkpoint."""
        moments = {
            f"{OPTIMIZER}{name}/{key}": value
            for name, parameter in self.master_weights
            for key, value in sorted(optimizer.state[parameter].items())
        }
        return self._weight_tensors() | moments

    def allocate_state(self, optimizer: torch.optim.Optimizer, stored: Mapping[str, StoredTensor]) -> dict[str, Tensor]:
        """Tensors to read a checkpoint into: the master weights, and moments, in place where the optimizer has them."""
        parameters = dict(self.master_weights)
        tensors = self._weight_tensors()
        for entry, facts in stored.items():
            if not entry.startswith(OPTIMIZER):
                continue
            name, _, key = entry.removeprefix(OPTIMIZER).rpartition("/")
            parameter = parameters[name]
            there = optimizer.state[parameter].get(key) if parameter in optimizer.state else None
            if there is not None and (there.shape, there.dtype) == (facts.shape, facts.dtype):
                tensors[entry] = there
            elif facts.shape == parameter.shape:
                tensors[entry] = torch.zeros_like(parameter, dtype=facts.dtype, requires_grad=False)
            else:
                tensors[entry] = torch.zeros(facts.shape, dtype=facts.dtype)
        return tensors

    def load_moments(self, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
        """Give the optimizer the moments of a checkpoint; the weights were read in place."""
        parameters = dict(self.master_weights)
        for entry, value in tensors.items():
            if entry.startswith(OPTIMIZER):
                name, _, key = entry.removeprefix(OPTIMIZER).rpartition("/")
                optimizer.state[parameters[name]][key] = value

    def _weight_tensors(self) -> dict[str, Tensor]:
        return {f"{MODEL}{name}": parameter.detach() for name, parameter in self.master_weights}

    def reduce_gradients_on_backward(self, now: bool) -> None:
        """Between replicas, gradients travel once a step, with its last micro-batch; between shards with every one."""
        assert isinstance(self.scorer, FSDPModule)
        self.scorer.set_requires_gradient_sync(now or self.processes.count == 1 or self.is_sharded)
        self.scorer.set_requires_all_reduce(now)
        # Between micro-batches the weights stay as they are, so where it is whole the copy that computes stays too.
        self.scorer.set_reshard_after_backward(now or self.is_sharded)

    def num_parameters(self) -> int:
        """Trainable ones."""
        return sum(parameter.numel() for _, parameter in self.master_weights)

    @contextmanager
    def dropout_off(self) -> Iterator[None]:
        """In training mode, but without anything random."""
        put_back = without_dropout(self.scorer.model)
        try:
            yield
        finally:
            put_back()

    @contextmanager
    def eval_mode(self) -> Iterator[None]:
        """Without dropout and without a graph, for measuring."""
        self.scorer.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.scorer.train()

    def outer_gradient(self, loss: Tensor) -> Tensor:
        """Back-propagates `loss`; what this process holds of the gradient of the first and the last layer, flat, on the
        CPU. All gradients are gone afterwards."""
        self.reduce_gradients_on_backward(True)
        loss.backward()  # type: ignore[no-untyped-call]
        found = (parameter.grad for parameter in self._outer_layers)
        local = [local_part(grad) for grad in found if grad is not None]
        flat = torch.cat([grad.detach().float().flatten() for grad in local]).cpu()
        self.scorer.zero_grad()
        return flat

    def weights(self) -> dict[str, Tensor]:
        """Full float32 tensors on the CPU: all of them on the first process, none on the others, which help."""
        return self.collect((name, parameter.detach()) for name, parameter in self.master_weights)

    def collect(self, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
        """Full tensors of sharded ones, for the first process. Every process must call it with the same names."""
        full: dict[str, Tensor] = {}
        for name, tensor in tensors:
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if self.processes.is_first:
                full[name] = value.detach().cpu().clone()
        return full


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
