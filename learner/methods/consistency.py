"""Latent consistency distillation: neighbours on one trajectory have one x_0 (Luo et al. 2023, Algorithm 1).

From x_t, t on the solver's grid, the teacher's one guided DDIM step leads to x_s, k training timesteps below: the
label. The student's f(x_t, t, w) is trained towards f'(x_s, s, w), where f' is

    average   a moving average of the student's weights, decay 0.95;
    online    the student itself, without gradient (LCM-LoRA, Luo et al. 2023b),

by the pseudo-Huber loss sqrt(d^2 + c^2) - c, c = 0.001. At the grid's end x_s has no noise left, and f'(x_s) = x_s by
the boundary condition. Reflected diffusion projects the x_0 of f' before the boundary condition mixes it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddil_dist.config import RunConfig
from ddil_dist.diffusion.consistency import BoundaryCondition
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.thresholding import Threshold
from ddil_dist.methods import Consistency, OnSolverGrid
from ddil_dist.models.denoiser import Denoiser, unwrapped
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods.base import STUDENT, ObjectiveOutput, StudentObjective

TARGET = "target"


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> ConsistencyObjective:
    """Of the student on the solver's grid."""
    method = config.objective
    assert isinstance(method, Consistency)
    student = problem.student_denoiser(networks[STUDENT])
    return ConsistencyObjective(student, problem.grid, method, config.thresholding.threshold())


class ConsistencyObjective(StudentObjective):
    """The consistency loss; the batch must carry the expert's labels, one solver step away.

    student: over the trained network, perhaps wrapped for data parallelism; an averaged target begins as its copy.
    """

    def __init__(
        self,
        student: Denoiser,
        grid: TrajectoryGrid,
        config: OnSolverGrid,
        threshold: Threshold,
        *,
        boundary: BoundaryCondition | None = None,
    ) -> None:
        assert grid.substeps == 1, "the expert's answer must be one solver step away"
        self._student = student
        self._config = config
        self._threshold = threshold
        self._boundary = boundary or BoundaryCondition()
        self._table = grid.teacher_table()
        self._network = unwrapped(student.unet)
        self._average: nn.Module | None = None
        self._target = student
        if config.target == "average":
            self._average = copy.deepcopy(self._network).requires_grad_(False)
            self._target = Denoiser(self._average, student.schedule, student.prediction_type)

    @torch.no_grad()
    def after_update(self, update: int) -> None:
        """Move the averaged target by 1 - decay of the way to the student."""
        if self._average is not None:
            for average, weight in zip(self._average.parameters(), self._network.parameters(), strict=True):
                average.lerp_(weight.detach(), 1 - self._config.target_decay)

    @property
    def state(self) -> Mapping[str, nn.Module]:
        """The averaged target, where there is one."""
        return {} if self._average is None else {TARGET: self._average}

    def loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's, at states with the expert's answers."""
        assert batch.label is not None, "consistency distillation needs the expert's answers"
        table = self._table.to(batch.x_t.device)
        t, s = table[batch.step_index, 0], table[batch.step_index, 1]
        target = self._target_at(batch, batch.label, s)
        prediction = self._student.predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        x_0 = self._boundary.consistent(batch.x_t, self._student.x_0(prediction, batch.x_t, t), t)
        per_sample = pseudo_huber(x_0 - target, c=self._config.huber_c, whole=self._config.huber == "sample")
        return ObjectiveOutput(loss=per_sample.mean(), per_sample=per_sample.detach())

    @torch.no_grad()
    def _target_at(self, batch: States[Tensor], x_s: Tensor, s: Tensor) -> Tensor:
        """f'(x_s, s, w) [B, C, H, W]; x_s itself at FINAL_TIMESTEP, where the network is asked about timestep 0."""
        prediction = self._target.predict(x_s, s.clamp(min=0), batch.conditioning, batch.guidance_scale)
        return self._boundary.consistent(x_s, self._threshold(self._target.x_0(prediction, x_s, s)), s)


def pseudo_huber(difference: Tensor, *, c: float, whole: bool) -> Tensor:
    """sqrt(d^2 + c^2) - c by sample, [B]: the mean over elements, or of the whole difference [B, C, H, W]'s norm."""
    if whole:
        return (difference.flatten(1).square().sum(1) + c**2).sqrt() - c
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(1)
