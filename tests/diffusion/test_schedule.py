"""The noise schedule against diffusers' DDIMScheduler."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, FlowMatchEulerDiscreteScheduler

from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.errors import ConfigError
from ddil_dist.types import FINAL_TIMESTEP
from tests.diffusion.support import COSINE, SCHEDULES, STABLE_DIFFUSION, ZERO_SNR

EVERY_T = torch.arange(1000)


@pytest.mark.parametrize("config", SCHEDULES)
def test_alpha_and_sigma_are_those_of_diffusers(config: dict[str, Any]) -> None:
    abar = DDIMScheduler(**config).alphas_cumprod.double()
    schedule = NoiseSchedule.from_scheduler_config(DDIMScheduler(**config).config)
    assert schedule.num_timesteps == 1000
    # diffusers multiplies 1,000 factors in float32, each rounded: 1 - beta near 1 has an ulp of 6e-8, beta may be 4e-5.
    assert schedule.alpha(EVERY_T).shape == (1000, 1, 1, 1)
    torch.testing.assert_close(schedule.alpha(EVERY_T).double().flatten(), abar.sqrt(), rtol=2e-4, atol=0)
    torch.testing.assert_close(schedule.sigma(EVERY_T).double().flatten(), (1 - abar).sqrt(), rtol=4e-4, atol=0)
    torch.testing.assert_close(schedule.snr(EVERY_T).double().flatten(), abar / (1 - abar), rtol=8e-4, atol=0)


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


@pytest.mark.parametrize(("config", "zero"), [(config, config is ZERO_SNR) for config in SCHEDULES])
def test_only_a_rescaled_schedule_ends_in_pure_noise(config: dict[str, Any], zero: bool) -> None:
    schedule = NoiseSchedule.from_scheduler_config(DDIMScheduler(**config).config)
    last = torch.tensor([999])
    assert schedule.zero_terminal_snr is zero
    assert bool(schedule.alpha(last) == 0) is zero
    assert bool(schedule.snr(last) == 0) is zero
    assert bool(schedule.sigma(last) == 1) is (zero or config is COSINE)  # 1 - 1e-9 rounds to 1 in float32
    assert schedule.alpha(last - 1) > 0


def test_other_schedules_are_refused_by_name() -> None:
    config = {**DDIMScheduler(**STABLE_DIFFUSION).config, "beta_schedule": "laplace"}
    with pytest.raises(ConfigError, match=r"teacher\.pipeline: .*'laplace'; supported are linear"):
        NoiseSchedule.from_scheduler_config(config)


@pytest.mark.parametrize("scheduler", [FlowMatchEulerDiscreteScheduler, EDMEulerScheduler])
def test_schedulers_without_betas_are_refused_by_name(scheduler: Any) -> None:
    config = {**scheduler().config, "_class_name": scheduler.__name__}
    with pytest.raises(ConfigError, match=rf"teacher\.pipeline: its scheduler \({scheduler.__name__}\)"):
        NoiseSchedule.from_scheduler_config(config)
