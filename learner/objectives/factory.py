"""The configured objective and the networks that it trains, by role."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ddil_dist.config import (
    ConsistencyConfig,
    DistributionMatching,
    DistributionMatchingConfig,
    GuidanceConfig,
    ProgressiveConfig,
    RunConfig,
    VelocityConfig,
)
from ddil_dist.diffusion.thresholding import make_projection, make_threshold
from ddil_dist.problem import ImitationProblem
from learner.objectives.base import STUDENT, Objective
from learner.objectives.consistency import ConsistencyObjective
from learner.objectives.critic import Critic
from learner.objectives.distribution_matching import FAKE_SCORE, DistributionMatchingObjective, ScoreDifference
from learner.objectives.dmd import DmdObjective
from learner.objectives.progressive import ProgressiveObjective
from learner.objectives.real_data import RealData
from learner.objectives.velocity import VelocityObjective

REAL_DATA_SEED = 1_000_003
"""Apart from the seeds of the forward-diffused data's streams, which are a run's seed and a worker's rank."""


def create_networks(config: RunConfig, problem: ImitationProblem) -> dict[str, nn.Module]:
    """The networks of every role before training, on the problem's device."""
    networks = {STUDENT: problem.new_student()}
    if isinstance(config.objective, DistributionMatching):
        networks[FAKE_SCORE] = _create_critic(config.objective, problem)
    return networks


def create_objective(
    config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module], *, seed: int = 0
) -> Objective:
    """The objective over `networks` (of `create_networks`, prepared for training); seed: this worker's, of its data."""
    objective, grid = config.objective, problem.grid
    student = problem.student_denoiser(networks[STUDENT])
    threshold = make_threshold(config.thresholding)
    if isinstance(objective, ProgressiveConfig | GuidanceConfig):
        # One teacher step a student step (K = 1) asks of the student just the guided teacher's x_0 at x_t.
        return ProgressiveObjective(student, grid, objective.weighting)
    if isinstance(objective, VelocityConfig):
        return VelocityObjective(student, grid)
    if isinstance(objective, ConsistencyConfig):
        return ConsistencyObjective(student, grid, objective, threshold)
    policy, projection = problem.student_policy(networks[STUDENT]), make_projection(config.thresholding)
    critic = problem.teacher_denoiser(networks[FAKE_SCORE])
    scores = ScoreDifference(objective, teacher=problem.teacher_policy(), critic=critic, threshold=threshold)
    if not isinstance(objective, DistributionMatchingConfig):
        return DmdObjective(objective, student=policy, scores=scores, projection=projection)
    real = None
    if objective.gan is not None:
        rows = config.learner.worker_batch_size
        real = RealData(problem.forward_data(seed=seed + REAL_DATA_SEED), problem.encoder, rows=rows)
    return DistributionMatchingObjective(
        objective, student=policy, scores=scores, critic=critic, real=real, projection=projection
    )


def _create_critic(objective: DistributionMatching, problem: ImitationProblem) -> Critic:
    """The teacher's network, told the guidance scale as the student is, with a discriminator's head if there is one."""
    gan = objective.gan if isinstance(objective, DistributionMatchingConfig) else None
    frozen = problem.teacher.unet if gan is not None and gan.features == "teacher" else None
    unet = problem.new_networks(FAKE_SCORE)[FAKE_SCORE]
    return Critic(unet, discriminate=gan is not None, frozen=frozen, latent_side=problem.teacher.latent_shape[1]).to(
        problem.device
    )
