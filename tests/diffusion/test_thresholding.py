"""Projections of x_0: folding against a triangle wave, dynamic thresholding against diffusers'."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
import torch
from diffusers import DDIMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from ddil_dist.config import DynamicThresholding, NoThresholding, ReflectThresholding, StaticThresholding
from ddil_dist.errors import ConfigError


def x_0_like(*shape: int, scale: float = 3.0) -> torch.Tensor:
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def triangle_wave(x: npt.NDArray[np.float64], limit: float) -> npt.NDArray[np.float64]:
    """2 c / pi arcsin(sin(pi x / 2 c)): slope 1 through the origin, turning at every odd multiple of c."""
    return 2 * limit / np.pi * np.arcsin(np.sin(np.pi * x / (2 * limit)))


def test_none_changes_nothing() -> None:
    x_0 = x_0_like(2, 4, 3, 3)
    assert torch.equal(NoThresholding().threshold()(x_0), x_0)


def test_static_clamps_every_channel_to_its_own_limit() -> None:
    x_0 = x_0_like(5, 3, 4, 4)
    clamped = StaticThresholding(limit=(0.5, 1.0, 2.0)).threshold()(x_0)
    for channel, limit in enumerate((0.5, 1.0, 2.0)):
        np.testing.assert_array_equal(clamped[:, channel].numpy(), np.clip(x_0[:, channel].numpy(), -limit, limit))


def test_one_limit_serves_all_channels() -> None:
    x_0 = x_0_like(2, 4, 3, 3)
    assert torch.equal(StaticThresholding(limit=0.7).threshold()(x_0), x_0.clamp(-0.7, 0.7))


@settings(max_examples=60, deadline=None)
@given(x=st.floats(-50, 50), limit=st.floats(0.25, 5))
def test_reflection_is_a_triangle_wave(x: float, limit: float) -> None:
    folded = ReflectThresholding(limit=limit).threshold()(torch.tensor(x, dtype=torch.float64).view(1, 1, 1, 1))
    assert folded.item() == pytest.approx(float(triangle_wave(np.array(x), limit)), abs=1e-6)


def test_reflection_folds_every_channel_at_its_own_walls() -> None:
    x_0 = x_0_like(4, 2, 5, 5)
    folded = ReflectThresholding(limit=(0.8, 1.7)).threshold()(x_0)
    for channel, limit in enumerate((0.8, 1.7)):
        wave = triangle_wave(x_0[:, channel].double().numpy(), limit)
        np.testing.assert_allclose(folded[:, channel].numpy(), wave, atol=2e-6)
        assert folded[:, channel].abs().max() <= limit


def test_reflection_is_the_identity_inside_to_the_last_bit() -> None:
    x_0 = x_0_like(4, 3, 8, 8).clamp(-0.9, 0.9)
    assert torch.equal(ReflectThresholding(limit=0.9).threshold()(x_0), x_0)


@pytest.mark.parametrize("quantile", [0.5, 0.9, 0.995, 1.0])
def test_dynamic_is_that_of_diffusers(quantile: float) -> None:
    scheduler = DDIMScheduler(thresholding=True, dynamic_thresholding_ratio=quantile, sample_max_value=1e9)
    x_0 = x_0_like(6, 4, 5, 5) * torch.tensor([0.05, 0.3, 1.0, 2.0, 5.0, 20.0]).view(-1, 1, 1, 1)
    theirs = scheduler._threshold_sample(x_0)
    ours = DynamicThresholding(limit=1.0, quantile=quantile).threshold()(x_0)
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[0], x_0[0]), "a sample inside the limit stays as it is"


def test_dynamic_scales_with_its_limit() -> None:
    x_0 = x_0_like(3, 4, 5, 5)
    unit = DynamicThresholding(limit=1.0).threshold()(x_0)
    torch.testing.assert_close(DynamicThresholding(limit=4.0).threshold()(4 * x_0), 4 * unit)
    assert unit.abs().max() <= 1


@pytest.mark.parametrize("config", [StaticThresholding(limit=(1.0, 2.0)), ReflectThresholding(limit=(1.0, 2.0))])
def test_limits_for_another_number_of_channels_name_both(config: StaticThresholding | ReflectThresholding) -> None:
    with pytest.raises(ConfigError, match=r"thresholding\.limit: 2 limits for latents of 4 channels"):
        config.threshold()(torch.zeros(1, 4, 2, 2))
