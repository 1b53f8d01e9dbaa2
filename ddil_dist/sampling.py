"""Whole trajectories for evaluation: from seeded noise to final latents, by teacher or student."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddil_dist.models.conditioning import Conditioning
from ddil_dist.policy import StudentPolicy, TeacherPolicy


def starting_noise(seeds: Sequence[int], latent_shape: tuple[int, int, int], device: torch.device) -> Tensor:
    """[B, C, H, W] standard normal, each row from its own seed, so that it is the same in any batch."""
    rows = [torch.randn(latent_shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows).to(device)


@torch.no_grad()
def sample_teacher(teacher: TeacherPolicy, noise: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
    """Final latents [B, C, H, W] of the teacher along every step of its grid."""
    x = noise
    for index in range(teacher.grid.num_steps):
        x = teacher.solve(x, torch.full((len(x),), index, device=x.device), conditioning, guidance_scale)
    return x


@torch.no_grad()
def sample_student(student: StudentPolicy, noise: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
    """Final latents [B, C, H, W] of the student along its grid."""
    x = noise
    for index in range(student.grid.num_steps):
        x = student.step(x, torch.full((len(x),), index, device=x.device), conditioning, guidance_scale)
    return x
