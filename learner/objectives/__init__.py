"""Distillation objectives: what feedback the student is given at a state, one file each."""

from learner.objectives.base import STUDENT, Objective, ObjectiveOutput, Phase
from learner.objectives.factory import create_networks, create_objective
from learner.objectives.progressive import ProgressiveObjective

__all__ = [
    "STUDENT",
    "Objective",
    "ObjectiveOutput",
    "Phase",
    "ProgressiveObjective",
    "create_networks",
    "create_objective",
]
