"""Methods of distillation, a file each: what the rest of the system has to know of them. Imports no torch.

Their networks and losses are the learner's, under the same names, in `learner.methods`. A method of another package is
a subclass of `Method` under the entry point `ddil_dist.methods`; `examples/` has one.
"""

from ddil_dist.methods.adversarial import DISCRIMINATOR
from ddil_dist.methods.base import ENTRY_POINTS, GridPlan, Method
from ddil_dist.methods.consistency import Consistency, OnSolverGrid
from ddil_dist.methods.distribution_matching import FAKE_SCORE, DistributionMatching, Dmd2, Gan
from ddil_dist.methods.dmd import Dmd
from ddil_dist.methods.guidance import Guidance
from ddil_dist.methods.ladd import Ladd
from ddil_dist.methods.progressive import Progressive, Weighting
from ddil_dist.methods.registry import METHODS, REFUSED
from ddil_dist.methods.rollouts import MixedMode, MultistepMode, RolloutMode
from ddil_dist.methods.trajectory_consistency import TrajectoryConsistency
from ddil_dist.methods.ufogen import Ufogen
from ddil_dist.methods.velocity import Velocity

__all__ = [
    "DISCRIMINATOR",
    "ENTRY_POINTS",
    "FAKE_SCORE",
    "METHODS",
    "REFUSED",
    "Consistency",
    "DistributionMatching",
    "Dmd",
    "Dmd2",
    "Gan",
    "GridPlan",
    "Guidance",
    "Ladd",
    "Method",
    "MixedMode",
    "MultistepMode",
    "OnSolverGrid",
    "Progressive",
    "RolloutMode",
    "TrajectoryConsistency",
    "Ufogen",
    "Velocity",
    "Weighting",
]
