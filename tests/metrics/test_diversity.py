"""Density and coverage on configurations that can be counted by hand, and against a plain double loop."""

from __future__ import annotations

import pytest
import torch

from ddil_dist.errors import DataError
from ddil_dist.metrics import diversity
from ddil_dist.metrics.diversity import density_coverage


def by_double_loop(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[float, float]:
    num_inside, covered = 0, 0
    for i, x in enumerate(real):
        radius = sorted(float((x - other).norm()) for j, other in enumerate(real) if j != i)[k - 1]
        hits = sum(float((x - y).norm()) < radius for y in generated)
        num_inside += hits
        covered += hits > 0
    return num_inside / (k * len(generated)), covered / len(real)


def test_points_on_a_line_can_be_counted() -> None:
    # Balls to the nearest neighbour: 0 +- 1, 1 +- 1, 3 +- 2. 0.5 lies in the first two, 10 in none.
    real = torch.tensor([[0.0], [1.0], [3.0]])
    result = density_coverage(real, torch.tensor([[0.5], [10.0]]), k=1)
    assert result.density == 2 / (1 * 2)
    assert result.coverage == 2 / 3


def test_a_vector_on_the_surface_of_a_ball_is_outside() -> None:
    real = torch.tensor([[0.0], [1.0]])
    assert density_coverage(real, torch.tensor([[-1.0]]), k=1).density == 0


def test_agrees_with_the_definition_over_several_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diversity, "ROWS_AT_A_TIME", 7)
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(40, 3, generator=generator, dtype=torch.float64)
    generated = 1.5 * torch.randn(30, 3, generator=generator, dtype=torch.float64)
    result = density_coverage(real, generated, k=4)
    assert (result.density, result.coverage) == pytest.approx(by_double_loop(real, generated, 4))


def test_a_collapsed_policy_is_dense_and_covers_little() -> None:
    real = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    result = density_coverage(real, real[:1].repeat(50, 1))
    assert result.density > 0.8
    assert result.coverage < 0.2


def test_too_few_real_vectors_are_refused() -> None:
    with pytest.raises(DataError, match="more than 5 real"):
        density_coverage(torch.zeros(5, 2), torch.zeros(9, 2))
