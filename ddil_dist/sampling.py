"""Whole trajectories for evaluation: from seeded noise to final latents, by teacher or student."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ddil_dist.models.conditioning import Conditioning
from ddil_dist.policy import StudentPolicy, TeacherPolicy


def seeded(seeds: Sequence[int]) -> list[torch.Generator]:
    """A CPU generator a trajectory: its starting noise is the first draw, each transition that needs noise the next.

    A stock pipeline that is given these generators draws the same.
    """
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def draw_noise(generators: Sequence[torch.Generator], latent_shape: Sequence[int], device: torch.device) -> Tensor:
    """[B, C, H, W] standard normal, each row the next draw of its own generator: the same in any batch."""
    return torch.stack([torch.randn(*latent_shape, generator=generator) for generator in generators]).to(device)


@torch.no_grad()
def sample_teacher(teacher: TeacherPolicy, noise: Tensor, conditioning: Conditioning, guidance_scale: Tensor) -> Tensor:
    """Final latents [B, C, H, W] of the teacher along every step of its grid."""
    return teacher_transition(teacher, noise, 0, teacher.grid.num_steps, conditioning, guidance_scale)


@torch.no_grad()
def teacher_transition(
    teacher: TeacherPolicy, x_t: Tensor, index: int, following: int, conditioning: Conditioning, guidance_scale: Tensor
) -> Tensor:
    """The teacher's latents [B, C, H, W] at grid position `following`, from x_t at position `index`.

    A position equal to the number of grid points is the end, without noise.
    """
    for position in range(index, following):
        x_t = teacher.solve(x_t, torch.full((len(x_t),), position, device=x_t.device), conditioning, guidance_scale)
    return x_t


@torch.no_grad()
def sample_student(
    student: StudentPolicy,
    noise: Tensor,
    conditioning: Conditioning,
    guidance_scale: Tensor,
    *,
    generators: Sequence[torch.Generator] = (),
    num_steps: int | None = None,
) -> Tensor:
    """Final latents [B, C, H, W] of the student's own sampler, from starting noise [B, C, H, W].

    generators: those that `noise` was drawn from, for a student whose transitions need more; num_steps: of a student
    that is free in it, None: its grid's.
    """
    path = student.path(num_steps)
    x, end = noise, student.grid.num_steps
    for index, following in itertools.pairwise((*path, end)):
        fresh = None
        if student.uses_noise:  # none is left at the end, and none is drawn there
            fresh = draw_noise(generators, x.shape[1:], x.device) if following < end else torch.zeros_like(x)
        x = student_transition(student, x, index, following, conditioning, guidance_scale, fresh)
    return x


@torch.no_grad()
def student_transition(
    student: StudentPolicy,
    x_t: Tensor,
    index: int,
    following: int,
    conditioning: Conditioning,
    guidance_scale: Tensor,
    noise: Tensor | None,
) -> Tensor:
    """The student's latents [B, C, H, W] at grid position `following`, from x_t at position `index` in one call."""
    return student.step(
        x_t,
        torch.full((len(x_t),), index, device=x_t.device),
        conditioning,
        guidance_scale,
        next_index=torch.full((len(x_t),), following, device=x_t.device),
        noise=noise,
    )
