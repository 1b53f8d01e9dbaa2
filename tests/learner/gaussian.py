"""Networks that know the answer where the data are Gaussian: x_0 ~ N(mean, std^2), independent elements.

x_t is then N(alpha mean, c^2) with c^2 = alpha^2 std^2 + sigma^2; E[x_0 | x_t] is linear in x_t, and the probability
flow moves x_t so that (x_t - alpha_t mean) / c_t stays.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.types import FINAL_TIMESTEP


class GaussianNetwork(nn.Module):
    """A network that predicts x_0 exactly ("sample"): E[x_0 | x_t]. mean, std: scalars, or broadcast on [C, H, W]."""

    def __init__(self, schedule: NoiseSchedule, mean: Tensor | float, std: Tensor | float) -> None:
        super().__init__()
        self.config = {"time_cond_proj_dim": None}
        self.schedule = schedule
        self.mean = nn.Parameter(torch.as_tensor(mean, dtype=torch.float32))
        self.std = nn.Parameter(torch.as_tensor(std, dtype=torch.float32))

    def forward(
        self, x: Tensor, t: Tensor, embeddings: Tensor, timestep_cond: Tensor | None, return_dict: bool
    ) -> tuple[Tensor]:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        variance = (alpha * self.std) ** 2 + sigma**2
        return (self.mean + alpha * self.std**2 / variance * (x - alpha * self.mean),)

    @torch.no_grad()
    def flow(self, x: Tensor, t: Tensor, s: Tensor) -> Tensor:
        """Where the probability flow takes x_t [B, C, H, W] from t to s, [B] each."""

        def scale(time: Tensor) -> Tensor:
            return ((self.schedule.alpha(time) * self.std) ** 2 + self.schedule.sigma(time) ** 2).sqrt()

        standard = (x - self.schedule.alpha(t) * self.mean) / scale(t)
        return self.schedule.alpha(s) * self.mean + scale(s) * standard

    @torch.no_grad()
    def origin(self, x: Tensor, t: Tensor) -> Tensor:
        """Where the flow ends: the exact consistency function."""
        return self.flow(x, t, torch.full_like(t, FINAL_TIMESTEP))
