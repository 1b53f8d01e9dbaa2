"""A role's half of training: its network, prepared by Accelerate, and its own optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.nn.parallel import DistributedDataParallel

from ddil_dist.config import OptimizerConfig
from ddil_dist.errors import ConfigError
from learner.optimization import create_optimizer, learning_rate

FOLLOWS_CONFIG = ("lr", "betas", "weight_decay")
"""Of an optimizer's parameter groups: what a resumed run takes from its configuration, not from its checkpoint."""


class Role:
    """One network that is trained, with what trains it.

    network     as Accelerate prepared it, perhaps in a data-parallel wrapper: what losses call.
    raw         the same without a wrapper; its parameters are shards where workers share the network among them.
    parameters  those that are trained: the ones that required gradients when the role was made.

    Weights and optimizer states are whole at rest, by the names of parameters, however they are kept in training: a
    run may be resumed with its networks sharded or not. Every worker makes every call.
    """

    def __init__(
        self, name: str, network: nn.Module, config: OptimizerConfig, *, accelerator: Accelerator, updates: int
    ) -> None:
        check_supported(accelerator)
        self.name = name
        self.config = config
        self._accelerator = accelerator
        self._updates = updates
        self._sharded = bool(accelerator.is_fsdp2)
        trained = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
        assert trained, f"{name}: no parameter requires a gradient"
        if self._sharded:  # what data parallelism does by itself: begin with the weights of rank 0
            for tensor in (*network.parameters(), *network.buffers()):
                torch.distributed.broadcast(tensor.detach(), src=0)
        optimizer = create_optimizer(trained.values(), config)
        self.network, self._optimizer = accelerator.prepare(network, optimizer)
        self.raw: nn.Module = accelerator.unwrap_model(self.network)
        if self._sharded:
            _settle_precision(self.raw)
        self._names = list(trained)
        self.parameters = [self.raw.get_parameter(key) for key in self._names]

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update."""
        return learning_rate(self.config, update, updates=self._updates)

    def clip(self) -> Tensor:
        """Clip the gradient; its norm before, over all workers, a scalar that may not be finite."""
        if self._sharded:  # Accelerate would look for the network by comparing shards, which have no truth value
            self._accelerator.unscale_gradients(self._optimizer)
            norm: Any = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        else:
            norm = self._accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        whole: Tensor = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        return whole

    def step(self, update: int) -> None:
        """The optimizer's step of an update; the gradient is gone after it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(update)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if isinstance(self.network, DistributedDataParallel):
            # Once, after its first common gradient, the workers settle on an order to send gradients in. By itself that
            # happens when the network is next called, where one of them may have just failed for want of memory.
            self.network.reducer._rebuild_buckets()

    def drop_gradient(self) -> None:
        """As if there had been no backward pass."""
        self._optimizer.zero_grad()

    def average_gradient(self) -> None:
        """Average the gradients that the workers have each made alone."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = self._accelerator.reduce(parameter.grad, reduction="mean")

    # -- at rest ------------------------------------------------------------------------------------------------------

    def weights(self, parameters: Sequence[Tensor] | None = None) -> dict[str, Tensor]:
        """The network's state dict, whole; where it is sharded, on rank 0 and empty elsewhere.

        parameters: others in place of the network's own, in their order, such as an average of them.
        """
        if parameters is None:
            return dict(self._accelerator.get_state_dict(self.network))
        if not self._sharded:
            names = [name for name, _ in self.raw.named_parameters()]
            return {**self.raw.state_dict(), **dict(zip(names, parameters, strict=True))}
        with _exchanged(list(self.raw.parameters()), parameters):
            return {name: tensor.clone() for name, tensor in self._accelerator.get_state_dict(self.network).items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Become what `weights` returned. Raises RuntimeError if they are of another network."""
        if self._sharded:
            set_model_state_dict(self.raw, dict(weights), options=StateDictOptions(full_state_dict=True, strict=True))
        else:
            self.raw.load_state_dict(weights)

    def optimizer_state(self) -> dict[str, Any]:
        """The optimizer's state by parameter name, whole; where it is sharded, on rank 0."""
        if self._sharded:
            options = StateDictOptions(full_state_dict=True, cpu_offload=True)
            state = get_optimizer_state_dict(self.raw, self._optimizer.optimizer, options=options)
            return {"state": state.get("state", {})}
        by_position = self._optimizer.state_dict()["state"]
        return {"state": {self._names[position]: state for position, state in by_position.items()}}

    def load_optimizer_state(self, saved: Mapping[str, Any]) -> None:
        """Become what `optimizer_state` described, with the hyperparameters of the configuration."""
        configured = [{key: group[key] for key in FOLLOWS_CONFIG} for group in self._optimizer.param_groups]
        if self._sharded:
            own = get_optimizer_state_dict(
                self.raw, self._optimizer.optimizer, options=StateDictOptions(full_state_dict=True, cpu_offload=True)
            )
            whole = {"state": dict(saved["state"]), "param_groups": own.get("param_groups", [])}
            options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
            set_optimizer_state_dict(self.raw, self._optimizer.optimizer, whole, options=options)
        else:
            state = {self._names.index(name): state for name, state in saved["state"].items()}
            self._optimizer.load_state_dict({"state": state, "param_groups": self._groups()})
        for group, settings in zip(self._optimizer.param_groups, configured, strict=True):
            group.update(settings)

    def _groups(self) -> list[dict[str, Any]]:
        return list(self._optimizer.state_dict()["param_groups"])


def _settle_precision(network: nn.Module) -> None:
    """Have a sharded network take its precisions from all its parameters now.

    By itself it does so at its first call, from those that then require gradients: of a network that is first called
    while another is trained, none. Its gradients would have no precision to be reduced in.
    """
    assert isinstance(network, FSDPModule)
    network._get_fsdp_state()._lazy_init()


def check_supported(accelerator: Accelerator) -> None:
    """Raises ConfigError for ways of sharding under which checkpoints would not be whole."""
    kind = accelerator.distributed_type
    if kind == DistributedType.DEEPSPEED or (kind == DistributedType.FSDP and not accelerator.is_fsdp2):
        raise ConfigError(
            f"learner: Accelerate is configured for {kind.value}, whose optimizer state cannot be checkpointed as "
            "plain data; shard with learner.sharding=fsdp (FSDP2), and unset ACCELERATE_USE_DEEPSPEED and "
            "ACCELERATE_USE_FSDP"
        )


@contextmanager
def in_training(roles: Mapping[str, Role], trained: str, accelerator: Accelerator) -> Iterator[None]:
    """Within the block only the `trained` role's parameters require gradients, and no other role waits for any.

    A data-parallel network whose `forward` is called expects a gradient for each of its parameters; `no_sync` tells
    those of the other roles that none will come. A sharded one sees by itself that none has come, and would keep whole
    gradients for later under `no_sync`, also of blocks that were not called.
    """
    with ExitStack() as stack:
        for role in roles.values():
            for parameter in role.parameters if len(roles) > 1 else ():
                parameter.requires_grad_(role.name == trained)
            if role.name != trained and not accelerator.is_fsdp2:
                stack.enter_context(accelerator.no_sync(role.network))
        yield


@contextmanager
def _exchanged(ours: Sequence[Tensor], others: Sequence[Tensor]) -> Iterator[None]:
    """Within the block `ours` hold the values of `others`."""
    with torch.no_grad():
        kept = [tensor.detach().clone() for tensor in ours]
        for tensor, value in zip(ours, others, strict=True):
            tensor.copy_(value)
        try:
            yield
        finally:
            for tensor, value in zip(ours, kept, strict=True):
                tensor.copy_(value)
