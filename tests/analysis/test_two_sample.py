"""The maximum mean discrepancy against its closed form for Gaussians, and its test against its level."""

from __future__ import annotations

import math

import pytest
import torch

from ddil_dist.analysis.two_sample import median_bandwidth, permutation_test, squared_mmd


def test_it_is_the_closed_form_of_two_gaussians() -> None:
    dim, shift, h = 3, 1.2, 1.7
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1500, dim, generator=generator, dtype=torch.float64)
    y = torch.randn(1500, dim, generator=generator, dtype=torch.float64)
    y[:, 0] += shift
    same = (h**2 / (h**2 + 2)) ** (dim / 2)
    wanted = 2 * same * (1 - math.exp(-(shift**2) / (2 * (h**2 + 2))))
    assert squared_mmd(x, y, bandwidth=h) == pytest.approx(wanted, rel=0.1)


def test_it_is_the_sum_over_pairs() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(num, 2, generator=generator, dtype=torch.float64) for num in (5, 7))

    def kernel(a: torch.Tensor, b: torch.Tensor) -> float:
        return math.exp(-float((a - b).square().sum()) / (2 * 0.8**2))

    def within(rows: torch.Tensor) -> float:
        pairs = [kernel(a, b) for i, a in enumerate(rows) for j, b in enumerate(rows) if i != j]
        return sum(pairs) / len(pairs)

    across = sum(kernel(a, b) for a in x for b in y) / (len(x) * len(y))
    wanted = within(x) + within(y) - 2 * across
    assert squared_mmd(x, y, bandwidth=0.8) == pytest.approx(wanted, rel=1e-9)
    found, _ = permutation_test(x, y, bandwidth=0.8, seed=0, num=10)
    assert found == pytest.approx(wanted, rel=1e-9)


def test_it_rejects_the_same_distribution_as_often_as_its_level_and_a_shifted_one_always() -> None:
    generator = torch.Generator().manual_seed(2)
    rejected = 0
    for trial in range(100):
        x, y = torch.randn(2, 40, 4, generator=generator)
        rejected += permutation_test(x, y, bandwidth=median_bandwidth(x, y), seed=trial, num=99)[1] <= 0.1
    assert 3 <= rejected <= 20
    x, y = torch.randn(2, 60, 4, generator=generator)
    assert permutation_test(x, y + 1, bandwidth=median_bandwidth(x, y), seed=0)[1] == pytest.approx(1 / 501)
