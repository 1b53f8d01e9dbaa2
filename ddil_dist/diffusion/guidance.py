"""Classifier-free guidance (Ho & Salimans 2022), in one convention: w = 1 means none."""

from __future__ import annotations

import torch
from torch import Tensor


def guide(conditional: Tensor, unconditional: Tensor, guidance_scale: Tensor) -> Tensor:
    """unconditional + w (conditional - unconditional), on network outputs [B, C, H, W]; w: [B]."""
    return unconditional + guidance_scale.view(-1, 1, 1, 1) * (conditional - unconditional)


def guidance_embedding(guidance_scale: Tensor, dim: int) -> Tensor:
    """Sinusoids of 1000 (w - 1), [B, dim] float32 for w [B]: what diffusers' pipelines feed `time_cond_proj_dim`.

    Base 10000, sines before cosines (Meng et al. 2023; `get_guidance_scale_embedding` in diffusers).
    """
    half = dim // 2
    assert half * 2 == dim
    assert half > 1
    rates = torch.arange(half, dtype=torch.float32, device=guidance_scale.device)
    frequencies = torch.exp(rates * -(torch.log(torch.tensor(10000.0)) / (half - 1)).item())
    angles = 1000.0 * (guidance_scale.float() - 1).unsqueeze(1) * frequencies.unsqueeze(0)
    return torch.cat([angles.sin(), angles.cos()], dim=1)
