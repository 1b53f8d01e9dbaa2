"""Conversions between eps, v and x_0: round trips, and diffusers' own."""

from __future__ import annotations

import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_dist.diffusion.parameterization import (
    PredictionType,
    eps_from_x_0,
    prediction_from_x_0,
    v_from_x_0,
    x_0_from_prediction,
)
from tests.diffusion.support import STABLE_DIFFUSION, stable_diffusion_schedule

PREDICTION_TYPES: tuple[PredictionType, ...] = ("epsilon", "v_prediction", "sample")
SCHEDULE = stable_diffusion_schedule()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), t=st.integers(0, 999), kind=st.sampled_from(PREDICTION_TYPES))
def test_prediction_and_x_0_invert_each_other(seed: int, t: int, kind: PredictionType) -> None:
    x_0, noise = torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    times = torch.tensor([t])
    alpha, sigma = SCHEDULE.alpha(times), SCHEDULE.sigma(times)
    x_t = SCHEDULE.add_noise(x_0, noise, times)
    prediction = prediction_from_x_0(x_0, x_t, alpha, sigma, prediction_type=kind)
    expected = {"epsilon": noise, "v_prediction": alpha * noise - sigma * x_0, "sample": x_0}[kind]
    torch.testing.assert_close(prediction, expected, rtol=1e-3, atol=2e-4)
    back = x_0_from_prediction(prediction, x_t, alpha, sigma, prediction_type=kind)
    torch.testing.assert_close(back, x_0, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), t=st.integers(0, 999))
def test_eps_and_v_of_one_x_0_obey_the_definition_of_v(seed: int, t: int) -> None:
    x_0, x_t = torch.randn(2, 1, 2, 3, 3, generator=torch.Generator().manual_seed(seed))
    times = torch.tensor([t])
    alpha, sigma = SCHEDULE.alpha(times).double(), SCHEDULE.sigma(times).double()
    x_0, x_t = x_0.double(), x_t.double()
    eps, v = eps_from_x_0(x_0, x_t, alpha, sigma), v_from_x_0(x_0, x_t, alpha, sigma)
    # The float32 tables keep alpha^2 + sigma^2 = 1 to 1e-7, which v's definition divides by sigma (0.03 at t = 0).
    torch.testing.assert_close(v, alpha * eps - sigma * x_0, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(alpha * x_0 + sigma * eps, x_t, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(sigma * x_t + alpha * v, eps, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", PREDICTION_TYPES)
@pytest.mark.parametrize("t", [1, 250, 749, 999])
def test_x_0_is_pred_original_sample_of_diffusers(kind: PredictionType, t: int) -> None:
    scheduler = DDIMScheduler(**STABLE_DIFFUSION, prediction_type=kind, clip_sample=False)
    scheduler.set_timesteps(1000)
    prediction, x_t = torch.randn(2, 3, 4, 4, 4, generator=torch.Generator().manual_seed(t))
    theirs = scheduler.step(prediction, t, x_t).pred_original_sample
    times = torch.full((3,), t)
    ours = x_0_from_prediction(prediction, x_t, SCHEDULE.alpha(times), SCHEDULE.sigma(times), prediction_type=kind)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
