"""The noise schedule: x_t = alpha_t x_0 + sigma_t eps with alpha_t^2 + sigma_t^2 = 1, on the integer training grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ddil_dist.errors import ConfigError
from ddil_dist.types import FINAL_TIMESTEP


class NoiseSchedule:
    """alpha, sigma and SNR at training timesteps; FINAL_TIMESTEP is the noiseless end (alpha 1, sigma 0).

    alphas_cumprod: [T] abar_t, strictly decreasing in [0, 1]; kept in float64, handed out in float32. The last one is 0
    where the terminal SNR is zero: x_T is then pure noise, and a prediction of eps there says nothing about x_0.
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
        if config.get("trained_betas") is None and not {"beta_start", "beta_end", "beta_schedule"} <= config.keys():
            raise ConfigError(
                f"teacher.pipeline: its scheduler ({config.get('_class_name', 'unnamed')}) has no beta_schedule, so "
                "it is not variance preserving in discrete steps; give a pipeline whose scheduler is, such as DDIM's"
            )
        betas = _betas(config)
        abar = torch.cumprod(1 - betas, dim=0)
        return cls(_with_zero_terminal_snr(abar) if config.get("rescale_betas_zero_snr") else abar)

    @property
    def zero_terminal_snr(self) -> bool:
        """Whether alpha is exactly 0 at the noisiest timestep."""
        return bool(self._abar[-1] == 0)

    def alphas_cumprod(self) -> Tensor:
        """abar_t [T] float64."""
        return self._abar[1:]

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


def _betas(config: Mapping[str, Any]) -> Tensor:
    """[T] float64, of a scheduler's config."""
    if config.get("trained_betas") is not None:
        return torch.as_tensor(config["trained_betas"], dtype=torch.float64)
    num, kind = int(config["num_train_timesteps"]), config["beta_schedule"]
    start, end = float(config["beta_start"]), float(config["beta_end"])
    if kind == "linear":
        return torch.linspace(start, end, num, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, num, dtype=torch.float64) ** 2
    if kind == "squaredcos_cap_v2":
        return torch.tensor([_cosine_beta(i, num) for i in range(num)], dtype=torch.float64)
    raise ConfigError(
        f"teacher.pipeline: its scheduler has beta_schedule {kind!r}; supported are linear, scaled_linear and "
        "squaredcos_cap_v2"
    )


def _cosine_beta(i: int, num: int) -> float:
    """1 - abar((i + 1) / T) / abar(i / T), at most 0.999; abar is a squared cosine (Nichol & Dhariwal 2021, Eq. 17)."""

    def abar(time: float) -> float:
        return math.cos((time + 0.008) / 1.008 * math.pi / 2) ** 2

    return min(1 - abar((i + 1) / num) / abar(i / num), 0.999)


def _with_zero_terminal_snr(abar: Tensor) -> Tensor:
    """sqrt(abar) shifted to end at 0 and scaled to begin where it began (Lin et al. 2024, Algorithm 1)."""
    root = abar.sqrt()
    return ((root - root[-1]) * (root[0] / (root[0] - root[-1]))) ** 2
