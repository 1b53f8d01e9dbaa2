"""Consistency models over a solver's grid: the boundary condition, and where a multistep sampler stops (LCM).

f(x_t, t) = c_skip x_t + c_out x^_0 with c_skip = d^2 / ((s t)^2 + d^2), c_out = s t / sqrt((s t)^2 + d^2): the identity
where no noise is left, and all but x^_0 elsewhere (Luo et al. 2023, after Song et al. 2023, Appendix C). The
constants are those of diffusers' `LCMScheduler`, which runs the exported student.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class BoundaryCondition:
    """d (sigma_data) and s (timestep_scaling)."""

    sigma_data: float = 0.5
    timestep_scaling: float = 10.0

    def scalings(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """c_skip and c_out, each [B, 1, 1, 1] float32, at t [B] int64; FINAL_TIMESTEP counts as 0: (1, 0)."""
        scaled = self.timestep_scaling * t.clamp(min=0).to(torch.float64).view(-1, 1, 1, 1)
        square = scaled**2 + self.sigma_data**2
        return (self.sigma_data**2 / square).float(), (scaled / square.sqrt()).float()

    def consistent(self, x_t: Tensor, x_0: Tensor, t: Tensor) -> Tensor:
        """f(x_t, t) [B, C, H, W], where x_0 is what the network's output at x_t [B, C, H, W], t [B] int64 implies."""
        c_skip, c_out = self.scalings(t)
        return c_skip * x_t + c_out * x_0


LCM_BOUNDARY = BoundaryCondition()
"""With diffusers' constants, as every student here is trained and sampled."""


def multistep_indices(num_steps: int, num_points: int) -> tuple[int, ...]:
    """Positions of a sampler's `num_steps` stops on a grid of `num_points`, rising from 0, as in `LCMScheduler`."""
    assert 1 <= num_steps <= num_points
    # The float arithmetic is diffusers' too: integers would floor differently where the quotient is just below one.
    stops = np.linspace(0, num_points, num_steps, endpoint=False)
    return tuple(int(stop) for stop in np.floor(stops))
