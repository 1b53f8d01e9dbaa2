"""Projecting a predicted x_0 onto the support of the data: none, static, dynamic, reflected.

Whoever thresholds recomputes eps from the result (`ddim_step` does), so that a transition stays consistent.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddil_dist.errors import ConfigError

Threshold = Callable[[Tensor], Tensor]
"""[B, C, H, W] -> [B, C, H, W], elementwise or per sample."""

Limit = float | tuple[float, ...] | Tensor
"""One limit, one a channel, or a tensor that broadcasts against [B, C, H, W]."""


def straight_through(x_0: Tensor, projection: Threshold) -> Tensor:
    """The projection of x_0 [B, C, H, W], with the gradient of x_0 itself: what lies outside still learns."""
    return x_0 + (projection(x_0) - x_0).detach()


def outside(x_0: Tensor, projection: Threshold) -> tuple[Tensor, Tensor]:
    """By sample, [B]: the mean squared distance of x_0 [B, C, H, W] from its projection, with the gradient that leads
    there; and the share of its elements that are moved by it."""
    distance = x_0 - projection(x_0).detach()
    return distance.square().flatten(1).mean(1), (distance.detach() != 0).float().flatten(1).mean(1)


def clamp(x_0: Tensor, *, limit: Limit) -> Tensor:
    """x_0 [B, C, H, W] clamped to [-limit, limit]."""
    limit = _limit_like(limit, x_0)
    return torch.maximum(torch.minimum(x_0, limit), -limit)


def reflect(x_0: Tensor, *, limit: Limit) -> Tensor:
    """Fold into [-limit, limit] as a billiard ball between two walls (Lou & Ermon 2023, section 3).

    On [0, 1]: m = x mod 2, then 2 - m where m > 1. Inside the walls it is the identity.
    """
    limit = _limit_like(limit, x_0)
    m = torch.remainder((x_0 / limit + 1) / 2, 2)
    folded = torch.where(m > 1, 2 - m, m)
    return torch.where(x_0.abs() <= limit, x_0, (2 * folded - 1) * limit)


def dynamic_threshold(x_0: Tensor, *, limit: float, quantile: float) -> Tensor:
    """Per sample: s = max(limit, quantile of |x_0|); clamp to [-s, s], times limit / s (Saharia et al. 2022)."""
    magnitudes = x_0.detach().abs().flatten(1).float()
    s = torch.quantile(magnitudes, quantile, dim=1).clamp(min=limit).to(x_0.dtype).view(-1, 1, 1, 1)
    return clamp(x_0, limit=s) * (limit / s)


def _limit_like(limit: Limit, x_0: Tensor) -> Tensor:
    if isinstance(limit, Tensor):
        return limit
    values = torch.tensor(limit, dtype=x_0.dtype, device=x_0.device)
    if values.ndim == 0:
        return values.expand(1, 1, 1, 1)
    if len(values) != x_0.shape[1]:
        raise ConfigError(
            f"thresholding.limit: {len(values)} limits for latents of {x_0.shape[1]} channels; "
            "give one, or one a channel"
        )
    return values.view(1, -1, 1, 1)
