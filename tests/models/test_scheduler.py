"""The scheduler inside an export: which grids can travel, whose transitions it makes, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler

from ddil_dist.diffusion.grid import timestep_grid
from ddil_dist.errors import ConfigError
from ddil_dist.models.scheduler import Sampler, student_scheduler
from tests.diffusion.support import COSINE, STABLE_DIFFUSION, ZERO_SNR


def scheduler_for(timesteps: tuple[int, ...], sampler: Sampler = "deterministic", **changes: Any) -> Any:
    config = DDIMScheduler(**{**STABLE_DIFFUSION, **changes.pop("config", {})}).config
    return student_scheduler(config, sampler=sampler, timesteps=timesteps, prediction_type="v_prediction", **changes)


@pytest.mark.parametrize(
    ("timesteps", "sampler", "kind"),
    [
        (timestep_grid(4, spacing="linspace"), "deterministic", DPMSolverMultistepScheduler),
        (timestep_grid(6, spacing="trailing"), "deterministic", DPMSolverMultistepScheduler),
        (timestep_grid(6, spacing="leading"), "deterministic", DPMSolverMultistepScheduler),
        ((751, 501, 251, 1), "deterministic", DDIMScheduler),
        ((999, 749, 499, 249), "renoising", LCMScheduler),
        ((999, 666, 333), "renoising", LCMScheduler),
        ((999,), "renoising", LCMScheduler),
    ],
)
def test_a_grid_travels_in_the_schedulers_settings(timesteps: tuple[int, ...], sampler: Sampler, kind: type) -> None:
    scheduler = scheduler_for(timesteps, sampler)
    again = type(scheduler).from_config(scheduler.config)
    again.set_timesteps(len(timesteps))
    assert type(again) is kind
    assert tuple(again.timesteps.tolist()) == timesteps
    assert again.config.prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("timesteps", "sampler"),
    [
        ((999, 700, 400, 100), "deterministic"),
        ((900, 600, 300), "deterministic"),
        ((999, 749, 500, 250), "renoising"),
        ((999, 700, 400, 100), "renoising"),
    ],
)
def test_a_grid_that_no_scheduler_makes_is_refused(timesteps: tuple[int, ...], sampler: Sampler) -> None:
    with pytest.raises(ConfigError, match=rf"student\.timesteps: no stock scheduler makes .* {sampler}"):
        scheduler_for(timesteps, sampler)


def test_a_consistency_student_keeps_its_solvers_grid_at_every_number_of_steps() -> None:
    scheduler = scheduler_for((999, 759, 499, 259), "consistency", solver_points=50)
    assert scheduler.config.original_inference_steps == 50
    scheduler.set_timesteps(2)
    assert scheduler.timesteps.tolist() == [999, 499]
    with pytest.raises(ConfigError, match="consistency transitions"):
        scheduler_for((999, 749, 499, 249), "consistency", solver_points=50)


@pytest.mark.parametrize("config", [ZERO_SNR, COSINE])
@pytest.mark.parametrize("sampler", ["deterministic", "renoising"])
def test_the_teachers_noise_schedule_travels(config: dict[str, Any], sampler: Sampler) -> None:
    scheduler = scheduler_for((999, 749, 499, 249), sampler, config=config)
    theirs = DDIMScheduler(**{**STABLE_DIFFUSION, **config}).alphas_cumprod
    torch.testing.assert_close(scheduler.alphas_cumprod, theirs, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("num_steps", "kind"), [(4, DDIMScheduler), (6, DPMSolverMultistepScheduler)])
def test_even_steps_from_pure_noise_are_ddims_own(num_steps: int, kind: type) -> None:
    scheduler = scheduler_for(timestep_grid(num_steps, spacing="trailing"), config=ZERO_SNR)
    assert type(scheduler) is kind
    assert bool(scheduler.alphas_cumprod[-1] == 0) is (kind is DDIMScheduler)


def test_renoising_leaves_the_boundary_condition_out_of_reach() -> None:
    scheduler = scheduler_for((999, 749, 499, 249), "renoising")
    c_skip, c_out = scheduler.get_scalings_for_boundary_condition_discrete(1)
    assert c_skip < 3e-9
    assert c_out == pytest.approx(1, abs=3e-9)
