"""The student's path with the teacher beside it: either may make each of its transitions."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ddil_dist.models.conditioning import Conditioning
from ddil_dist.policy import StudentPolicy, TeacherPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.sampling import draw_noise, seeded, student_transition, teacher_transition


@dataclass(frozen=True)
class Batch:
    """Trajectories to be: their prompts and all the noise that they may need.

    noise: [B, C, H, W], where they start.
    fresh: one [B, C, H, W] for each transition but the last, of students whose transitions need noise; else none.
    """

    conditioning: Conditioning
    guidance_scale: Tensor
    noise: Tensor
    fresh: Sequence[Tensor]


@dataclass(frozen=True)
class SharedPath:
    """The grid positions where the student calls its network, and both policies' transitions between them."""

    problem: ImitationProblem
    teacher: TeacherPolicy
    student: StudentPolicy
    stops: tuple[int, ...]
    """Positions on the problem's grid; the last is the number of grid points: the end, without noise."""

    @classmethod
    def create(cls, problem: ImitationProblem, unet: nn.Module) -> SharedPath:
        """unet: the student's network. It runs as the exported pipeline runs it."""
        student = problem.student_policy(unet.eval(), exported=True)
        stops = (*student.path(problem.config.student.steps), problem.grid.num_steps)
        return cls(problem, problem.teacher_policy(), student, stops)

    @property
    def num_steps(self) -> int:
        return len(self.stops) - 1

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Where the student calls its network, descending."""
        return tuple(self.problem.grid.student[index] for index in self.stops[:-1])

    def batch(self, prompts: Sequence[str], *, seed: int) -> Batch:
        """Trajectories of these prompts; the noise of row i follows from `seed + i` alone."""
        problem = self.problem
        generators = seeded(range(seed, seed + len(prompts)))
        shape, device = problem.teacher.latent_shape, problem.device
        noise = draw_noise(generators, shape, device)
        num_fresh = self.num_steps - 1 if self.student.uses_noise else 0
        fresh = [draw_noise(generators, shape, device) for _ in range(num_fresh)]
        scale = torch.full((len(prompts),), problem.config.evaluation_guidance_scale, device=device)
        return Batch(problem.encoder.encode(prompts), scale, noise, fresh)

    def teacher_step(self, x_t: Tensor, step: int, batch: Batch, *, to: int | None = None) -> Tensor:
        """The teacher's latents after the path's `step`-th transition, or, with `to`, after the one before `to`."""
        end = self.stops[step + 1 if to is None else to]
        return teacher_transition(self.teacher, x_t, self.stops[step], end, batch.conditioning, batch.guidance_scale)

    def student_step(self, x_t: Tensor, step: int, batch: Batch) -> Tensor:
        """The student's latents after the path's `step`-th transition."""
        noise = None
        if self.student.uses_noise:
            noise = batch.fresh[step] if step < len(batch.fresh) else torch.zeros_like(x_t)
        index, following = self.stops[step], self.stops[step + 1]
        return student_transition(self.student, x_t, index, following, batch.conditioning, batch.guidance_scale, noise)

    def shared(self, batch: Batch, by_teacher: Tensor) -> Tensor:
        """Final latents [B, C, H, W] where the teacher makes the transitions of `by_teacher` [B, steps], bool."""
        x = batch.noise
        for step in range(self.num_steps):
            mine = by_teacher[:, step].to(x.device)
            following = torch.empty_like(x)
            for rows, move in ((mine, self.teacher_step), (~mine, self.student_step)):
                index = rows.nonzero().flatten()
                if len(index):
                    following[index] = move(x[index], step, _rows(batch, index))
            x = following
        return x


def _rows(batch: Batch, index: Tensor) -> Batch:
    return Batch(
        batch.conditioning.select(index),
        batch.guidance_scale[index],
        batch.noise[index],
        [noise[index] for noise in batch.fresh],
    )


def batches(num: int, size: int) -> Iterator[tuple[int, int]]:
    """Beginning and end of every batch of at most `size` of `num` rows."""
    return itertools.pairwise((*range(0, num, size), num))
