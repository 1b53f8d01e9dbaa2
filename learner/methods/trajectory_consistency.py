"""Trajectory consistency distillation: neighbours lead to the same state at any later time (Zheng et al. 2024, Eq. 17).

From x_t, t on the solver's grid, the teacher's one guided DDIM step leads to x_u, the label. For an s drawn uniformly
from the grid points at or below u, down to timestep 0,

    |f(x_t, t, s, w) - f'(x_u, u, s, w)|    with f(x_t, t, s) the DDIM step from t to s by the student's x_0,

f' as in `learner.methods.consistency`. Where u is the grid's end, x_u is x_0, and its state at s that of x_t's own
noise. With `segments` (Ren et al. 2024, Eq. 7) s stays within the segment that t is in, its end included.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ddil_dist.config import RunConfig
from ddil_dist.diffusion.consistency import multistep_indices
from ddil_dist.diffusion.ddim import ddim_step
from ddil_dist.methods import TrajectoryConsistency
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from ddil_dist.types import FINAL_TIMESTEP
from learner.methods.base import STUDENT, ObjectiveOutput
from learner.methods.consistency import ConsistencyObjective, pseudo_huber


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> TrajectoryConsistencyObjective:
    """Of the student on the solver's grid."""
    method = config.objective
    assert isinstance(method, TrajectoryConsistency)
    objective = TrajectoryConsistencyObjective(
        problem.student_denoiser(networks[STUDENT]), problem.grid, method, config.thresholding.threshold()
    )
    objective.segment_ends = segment_ends(method.segments, problem.grid.num_steps)
    return objective


def segment_ends(segments: int, num_points: int) -> Tensor:
    """[N] int64: the position at which the segment of each grid point ends; N is the grid's end."""
    starts = (*multistep_indices(segments, num_points), num_points)
    ends = [end for start, end in itertools.pairwise(starts) for _ in range(start, end)]
    return torch.tensor(ends)


class TrajectoryConsistencyObjective(ConsistencyObjective):
    """Its loss; the batch must carry the expert's labels, one solver step away."""

    segment_ends: Tensor

    def loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's, at states with the expert's answers."""
        assert batch.label is not None, "trajectory consistency distillation needs the expert's answers"
        schedule, device = self._student.schedule, batch.x_t.device
        table = self._table.to(device)
        t, u = table[batch.step_index, 0], table[batch.step_index, 1]
        s = self._later(batch.step_index)
        target = self._target_at_s(batch, batch.label, t, u, s)
        prediction = self._student.predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        x_s = ddim_step(batch.x_t, self._student.x_0(prediction, batch.x_t, t), t, s, schedule=schedule)
        per_sample = pseudo_huber(x_s - target, c=self._config.huber_c, whole=self._config.huber == "sample")
        return ObjectiveOutput(loss=per_sample.mean(), per_sample=per_sample.detach())

    def _later(self, step_index: Tensor) -> Tensor:
        """Timesteps s [B], each drawn from the positions after `step_index` [B] up to its segment's end."""
        ends = self.segment_ends.to(step_index.device)[step_index]
        drawn = torch.rand((len(step_index),)).to(step_index.device)
        position = step_index + 1 + (drawn * (ends - step_index)).long().clamp(max=ends - step_index - 1)
        points = torch.cat([self._table[:, 0], torch.zeros(1, dtype=torch.int64)]).to(step_index.device)
        return points[position]

    @torch.no_grad()
    def _target_at_s(self, batch: States[Tensor], x_u: Tensor, t: Tensor, u: Tensor, s: Tensor) -> Tensor:
        """f'(x_u, u, s, w) [B, C, H, W]."""
        schedule, last = self._student.schedule, u == FINAL_TIMESTEP
        asked = u.clamp(min=1)  # where there is no noise left, the answer is not used
        prediction = self._target.predict(x_u, asked, batch.conditioning, batch.guidance_scale)
        x_0 = self._threshold(self._target.x_0(prediction, x_u, asked))
        led = ddim_step(x_u, x_0, asked, s, schedule=schedule)
        at_end = ddim_step(batch.x_t, x_u, t, s, schedule=schedule)
        return torch.where(last.view(-1, 1, 1, 1), at_end, led)
