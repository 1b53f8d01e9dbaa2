"""A role's half of training: its network, prepared by Accelerate, and its own optimizer and learning rate."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from accelerate import Accelerator
from torch import Tensor, nn

from ddil_dist.config import OptimizerConfig
from learner.optimization import create_optimizer, learning_rate

FOLLOWS_CONFIG = ("lr", "betas", "weight_decay")
"""Of an optimizer's parameter groups: what a resumed run takes from its configuration, not from its checkpoint."""


class Role:
    """One network that is trained, with what trains it.

    network     as Accelerate prepared it, perhaps in a data-parallel wrapper: what losses call.
    parameters  those that are trained: the ones that required gradients when the role was made.
    """

    def __init__(
        self, name: str, network: nn.Module, config: OptimizerConfig, *, accelerator: Accelerator, updates: int
    ) -> None:
        self.name = name
        self.config = config
        self._accelerator = accelerator
        self._updates = updates
        trained = {key: parameter for key, parameter in network.named_parameters() if parameter.requires_grad}
        assert trained, f"{name}: no parameter requires a gradient"
        optimizer = create_optimizer(trained.values(), config)
        self.network, self._optimizer = accelerator.prepare(network, optimizer)
        self.raw: nn.Module = accelerator.unwrap_model(self.network)
        self.parameters = [parameter for key, parameter in self.raw.named_parameters() if key in trained]

    def learning_rate(self, update: int) -> float:
        """The learning rate of an update."""
        return learning_rate(self.config, update, updates=self._updates)

    def clip(self) -> float:
        """Clip the gradient; its norm before, which may not be finite."""
        return float(self._accelerator.clip_grad_norm_(self.parameters, self.config.max_grad_norm))

    def step(self, update: int) -> None:
        """The optimizer's step of an update; the gradient is gone after it."""
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate(update)
        self._optimizer.step()
        self._optimizer.zero_grad()

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict, whole."""
        return dict(self._accelerator.get_state_dict(self.network))

    def optimizer_state(self) -> dict[str, Any]:
        return dict(self._optimizer.state_dict())

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Become what `optimizer_state` described, with the hyperparameters of the configuration."""
        configured = [{key: group[key] for key in FOLLOWS_CONFIG} for group in self._optimizer.param_groups]
        self._optimizer.load_state_dict(state)
        for group, settings in zip(self._optimizer.param_groups, configured, strict=True):
            group.update(settings)


@contextmanager
def in_training(roles: Mapping[str, Role], trained: str, accelerator: Accelerator) -> Iterator[None]:
    """Within the block only the `trained` role's parameters require gradients, and no other role waits for any.

    A data-parallel network whose `forward` is called expects a gradient for each of its parameters; `no_sync` tells
    those of the other roles that none will come.
    """
    with ExitStack() as stack:
        for role in roles.values():
            for parameter in role.parameters if len(roles) > 1 else ():
                parameter.requires_grad_(role.name == trained)
            if role.name != trained:
                stack.enter_context(accelerator.no_sync(role.network))
        yield
