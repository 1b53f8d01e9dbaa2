"""The exponential moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddil_dist.errors import CheckpointError


class WeightAverage:
    """average = decay average + (1 - decay) weights, after every step; it begins at the weights of the first.

    With decay 0 nothing is kept, and the average is the network itself.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        self._network = network
        self._decay = decay
        self._parameters = [parameter.detach() for parameter in network.parameters()]
        self._names = [name for name, _ in network.named_parameters()]
        self._average: list[Tensor] = []
        self.num_averaged = 0

    @torch.no_grad()
    def update(self) -> None:
        """The network has made a step."""
        self.num_averaged += 1
        if not self._decay:
            return
        if not self._average:
            self._average = [parameter.clone() for parameter in self._parameters]
        else:
            torch._foreach_lerp_(self._average, self._parameters, 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict with averaged parameters."""
        return {**self._network.state_dict(), **dict(zip(self._names, self._average, strict=False))}

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], *, num_averaged: int) -> None:
        """Become the average that `weights` returned; raises CheckpointError if it is of another network."""
        if not set(self._names) <= weights.keys():
            raise CheckpointError("the saved average does not fit the student; choose another run.name")
        self.num_averaged = num_averaged
        if self._decay and num_averaged:
            self._average = [
                weights[name].to(parameter.device, parameter.dtype, copy=True)
                for name, parameter in zip(self._names, self._parameters, strict=True)
            ]
