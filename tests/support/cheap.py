"""A network that costs nothing, for tests of what happens around network calls."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class CheapUNet(nn.Module):
    """Row by row a smooth function of all that a U-Net is told: x_t, t, the prompt and (`guided`) the scale."""

    def __init__(self, *, guided: bool, bias: float = 0.0) -> None:
        super().__init__()
        self.config = {"time_cond_proj_dim": 8 if guided else None}
        self.gain = nn.Parameter(torch.tensor(0.8))
        self.bias = nn.Parameter(torch.tensor(bias))

    def forward(
        self, x: Tensor, t: Tensor, embeddings: Tensor, timestep_cond: Tensor | None, return_dict: bool
    ) -> tuple[Tensor]:
        prompt = embeddings[:, :4].sum((1, 2)).sin()
        scale = 0.0 if timestep_cond is None else timestep_cond.mean(1)
        told = self.bias + 0.3 * prompt + 0.2 * (t / 300).cos() + 0.2 * scale
        return (self.gain * x + told.view(-1, 1, 1, 1) * (1 + 0.3 * x.sin()),)
