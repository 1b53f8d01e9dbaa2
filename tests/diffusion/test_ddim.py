"""DDIM transitions against diffusers' schedulers and against the probability-flow ODE of Gaussian data."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddil_dist.diffusion.ddim import ddim_step, x_0_of_transition
from ddil_dist.diffusion.grid import Spacing, TrajectoryGrid, timestep_grid
from ddil_dist.diffusion.parameterization import PredictionType, prediction_from_x_0, x_0_from_prediction
from ddil_dist.diffusion.schedule import NoiseSchedule
from ddil_dist.types import FINAL_TIMESTEP
from tests.diffusion.support import STABLE_DIFFUSION, ZERO_SNR, GaussianData, stable_diffusion_schedule

SCHEDULE = stable_diffusion_schedule()
DATA = GaussianData(mean=0.7, std=0.4)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def solve(x: Tensor, points: tuple[int, ...]) -> Tensor:
    """DDIM on Gaussian data through `points`, the last of which may be FINAL_TIMESTEP."""
    for t, s in itertools.pairwise(points):
        times, nexts = torch.full((len(x),), t), torch.full((len(x),), s)
        x_0 = DATA.x_0(x, SCHEDULE.alpha(times), SCHEDULE.sigma(times))
        x = ddim_step(x, x_0, times, nexts, schedule=SCHEDULE)
    return x


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 4, 5, 8, 20, 50])
def test_a_step_is_that_of_ddim_scheduler_where_its_grid_is_even(num_steps: int, kind: PredictionType) -> None:
    # DDIMScheduler takes t - 1000 // n for the next timestep: right on the trailing grid where n divides 1000.
    scheduler = DDIMScheduler(
        **STABLE_DIFFUSION, prediction_type=kind, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    scheduler.set_timesteps(num_steps)
    points = (*timestep_grid(num_steps, spacing="trailing"), FINAL_TIMESTEP)
    assert list(points[:-1]) == scheduler.timesteps.tolist()
    for t, s in itertools.pairwise(points):
        prediction, x_t = noise(2, 2, 4, 3, 3, seed=t)
        times, nexts = torch.full((2,), t), torch.full((2,), s)
        x_0 = x_0_from_prediction(prediction, x_t, SCHEDULE.alpha(times), SCHEDULE.sigma(times), prediction_type=kind)
        ours = ddim_step(x_t, x_0, times, nexts, schedule=SCHEDULE)
        theirs = scheduler.step(prediction, t, x_t, eta=0.0).prev_sample
        torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("kind", ["v_prediction", "sample"])
@pytest.mark.parametrize("num_steps", [1, 4, 50])
def test_a_step_from_pure_noise_is_that_of_ddim_scheduler(num_steps: int, kind: PredictionType) -> None:
    scheduler = DDIMScheduler(
        **ZERO_SNR, prediction_type=kind, clip_sample=False, set_alpha_to_one=True, timestep_spacing="trailing"
    )
    schedule = NoiseSchedule.from_scheduler_config(scheduler.config)
    scheduler.set_timesteps(num_steps)
    x = start = noise(2, 4, 3, 3)
    theirs = start
    for t, s in itertools.pairwise((*timestep_grid(num_steps, spacing="trailing"), FINAL_TIMESTEP)):
        prediction = noise(2, 4, 3, 3, seed=t)
        times, nexts = torch.full((2,), t), torch.full((2,), s)
        x_0 = x_0_from_prediction(prediction, x, schedule.alpha(times), schedule.sigma(times), prediction_type=kind)
        reached = ddim_step(x, x_0, times, nexts, schedule=schedule)
        torch.testing.assert_close(
            x_0_of_transition(x, reached, times, nexts, schedule=schedule), x_0, rtol=1e-3, atol=1e-3
        )
        x, theirs = reached, scheduler.step(prediction, t, theirs, eta=0.0).prev_sample
        torch.testing.assert_close(x, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spacing", ["linspace", "trailing", "leading"])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("num_steps", [1, 2, 4, 6, 7, 16, 32])
def test_a_trajectory_is_that_of_first_order_dpm_solver(num_steps: int, kind: PredictionType, spacing: Spacing) -> None:
    scheduler = DPMSolverMultistepScheduler(
        **STABLE_DIFFUSION,
        prediction_type=kind,
        solver_order=1,
        algorithm_type="dpmsolver++",
        timestep_spacing=spacing,
        final_sigmas_type="zero",
        steps_offset=1,
    )
    scheduler.set_timesteps(num_steps)
    x = start = noise(3, 2, 4, 4)
    for t in scheduler.timesteps:
        times = t.expand(3)
        alpha, sigma = SCHEDULE.alpha(times), SCHEDULE.sigma(times)
        output = prediction_from_x_0(DATA.x_0(x, alpha, sigma), x, alpha, sigma, prediction_type=kind)
        x = scheduler.step(output, t, x).prev_sample
    points = (*timestep_grid(num_steps, spacing=spacing), FINAL_TIMESTEP)
    torch.testing.assert_close(solve(start, points), x, rtol=1e-3, atol=1e-3)


def test_rows_may_stand_at_different_timesteps() -> None:
    x_t, x_0 = noise(2, 4, 3, 2, 2)
    t, s = torch.tensor([999, 749, 500, 250]), torch.tensor([749, 500, 250, FINAL_TIMESTEP])
    together = ddim_step(x_t, x_0, t, s, schedule=SCHEDULE)
    for row in range(4):
        one = slice(row, row + 1)
        alone = ddim_step(x_t[one], x_0[one], t[one], s[one], schedule=SCHEDULE)
        assert torch.equal(together[one], alone)
    assert torch.equal(together[3], x_0[3])


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), data=st.data())
def test_x_0_of_transition_inverts_the_step(seed: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(20, 999), label="t")
    s = data.draw(st.sampled_from([FINAL_TIMESTEP, t // 2, t - 15]), label="s")
    x_t, x_0 = torch.randn(2, 1, 4, 3, 3, generator=torch.Generator().manual_seed(seed))
    times, nexts = torch.tensor([t]), torch.tensor([s])
    x_s = ddim_step(x_t, x_0, times, nexts, schedule=SCHEDULE)
    back = x_0_of_transition(x_t, x_s, times, nexts, schedule=SCHEDULE)
    torch.testing.assert_close(back, x_0, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 4, 64])
def test_the_target_of_a_transition_reaches_it_at_every_grid_point(num_steps: int, spacing: Spacing) -> None:
    grid = TrajectoryGrid.create(num_steps, num_steps, spacing=spacing)
    table = grid.teacher_table()
    x_t, x_s = noise(2, num_steps, 4, 2, 2)
    x_0 = x_0_of_transition(x_t, x_s, table[:, 0], table[:, -1], schedule=SCHEDULE)
    reached = ddim_step(x_t, x_0, table[:, 0], table[:, -1], schedule=SCHEDULE)
    torch.testing.assert_close(reached, x_s, rtol=1e-4, atol=1e-4)
    assert torch.equal(x_0[-1], x_s[-1])


def test_many_steps_converge_to_the_ode_of_gaussian_data_at_first_order() -> None:
    start, end = torch.tensor([999]), torch.tensor([FINAL_TIMESTEP])
    x = noise(1, 1, 16, 16)
    exact = DATA.x_s(x, SCHEDULE.alpha(start), SCHEDULE.sigma(start), SCHEDULE.alpha(end), SCHEDULE.sigma(end))
    errors = []
    for num_steps in (25, 50, 100, 200):
        points = (*timestep_grid(num_steps, spacing="trailing"), FINAL_TIMESTEP)
        errors.append(float((solve(x, points) - exact).abs().max()))
    orders = [math.log2(a / b) for a, b in itertools.pairwise(errors)]
    assert errors[-1] < 0.05
    assert all(0.75 < order < 1.25 for order in orders), (errors, orders)


def test_a_thresholded_x_0_keeps_progressive_targets_inside_the_support() -> None:
    # eps is recomputed from the clipped x_0, so the target of K substeps is a convex combination of clipped x_0s.
    limit = 0.5
    grid = TrajectoryGrid.create(4, 32, spacing="linspace")
    for row in grid.teacher:
        x = x_t = 3 * noise(8, 4, 4, 4, seed=row[0])
        for t, s in itertools.pairwise(row):
            times, nexts = torch.full((8,), t), torch.full((8,), s)
            x_0 = (2 * noise(8, 4, 4, 4, seed=t + 1)).clamp(-limit, limit)
            x = ddim_step(x, x_0, times, nexts, schedule=SCHEDULE)
        times, nexts = torch.full((8,), row[0]), torch.full((8,), row[-1])
        target = x_0_of_transition(x_t, x, times, nexts, schedule=SCHEDULE)
        assert target.abs().max() <= limit + 1e-4
