"""Trajectory consistency distillation (TCD, Zheng et al. 2024; CTM, Kim et al. 2023), and Hyper-SD's segments of it.

f(x_t, t, s) leads from any t on the solver's grid to any s below it: the DDIM step of the student's own x_0. Neighbours
are trained to agree on where they lead. In `segments` (Ren et al. 2024) s is kept within the segment of the grid that t
is in; a curriculum of 8, 4, 2 and 1 of them is Hyper-SD's, without its adversarial loss and human feedback.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from ddil_dist.methods.consistency import OnSolverGrid
from ddil_dist.section import Positive, Probability

if TYPE_CHECKING:
    import torch

    from ddil_dist.diffusion.grid import TrajectoryGrid
    from ddil_dist.diffusion.thresholding import Threshold
    from ddil_dist.models.denoiser import Denoiser
    from ddil_dist.models.scheduler import Sampler
    from ddil_dist.policy import StudentPolicy


class TrajectoryConsistency(OnSolverGrid):
    """Trajectory consistency distillation (Zheng et al. 2024): neighbours lead to the same state at any later time."""

    title: ClassVar[str] = "trajectory consistency distillation"
    losses: ClassVar[str] = "learner.methods.trajectory_consistency"
    sampler: ClassVar[Sampler] = "trajectory"

    type: Literal["trajectory_consistency"] = Field(
        "trajectory_consistency", description="trajectory consistency distillation (TCD)"
    )
    gamma: Probability = Field(
        0.3,
        description="of the sampler: each step goes on to (1 - gamma) of its next timestep, and is noised back to it; "
        "0: DDIM on the student's own x_0. Stock pipelines are told it as `eta`",
    )
    segments: Positive = Field(
        1, description="parts of the grid, as even as can be, within which consistency is asked for; 1: all of it"
    )

    @model_validator(mode="after")
    def _segments_hold_points(self) -> TrajectoryConsistency:
        if self.segments > self.solver_steps:
            raise ValueError(
                f"segments: {self.segments} of them, for solver_steps = {self.solver_steps} points; choose fewer"
            )
        return self

    @property
    def stock_arguments(self) -> dict[str, float]:
        return {"eta": self.gamma}

    def student_policy(
        self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device, projection: Threshold | None
    ) -> StudentPolicy:
        from ddil_dist.policy import TrajectoryStudentPolicy

        return TrajectoryStudentPolicy(denoiser, grid, device, gamma=self.gamma)
