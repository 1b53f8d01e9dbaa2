"""The noise schedule against diffusers' DDIMScheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler

from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.errors import ConfigError
from ddil_dist.types import FINAL_TIMESTEP
from tests.diffusion.support import SCHEDULES

EVERY_T = torch.arange(1000)


@pytest.mark.parametrize("config", SCHEDULES)
def test_alpha_and_sigma_are_those_of_diffusers(config: dict[str, Any]) -> None:
    abar = DDIMScheduler(**config).alphas_cumprod.double()
    schedule = NoiseSchedule.from_scheduler_config(DDIMScheduler(**config).config)
    assert schedule.num_timesteps == 1000
    # diffusers multiplies 1,000 factors in float32.
    assert schedule.alpha(EVERY_T).shape == (1000, 1, 1, 1)
    torch.testing.assert_close(schedule.alpha(EVERY_T).double().flatten(), abar.sqrt(), rtol=2e-4, atol=0)
    torch.testing.assert_close(schedule.sigma(EVERY_T).double().flatten(), (1 - abar).sqrt(), rtol=2e-4, atol=0)
    torch.testing.assert_close(schedule.snr(EVERY_T).double().flatten(), abar / (1 - abar), rtol=4e-4, atol=0)


def test_trained_betas_win_over_the_named_schedule() -> None:
    betas = torch.linspace(0.01, 0.3, 10).tolist()
    config = DDIMScheduler(num_train_timesteps=10, trained_betas=betas).config
    abar = torch.cumprod(1 - torch.tensor(betas, dtype=torch.float64), 0)
    alpha = NoiseSchedule.from_scheduler_config(config).alpha(torch.arange(10))
    torch.testing.assert_close(alpha.double().flatten(), abar.sqrt(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("config", SCHEDULES)
def test_the_final_timestep_is_noiseless_and_not_timestep_0(config: dict[str, Any]) -> None:
    schedule = NoiseSchedule.from_scheduler_config(DDIMScheduler(**config).config)
    t = torch.tensor([FINAL_TIMESTEP, 0])
    assert schedule.alpha(t).flatten()[0] == 1
    assert schedule.sigma(t).flatten()[0] == 0
    assert schedule.sigma(t).flatten()[1] > 0


@pytest.mark.parametrize("config", SCHEDULES)
def test_forward_diffusion_is_that_of_diffusers(config: dict[str, Any]) -> None:
    scheduler = DDIMScheduler(**config)
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, 6, 4, 5, 3, generator=generator)
    t = torch.tensor([0, 1, 250, 500, 749, 999])
    x_t = NoiseSchedule.from_scheduler_config(scheduler.config).add_noise(x_0, noise, t)
    torch.testing.assert_close(x_t, scheduler.add_noise(x_0, noise, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"beta_schedule": "squaredcos_cap_v2"}, "squaredcos_cap_v2"), ({"rescale_betas_zero_snr": True}, "terminal SNR")],
)
def test_other_schedules_are_refused_by_name(change: dict[str, Any], word: str) -> None:
    with pytest.raises(ConfigError, match=rf"teacher\.pipeline: .*{word}"):
        NoiseSchedule.from_scheduler_config(DDIMScheduler(**change).config)
