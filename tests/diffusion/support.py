"""Schedules under test, and data whose score is known in closed form."""

from __future__ import annotations

from dataclasses import dataclass

from diffusers import DDIMScheduler
from torch import Tensor

from ddil_dist.diffusion.schedule import NoiseSchedule

STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
DDPM = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
ZERO_SNR = {**STABLE_DIFFUSION, "rescale_betas_zero_snr": True}
SCHEDULES = [STABLE_DIFFUSION, DDPM, COSINE, ZERO_SNR]


def stable_diffusion_schedule() -> NoiseSchedule:
    return NoiseSchedule.from_scheduler_config(DDIMScheduler(**STABLE_DIFFUSION).config)


@dataclass(frozen=True)
class GaussianData:
    """x_0 ~ N(mean, std^2) in every coordinate: denoiser and probability-flow ODE have closed forms."""

    mean: float
    std: float

    def x_0(self, x_t: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """E[x_0 | x_t] = mu + alpha s^2 (x_t - alpha mu) / (alpha^2 s^2 + sigma^2)."""
        return self.mean + alpha * self.std**2 * (x_t - alpha * self.mean) / self._variance(alpha, sigma)

    def x_s(self, x_t: Tensor, alpha_t: Tensor, sigma_t: Tensor, alpha_s: Tensor, sigma_s: Tensor) -> Tensor:
        """The ODE keeps a point's standard score under the marginals N(alpha mu, alpha^2 s^2 + sigma^2)."""
        score = (x_t - alpha_t * self.mean) / self._variance(alpha_t, sigma_t).sqrt()
        return alpha_s * self.mean + self._variance(alpha_s, sigma_s).sqrt() * score

    def _variance(self, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha**2 * self.std**2 + sigma**2
