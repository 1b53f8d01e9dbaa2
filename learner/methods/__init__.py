"""The learner's side of every method, by the names of `ddil_dist.methods`: its networks and its losses, a file each."""

from learner.methods.base import STUDENT, Losses, Objective, ObjectiveOutput, Phase, StudentObjective
from learner.methods.factory import create_networks, create_objective

__all__ = [
    "STUDENT",
    "Losses",
    "Objective",
    "ObjectiveOutput",
    "Phase",
    "StudentObjective",
    "create_networks",
    "create_objective",
]
