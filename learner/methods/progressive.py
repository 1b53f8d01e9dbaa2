"""Progressive distillation: one student step lands where K guided teacher steps do (Salimans & Ho 2022).

From x_t the expert reaches x_s. x~ is the x_0 for which one student DDIM step lands on x_s; the student's x^ is
trained towards it, weighted by one of

    truncated_snr   max(SNR_t, 1) |x^ - x~|^2       (Salimans & Ho 2022, section 4)
    snr_plus_one    |v^ - v~|^2 = (SNR_t + 1) |x^ - x~|^2
    snr             SNR_t |x^ - x~|^2
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ddil_dist.config import RunConfig
from ddil_dist.diffusion.ddim import x_0_of_transition
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.methods import Guidance, Progressive, Weighting
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods.base import STUDENT, ObjectiveOutput, StudentObjective


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> ProgressiveObjective:
    """Of progressive distillation, and of guidance conditioning, which is that of one teacher step (K = 1)."""
    method = config.objective
    assert isinstance(method, Progressive | Guidance)
    return ProgressiveObjective(problem.student_denoiser(networks[STUDENT]), problem.grid, method.weighting)


class ProgressiveObjective(StudentObjective):
    """The step-distillation loss of a student on its grid; the batch must carry the expert's labels."""

    def __init__(self, student: Denoiser, grid: TrajectoryGrid, weighting: Weighting) -> None:
        self._student = student
        self._weighting: Weighting = weighting
        self._table = grid.teacher_table()

    def loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's, at states with the expert's answers."""
        assert batch.label is not None, "progressive distillation needs the expert's answers"
        table = self._table.to(batch.x_t.device)
        t, s = table[batch.step_index, 0], table[batch.step_index, -1]
        schedule = self._student.schedule
        target = x_0_of_transition(batch.x_t, batch.label, t, s, schedule=schedule)
        prediction = self._student.predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        x_0 = self._student.x_0(prediction, batch.x_t, t)
        weight = snr_weight(schedule.snr(t), self._weighting)
        per_sample = (weight * (x_0 - target) ** 2).flatten(1).mean(1)
        return ObjectiveOutput(loss=per_sample.mean(), per_sample=per_sample.detach())


def snr_weight(snr: Tensor, weighting: Weighting) -> Tensor:
    """The weight of |x^ - x~|^2, elementwise in SNR = alpha^2 / sigma^2."""
    if weighting == "truncated_snr":
        return snr.clamp(min=1)
    return snr + 1 if weighting == "snr_plus_one" else snr
