"""The boundary condition and the sampler's stops against diffusers' `LCMScheduler`."""

from __future__ import annotations

import pytest
import torch
from diffusers import LCMScheduler

from ddil_dist.diffusion.consistency import BoundaryCondition, multistep_indices
from ddil_dist.diffusion.grid import timestep_grid
from ddil_dist.types import FINAL_TIMESTEP


@pytest.mark.parametrize("scaling", [10.0, 3.0])
def test_the_boundary_scalings_are_lcms_at_every_timestep(scaling: float) -> None:
    t = torch.arange(1000)
    c_skip, c_out = BoundaryCondition(timestep_scaling=scaling).scalings(t)
    scheduler = LCMScheduler(timestep_scaling=scaling)
    theirs = [scheduler.get_scalings_for_boundary_condition_discrete(int(step)) for step in t]
    torch.testing.assert_close(c_skip.flatten(), torch.tensor([skip for skip, _ in theirs]), rtol=1e-6, atol=0)
    torch.testing.assert_close(c_out.flatten(), torch.tensor([out for _, out in theirs]), rtol=1e-6, atol=0)


def test_the_function_is_the_identity_without_noise_and_the_estimate_far_from_it() -> None:
    x_t, x_0 = torch.randn(2, 3, 4, 2, 2).unbind(0)
    t = torch.tensor([FINAL_TIMESTEP, 0, 999])
    answer = BoundaryCondition().consistent(x_t, x_0, t)
    assert torch.equal(answer[:2], x_t[:2])
    torch.testing.assert_close(answer[2], x_0[2], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_points", [50, 25])
def test_a_multistep_sampler_stops_where_lcms_does(num_points: int) -> None:
    scheduler = LCMScheduler(original_inference_steps=num_points)
    grid = timestep_grid(num_points, spacing="trailing")
    for num_steps in range(1, num_points + 1):
        scheduler.set_timesteps(num_steps)
        stops = [grid[index] for index in multistep_indices(num_steps, num_points)]
        assert stops == scheduler.timesteps.tolist()
