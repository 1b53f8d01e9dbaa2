"""What one update trains on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ddil_dist.models.conditioning import Conditioning


@dataclass(frozen=True, slots=True)
class TrainBatch:
    """B states with the expert's answers, whoever made either.

    x_t                [B, C, H, W] float32.
    step_index         [B] int64, position on the student grid.
    conditioning       B encoded prompts.
    guidance_scale     [B] float32.
    label              [B, C, H, W] float32, x_s at the student's next grid point; None if the objective needs none.
    source             [B] uint8, `StateSource`.
    policy_version     [B] int64, NO_POLICY where no student acted.
    staleness          [B] int64, student updates between the state's policy and the newest published; 0 for NO_POLICY.
    """

    x_t: Tensor
    step_index: Tensor
    conditioning: Conditioning
    guidance_scale: Tensor
    label: Tensor | None
    source: Tensor
    policy_version: Tensor
    staleness: Tensor

    def __len__(self) -> int:
        return len(self.x_t)

    def split(self, size: int) -> list[TrainBatch]:
        """Micro-batches of `size` rows; the last may have fewer."""
        if size >= len(self):
            return [self]
        indices = torch.arange(len(self), device=self.x_t.device).split(size)
        return [self._rows(index) for index in indices]

    def _rows(self, index: Tensor) -> TrainBatch:
        return TrainBatch(
            x_t=self.x_t[index],
            step_index=self.step_index[index],
            conditioning=self.conditioning.select(index),
            guidance_scale=self.guidance_scale[index],
            label=None if self.label is None else self.label[index],
            source=self.source[index.to(self.source.device)],
            policy_version=self.policy_version[index.to(self.policy_version.device)],
            staleness=self.staleness[index.to(self.staleness.device)],
        )
