"""The exponential moving average of a role's weights."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from learner.roles import Role


class Ema:
    """average = decay average + (1 - decay) weights, after every step; it begins at the weights of the first.

    With decay 0 nothing is kept, and the average is the network itself. Where the network is sharded, so is it.
    """

    def __init__(self, role: Role, decay: float) -> None:
        self._role = role
        self._decay = decay
        self._parameters = [parameter.detach() for parameter in role.raw.parameters()]
        self._average: list[Tensor] | None = None
        self.num_averaged = 0

    @property
    def is_kept(self) -> bool:
        """Whether it is anything else than the network's own weights."""
        return self._average is not None

    @torch.no_grad()
    def update(self) -> None:
        """The network has made a step."""
        self.num_averaged += 1
        if not self._decay:
            return
        if self._average is None:
            self._average = [parameter.clone() for parameter in self._parameters]
        else:
            torch._foreach_lerp_(self._average, self._parameters, 1 - self._decay)

    def weights(self) -> dict[str, Tensor]:
        """The network's state dict with averaged parameters, as `Role.weights` gives it."""
        return self._role.weights(self._average)

    @torch.no_grad()
    def load(self, weights: Mapping[str, Tensor], *, num_averaged: int) -> None:
        """Become the average that `weights` returned; raises RuntimeError if it is of another network.

        The role's own weights are spoiled: load them after.
        """
        self._role.load_weights(weights)
        self.num_averaged = num_averaged
        if self._decay and num_averaged:
            self._average = [parameter.clone() for parameter in self._parameters]
