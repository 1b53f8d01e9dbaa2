"""DMD (Yin et al. 2023): one step, distribution matching, and regression to the teacher's own samples.

On a grid of one step the expert's answer at pure noise is the teacher's sample from that noise, so a labelled state is
one of DMD's pairs. The generator's loss is the matching loss plus 0.25 |x - pair|^2; generator and critic move together
in every update. The original measures the pair's distance by LPIPS on decoded images; here it is that of the latents.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ddil_dist.config import RunConfig
from ddil_dist.diffusion.thresholding import Threshold, outside, straight_through
from ddil_dist.methods import FAKE_SCORE, Dmd
from ddil_dist.policy import StudentPolicy
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from learner.methods.base import STUDENT, ObjectiveOutput, Phase
from learner.methods.distribution_matching import Samples, ScoreDifference, create_roles

__all__ = ["DmdObjective", "create_objective", "create_roles"]


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int
) -> DmdObjective:
    """DMD's, of one step."""
    method = config.objective
    assert isinstance(method, Dmd)
    scores = ScoreDifference.create(method, config, problem, networks)
    projection = config.thresholding.projection()
    return DmdObjective(method, student=problem.student_policy(networks[STUDENT]), scores=scores, projection=projection)


class DmdObjective:
    """DMD's two phases; the batch must carry the expert's labels."""

    def __init__(self, config: Dmd, *, student: StudentPolicy, scores: ScoreDifference, projection: Threshold) -> None:
        assert student.grid.num_steps == 1, "DMD distils into one step"
        self._config = config
        self._student = student
        self._scores = scores
        self._projection = projection
        self._start = student.grid.student[0]
        self._samples = Samples()

    def phases(self, update: int) -> Sequence[Phase]:
        """Generator and critic, in every update."""
        self._samples.clear()
        return (Phase(STUDENT, self.generator_loss), Phase(FAKE_SCORE, self.critic_loss))

    def retry(self, update: int) -> None:
        """Forget the samples: they are of other micro-batches."""
        self._samples.clear()

    def after_update(self, update: int) -> None:
        """Nothing."""

    @property
    def state(self) -> Mapping[str, nn.Module]:
        """Nothing beside student and critic."""
        return {}

    def generator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's."""
        assert batch.label is not None, "DMD needs the teacher's samples"
        raw = self._generate(batch)
        x = straight_through(raw, self._projection)
        self._samples.keep(x)
        matching, gradient = self._scores.matching(x, batch)
        regression = (x - batch.label).square().flatten(1).mean(1)
        distance, share = outside(raw, self._projection)
        loss = matching + self._config.regression_weight * regression + self._config.outside_weight * distance
        metrics: dict[str, Tensor | float] = {
            "matching": matching.detach().mean(),
            "gradient": gradient.mean(),
            "regression": regression.detach().mean(),
            "outside": share.mean(),
        }
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def critic_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The critic's denoising loss at the student's samples."""
        x = self._samples.take(lambda: self._projection(self._generate(batch)))
        loss = self._scores.denoising(x, batch)
        metrics: dict[str, Tensor | float] = {"denoising": loss.detach().mean()}
        return ObjectiveOutput(loss=loss.mean(), per_sample=loss.detach(), metrics=metrics)

    def _generate(self, batch: States[Tensor]) -> Tensor:
        t = torch.full_like(batch.step_index, self._start)
        return self._student.estimate_x_0(batch.x_t, t, batch.conditioning, batch.guidance_scale)
