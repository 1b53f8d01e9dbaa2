"""Density and coverage of generated features among real ones (Naeem et al. 2020, Eq. 3 and 4).

Around every real vector lies a ball that reaches to its k-th nearest real neighbour. Density counts the balls that a
generated vector falls into (fidelity; may exceed 1, expected 1 where both sets are of one distribution), coverage the
share of balls that hold a generated vector (diversity; at most 1).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_dist.errors import DataError

ROWS_AT_A_TIME = 512
"""Real vectors whose distances are held in memory at once."""


@dataclass(frozen=True)
class DensityCoverage:
    """The pair of numbers."""

    density: float
    """At least 0; fidelity."""
    coverage: float
    """In [0, 1]; diversity."""


def density_coverage(real: Tensor, generated: Tensor, *, k: int = 5) -> DensityCoverage:
    """Density and coverage of `generated` [M, D] among `real` [N, D], with balls to the k-th real neighbour.

    Exact distances in float64. Raises DataError if there are no more than k real vectors or no generated one.
    """
    if len(real) <= k or len(generated) == 0:
        raise DataError(
            f"density and coverage with k = {k} need more than {k} real and at least one generated vector, "
            f"got {len(real)} and {len(generated)}"
        )
    real, generated = real.double(), generated.double()
    num_inside, num_covered = 0, 0
    for rows in torch.split(real, ROWS_AT_A_TIME):
        # The nearest real vector is the row itself, at distance 0: the k-th neighbour is the (k + 1)-th smallest.
        radii = _distances(rows, real).kthvalue(k + 1, dim=1, keepdim=True).values
        inside = _distances(rows, generated) < radii
        num_inside += int(inside.sum())
        num_covered += int(inside.any(dim=1).sum())
    return DensityCoverage(density=num_inside / (k * len(generated)), coverage=num_covered / len(real))


def _distances(a: Tensor, b: Tensor) -> Tensor:
    """[len(a), len(b)] Euclidean; not by the matrix-product formula, which gives a vector a distance to itself."""
    return torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
