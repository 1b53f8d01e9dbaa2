"""The noise schedule: x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1, on the integer training grid."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddil_dist.errors import ConfigError
from ddil_dist.types import FINAL_TIMESTEP


class NoiseSchedule:
    """alpha, sigma and SNR at training timesteps; FINAL_TIMESTEP is the noiseless end (alpha 1, sigma 0).

    alphas_cumprod: [T] abar_t, strictly decreasing in (0, 1]; kept in float64, handed out in float32.
    """

    def __init__(self, alphas_cumprod: Tensor) -> None:
        abar = alphas_cumprod.detach().to("cpu", torch.float64)
        assert abar.ndim == 1
        assert bool((abar[1:] < abar[:-1]).all()), "abar must fall strictly"
        self.num_timesteps = len(abar)
        self._abar = torch.cat([torch.ones(1, dtype=torch.float64), abar])  # index t + 1
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @classmethod
    def from_scheduler_config(cls, config: Mapping[str, Any]) -> NoiseSchedule:
        """The training schedule that a diffusers scheduler's config describes; raises ConfigError if unsupported."""
        num = int(config["num_train_timesteps"])
        start, end = float(config["beta_start"]), float(config["beta_end"])
        kind = config["beta_schedule"]
        if config.get("trained_betas") is not None:
            betas = torch.as_tensor(config["trained_betas"], dtype=torch.float64)
        elif kind == "linear":
            betas = torch.linspace(start, end, num, dtype=torch.float64)
        elif kind == "scaled_linear":
            betas = torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
        else:
            raise ConfigError(
                f"teacher.pipeline: its scheduler has beta_schedule {kind!r}; supported are linear and scaled_linear"
            )
        if config.get("rescale_betas_zero_snr"):
            raise ConfigError("teacher.pipeline: its scheduler rescales to zero terminal SNR, which is not supported")
        return cls(torch.cumprod(1 - betas, dim=0))

    def alpha(self, t: Tensor) -> Tensor:
        """alpha_t as [B, 1, 1, 1] float32 for t [B] int64."""
        return self._lookup(t)[0]

    def sigma(self, t: Tensor) -> Tensor:
        """sigma_t as [B, 1, 1, 1] float32 for t [B] int64."""
        return self._lookup(t)[1]

    def snr(self, t: Tensor) -> Tensor:
        """alpha_t^2 / sigma_t^2 as [B, 1, 1, 1] float32; t must not be FINAL_TIMESTEP."""
        alpha, sigma = self._lookup(t)
        return (alpha / sigma) ** 2

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Forward diffusion q(x_t | x_0). x_0, noise: [B, C, H, W]; t: [B] int64."""
        alpha, sigma = self._lookup(t)
        return alpha * x_0 + sigma * noise

    def _lookup(self, t: Tensor) -> tuple[Tensor, Tensor]:
        assert t.dtype == torch.int64
        tables = self._tables.get(t.device)
        if tables is None:
            tables = (self._abar.sqrt().float().to(t.device), (1 - self._abar).sqrt().float().to(t.device))
            self._tables[t.device] = tables
        index = (t - FINAL_TIMESTEP).view(-1, 1, 1, 1)
        return tables[0][index], tables[1][index]
