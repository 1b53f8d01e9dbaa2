"""The configured objective and the networks that it trains, by role."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from ddil_dist.config import ProgressiveConfig, RunConfig
from ddil_dist.errors import ConfigError
from ddil_dist.problem import ImitationProblem
from learner.objectives.base import STUDENT, Objective
from learner.objectives.progressive import ProgressiveObjective


def create_networks(config: RunConfig, problem: ImitationProblem) -> dict[str, nn.Module]:
    """The networks of every role before training, on the problem's device."""
    return {STUDENT: problem.new_student()}


def create_objective(config: RunConfig, problem: ImitationProblem, networks: Mapping[str, nn.Module]) -> Objective:
    """The objective over `networks` (of `create_networks`, prepared for training)."""
    student = problem.student_denoiser(networks[STUDENT])
    if isinstance(config.objective, ProgressiveConfig):
        return ProgressiveObjective(student, problem.grid, config.objective.weighting)
    raise ConfigError(f"objective.type: {config.objective.type!r} cannot be trained yet; choose 'progressive'")
