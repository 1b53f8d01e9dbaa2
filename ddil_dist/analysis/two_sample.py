"""A kernel two-sample test: the maximum mean discrepancy (Gretton et al. 2012), by a Gaussian kernel."""

from __future__ import annotations

import torch
from torch import Tensor

NUM_PERMUTATIONS = 500


def squared_mmd(x: Tensor, y: Tensor, *, bandwidth: float) -> float:
    """Unbiased estimate (Eq. 3) of the squared maximum mean discrepancy of the distributions of x [M, D] and y [N, D].

    bandwidth: h of k(a, b) = exp(-|a - b|^2 / (2 h^2)). It may be below 0. M, N >= 2.
    """
    kernel = _kernel(torch.cat([x, y]).double(), bandwidth)
    is_x = torch.zeros(len(kernel), dtype=torch.bool)
    is_x[: len(x)] = True
    return float(_of_labels(kernel, is_x[None].double()))


def median_bandwidth(x: Tensor, y: Tensor) -> float:
    """The median distance between two of the vectors of both: the usual choice, sensitive at their own scale."""
    return max(float(torch.pdist(torch.cat([x, y]).double()).median()), 1e-12)


def permutation_test(
    x: Tensor, y: Tensor, *, bandwidth: float, seed: int, num: int = NUM_PERMUTATIONS
) -> tuple[float, float]:
    """The squared discrepancy of x and y, and the share p, in (0, 1], of permuted labels with one as large."""
    kernel = _kernel(torch.cat([x, y]).double(), bandwidth)
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(num + 1, len(kernel), dtype=torch.float64)
    labels[0, : len(x)] = 1
    for row in labels[1:]:
        row[torch.randperm(len(kernel), generator=generator)[: len(x)]] = 1
    found = _of_labels(kernel, labels)
    return float(found[0]), float((1 + (found[1:] >= found[0]).sum()) / (num + 1))


def _kernel(rows: Tensor, bandwidth: float) -> Tensor:
    """[R, R] without its diagonal, which no unbiased estimate uses."""
    squared = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist").square()
    return torch.exp(-squared / (2 * bandwidth**2)).fill_diagonal_(0)


def _of_labels(kernel: Tensor, labels: Tensor) -> Tensor:
    """[L] squared discrepancies of the rows with label 1 from those with 0, by labels [L, R]."""
    others = 1 - labels
    m, n = labels.sum(1), others.sum(1)
    towards = labels @ kernel
    within_x, across = (towards * labels).sum(1), (towards * others).sum(1)
    within_y = ((others @ kernel) * others).sum(1)
    return within_x / (m * (m - 1)) + within_y / (n * (n - 1)) - 2 * across / (m * n)
