"""Velocity conversion: a student that says v learns what its teacher, saying eps or v, would say (Salimans & Ho 2022).

Converting eps to v by algebra divides by alpha_T, which amplifies the network's error at the noisiest step (15 times
for Stable Diffusion); so the conversion is trained. On a grid of single teacher steps (K = 1) the expert's answer at
x_t implies its guided, thresholded x_T at x_t itself, and with it eps_T and

    v_T = alpha_t eps_T - sigma_t x_T,    loss |v^ - v_T|^2.

Where the batch's guidance scales differ, the student learns velocity and guidance at once.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from ddil_dist.config import RunConfig
from ddil_dist.diffusion.ddim import x_0_of_transition
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.parameterization import v_from_x_0
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods.base import STUDENT, ObjectiveOutput, StudentObjective


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> VelocityObjective:
    """Of the student on the teacher's own steps."""
    return VelocityObjective(problem.student_denoiser(networks[STUDENT]), problem.grid)


class VelocityObjective(StudentObjective):
    """The conversion's loss; the batch must carry the expert's labels, one teacher step away."""

    def __init__(self, student: Denoiser, grid: TrajectoryGrid) -> None:
        assert grid.substeps == 1, "velocity conversion keeps the teacher's steps"
        self._student = student
        self._table = grid.teacher_table()

    def loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's, at states with the expert's answers."""
        assert batch.label is not None, "velocity conversion needs the expert's answers"
        table = self._table.to(batch.x_t.device)
        t, s = table[batch.step_index, 0], table[batch.step_index, 1]
        schedule = self._student.schedule
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        target = v_from_x_0(x_0_of_transition(batch.x_t, batch.label, t, s, schedule=schedule), batch.x_t, alpha, sigma)
        prediction = self._student.predict(batch.x_t, t, batch.conditioning, batch.guidance_scale)
        if self._student.prediction_type != "v_prediction":
            prediction = v_from_x_0(self._student.x_0(prediction, batch.x_t, t), batch.x_t, alpha, sigma)
        per_sample = ((prediction - target) ** 2).flatten(1).mean(1)
        return ObjectiveOutput(loss=per_sample.mean(), per_sample=per_sample.detach())
