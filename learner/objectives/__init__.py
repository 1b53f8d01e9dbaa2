"""Distillation objectives: what feedback the student is given at a state, one file each."""

from learner.objectives.base import STUDENT, Objective, ObjectiveOutput, Phase
from learner.objectives.consistency import ConsistencyObjective
from learner.objectives.distribution_matching import FAKE_SCORE, DistributionMatchingObjective
from learner.objectives.dmd import DmdObjective
from learner.objectives.factory import create_networks, create_objective
from learner.objectives.progressive import ProgressiveObjective
from learner.objectives.velocity import VelocityObjective

__all__ = [
    "FAKE_SCORE",
    "STUDENT",
    "ConsistencyObjective",
    "DistributionMatchingObjective",
    "DmdObjective",
    "Objective",
    "ObjectiveOutput",
    "Phase",
    "ProgressiveObjective",
    "VelocityObjective",
    "create_networks",
    "create_objective",
]
