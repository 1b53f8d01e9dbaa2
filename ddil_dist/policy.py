"""Teacher and student as policies: who makes the next transition of a trajectory. The one code for rollouts and losses.

State: (prompt, t, x_t) at a position of the student grid; action: the next latent. The expert makes K guided DDIM
steps where the student makes one (`ddil_dist.diffusion.grid`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddil_dist.diffusion.ddim import ddim_step
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.guidance import guide
from ddil_dist.diffusion.thresholding import Threshold
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.denoiser import Denoiser


class TeacherPolicy:
    """The expert: classifier-free guidance, thresholding, K DDIM substeps to the student's next grid point."""

    def __init__(self, denoiser: Denoiser, null: Conditioning, threshold: Threshold, grid: TrajectoryGrid) -> None:
        self._denoiser = denoiser
        self._null = null
        self._threshold = threshold
        self.grid = grid
        self._table = grid.teacher_table().to(null.embeddings.device)

    @torch.no_grad()
    def predict_x_0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """Guided, thresholded x_0 [B, C, H, W]; both branches in one network call of 2 B rows. t, scale: [B]."""
        num = len(x_t)
        both = self._denoiser.predict(
            torch.cat([x_t, x_t]),
            torch.cat([t, t]),
            Conditioning.cat([self._null.expand(num), conditioning]),
        )
        unconditional, conditional = both.chunk(2)
        guided = guide(conditional, unconditional, guidance_scale)
        return self._threshold(self._denoiser.x_0(guided, x_t, t))

    @torch.no_grad()
    def substep(
        self, x: Tensor, step_index: Tensor, substep: Tensor, conditioning: Conditioning, guidance_scale: Tensor
    ) -> Tensor:
        """One teacher step, the `substep`-th [B] of the student's step `step_index` [B]."""
        t, s = self._table[step_index, substep], self._table[step_index, substep + 1]
        x_0 = self.predict_x_0(x, t, conditioning, guidance_scale)
        return ddim_step(x, x_0, t, s, schedule=self._denoiser.schedule)

    def solve(self, x_t: Tensor, step_index: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """The expert's answer at x_t [B, C, H, W] on the student grid: x_s at the next grid point, K steps away."""
        for k in range(self.grid.substeps):
            x_t = self.substep(x_t, step_index, torch.full_like(step_index, k), conditioning, guidance_scale)
        return x_t


class StudentPolicy:
    """The learner's policy: one network call, guidance embedded, one DDIM step."""

    def __init__(self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device) -> None:
        self._denoiser = denoiser
        self.grid = grid
        self._table = grid.teacher_table().to(device)

    def predict_x_0(self, x_t: Tensor, t: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """x_0 [B, C, H, W], never thresholded: stock pipelines do not."""
        prediction = self._denoiser.predict(x_t, t, conditioning, guidance_scale)
        return self._denoiser.x_0(prediction, x_t, t)

    def step(self, x_t: Tensor, step_index: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
        """x_s at the next grid point. x_t: [B, C, H, W]; step_index, scale: [B]."""
        t, s = self._table[step_index, 0], self._table[step_index, -1]
        x_0 = self.predict_x_0(x_t, t, conditioning, guidance_scale)
        return ddim_step(x_t, x_0, t, s, schedule=self._denoiser.schedule)
