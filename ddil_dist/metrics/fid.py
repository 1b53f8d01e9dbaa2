"""Frechet distance between two Gaussians fitted to features (FID, Heusel et al. 2017), in float64.

Both sides are `GaussianStatistics` with the unbiased covariance (divisor n - 1), so a reference that was stored and
one that is computed now mean the same. The estimate is biased upwards by about D / n: compare only equal counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_dist.errors import DataError


@dataclass(frozen=True)
class GaussianStatistics:
    """Mean and covariance of a set of feature vectors."""

    mean: Tensor
    """[D] float64."""
    covariance: Tensor
    """[D, D] float64, divisor count - 1."""
    count: int
    """Number of vectors, at least 2."""

    @classmethod
    def of(cls, features: Tensor) -> GaussianStatistics:
        """Statistics of `features` [N, D], N >= 2; raises DataError where there are fewer or a value is not finite."""
        running = RunningGaussian()
        running.update(features)
        return running.statistics()


class RunningGaussian:
    """Accumulates `GaussianStatistics` batch by batch, for sets that do not fit in memory.

    Keeps the mean and the sum of squared deviations from it and merges batches by Chan et al. (1979), which loses
    nothing where the mean is large against the spread.

        running = RunningGaussian()
        for batch in batches:
            running.update(network(batch))
        reference = running.statistics()
    """

    def __init__(self) -> None:
        self._count = 0
        self._mean = torch.zeros(0, dtype=torch.float64)
        self._scatter = torch.zeros(0, 0, dtype=torch.float64)

    def update(self, features: Tensor) -> None:
        """Add `features` [B, D]; raises DataError if one is not finite."""
        batch = features.detach().cpu().double()
        if not torch.isfinite(batch).all():
            raise DataError("a feature is not finite (NaN or infinity); the images or the feature network are broken")
        num = len(batch)
        if num == 0:
            return
        mean = batch.mean(dim=0)
        scatter = (batch - mean).T @ (batch - mean)
        if self._count == 0:
            self._count, self._mean, self._scatter = num, mean, scatter
            return
        total = self._count + num
        shift = mean - self._mean
        self._scatter += scatter + torch.outer(shift, shift) * (self._count * num / total)
        self._mean += shift * (num / total)
        self._count = total

    def statistics(self) -> GaussianStatistics:
        """Of everything so far; raises DataError under two vectors."""
        if self._count < 2:
            raise DataError(f"a covariance needs at least 2 feature vectors, got {self._count}; evaluate more images")
        return GaussianStatistics(self._mean.clone(), self._scatter / (self._count - 1), self._count)


def frechet_distance(a: GaussianStatistics, b: GaussianStatistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)) (Dowson & Landau 1982, Eq. 4), at least 0.

    The root's trace is taken as that of (S_a^(1/2) S_b S_a^(1/2))^(1/2): the same eigenvalues, but of a symmetric
    matrix, so that they are real and a singular covariance (fewer images than features) does no harm.
    """
    assert a.mean.shape == b.mean.shape, f"features of {len(a.mean)} and {len(b.mean)} dimensions have no distance"
    root_a = _symmetric_root(a.covariance)
    product = root_a @ b.covariance @ root_a
    trace_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace_root
    return max(0.0, float(distance))


def _symmetric_root(matrix: Tensor) -> Tensor:
    """Principal square root of a symmetric matrix, its negative eigenvalues (rounding) taken as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    return root
