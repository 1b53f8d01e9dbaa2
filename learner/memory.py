"""What an update needs of the device's memory: counted where it can be, probed where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from learner.roles import Role


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one worker's device, where nothing is sharded. activations: of one backward pass of `rows` rows."""

    weights: int
    gradients: int
    optimizer: int
    average: int
    activations: int
    rows: int

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.average + self.activations

    def __str__(self) -> str:
        parts = {name: value for name, value in vars(self).items() if name != "rows" and value}
        listed = ", ".join(f"{name} {value / 1e6:,.0f} MB" for name, value in parts.items())
        return f"{self.total / 1e6:,.0f} MB ({listed} for {self.rows} rows a backward pass)"

    def fields(self) -> dict[str, int]:
        """As a journal line has them."""
        return {**{f"{name}_bytes": value for name, value in vars(self).items() if name != "rows"}, "rows": self.rows}


def estimate_memory(
    roles: Mapping[str, Role], others: Iterable[nn.Module], *, averaged: bool, activations_a_row: int, rows: int
) -> MemoryEstimate:
    """Of the networks in training and `others` beside them, for backward passes of `rows` rows of the student."""
    trained = [parameter for role in roles.values() for parameter in role.parameters]
    networks = [role.raw for role in roles.values()] + list(others)
    moments = sum(
        2 * parameter.numel() * (1 if role.config.type == "adamw_8bit" else parameter.element_size())
        for role in roles.values()
        for parameter in role.parameters
    )
    return MemoryEstimate(
        weights=sum(_bytes(network.parameters()) for network in networks),
        gradients=_bytes(trained),
        optimizer=moments,
        average=_bytes(roles["student"].raw.parameters()) if averaged else 0,
        activations=activations_a_row * rows,
        rows=rows,
    )


def activation_bytes(forward: Callable[[], Tensor], *networks: nn.Module) -> int:
    """Bytes that a `forward` through the networks keeps for its backward pass, beside their own weights.

    networks: all whose weights it meets, the frozen base of an adapter too. Nothing is changed: neither gradients nor
    random states.
    """
    parameters = [parameter for network in networks for parameter in network.parameters()]
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept: dict[int, tuple[int, Tensor]] = {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no later one takes its place
        return tensor

    devices = sorted({parameter.device.index or 0 for parameter in parameters if parameter.is_cuda})
    with torch.random.fork_rng(devices), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = forward()
    del output
    return sum(size for size, _ in kept.values())


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
