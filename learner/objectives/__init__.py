"""Distillation objectives: what feedback the student is given at a state, one file each."""

from learner.objectives.base import Objective, ObjectiveOutput
from learner.objectives.progressive import ProgressiveObjective

__all__ = ["Objective", "ObjectiveOutput", "ProgressiveObjective"]
