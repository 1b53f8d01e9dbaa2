"""Frechet distance against closed forms and torchmetrics; running statistics against numpy's covariance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torchmetrics.image.fid import FrechetInceptionDistance

from ddil_dist.errors import DataError
from ddil_dist.metrics.fid import GaussianStatistics, RunningGaussian, frechet_distance


def gaussian(mean: list[float], covariance: torch.Tensor) -> GaussianStatistics:
    return GaussianStatistics(torch.tensor(mean, dtype=torch.float64), covariance.double(), 100)


def test_commuting_covariances_have_a_closed_form() -> None:
    # Diagonal: |mu_a - mu_b|^2 + sum (sigma_a - sigma_b)^2.
    a = gaussian([1.0, 2.0, 3.0], torch.diag(torch.tensor([4.0, 9.0, 1.0])))
    b = gaussian([0.0, 4.0, 3.0], torch.diag(torch.tensor([1.0, 25.0, 1.0])))
    assert frechet_distance(a, b) == pytest.approx(1 + 4 + (2 - 1) ** 2 + (3 - 5) ** 2, abs=1e-12)


def test_two_dimensional_covariances_have_a_closed_form() -> None:
    # For 2 x 2 matrices tr(M^(1/2)) = sqrt(tr M + 2 sqrt(det M)); these two do not commute.
    cov_a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    cov_b = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    product = cov_a @ cov_b
    trace_root = torch.sqrt(product.trace() + 2 * torch.sqrt(torch.linalg.det(product)))
    wanted = 0.25 + float(cov_a.trace() + cov_b.trace() - 2 * trace_root)
    got = frechet_distance(gaussian([0.5, 0.0], cov_a), gaussian([0.0, 0.0], cov_b))
    assert got == pytest.approx(wanted, rel=1e-12)


def test_agrees_with_torchmetrics_on_samples() -> None:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(300, 16, generator=generator, dtype=torch.float64)
    fake = (
        0.7
        * torch.randn(200, 16, generator=generator, dtype=torch.float64)
        @ torch.diag(torch.linspace(1, 2, 16).double())
        + 0.3
    )
    network = torch.nn.Identity()
    network.num_features = 16  # type: ignore[assignment]
    theirs = FrechetInceptionDistance(feature=network, normalize=True)
    theirs.update(real, real=True)
    theirs.update(fake, real=False)
    got = frechet_distance(GaussianStatistics.of(real), GaussianStatistics.of(fake))
    assert got == pytest.approx(float(theirs.compute()), rel=1e-9)


def test_a_set_is_at_no_distance_from_itself_even_where_its_covariance_is_singular() -> None:
    features = torch.randn(5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    statistics = GaussianStatistics.of(features)
    assert frechet_distance(statistics, statistics) == pytest.approx(0, abs=1e-6)


def test_batches_accumulate_to_the_statistics_of_the_whole_set() -> None:
    # A mean of 1e6 beside a spread of 1 would cost sums of squares nine digits.
    features = 1e6 + torch.randn(101, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    running = RunningGaussian()
    for batch in (features[:1], features[1:40], features[40:40], features[40:]):
        running.update(batch)
    statistics = running.statistics()
    assert statistics.count == 101
    np.testing.assert_allclose(statistics.mean.numpy(), features.numpy().mean(axis=0), rtol=1e-14)
    np.testing.assert_allclose(statistics.covariance.numpy(), np.cov(features.numpy().T), rtol=1e-9, atol=1e-12)


def test_one_vector_has_no_covariance() -> None:
    with pytest.raises(DataError, match="at least 2 feature vectors, got 1"):
        GaussianStatistics.of(torch.zeros(1, 3))


def test_a_feature_that_is_not_finite_is_refused() -> None:
    with pytest.raises(DataError, match="not finite"):
        RunningGaussian().update(torch.tensor([[0.0, float("nan")]]))
