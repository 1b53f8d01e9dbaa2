"""Latent consistency distillation (Luo et al. 2023): neighbours on the solver's grid give the same x_0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ddil_dist.errors import ConfigError
from ddil_dist.methods.base import GridPlan, Method
from ddil_dist.methods.rollouts import MultistepMode, Path, RolloutMode
from ddil_dist.section import Positive, PositiveFloat

if TYPE_CHECKING:
    import torch

    from ddil_dist.config import RunConfig
    from ddil_dist.diffusion.grid import TrajectoryGrid
    from ddil_dist.diffusion.parameterization import PredictionType
    from ddil_dist.diffusion.thresholding import Threshold
    from ddil_dist.models.denoiser import Denoiser
    from ddil_dist.models.scheduler import Sampler
    from ddil_dist.policy import StudentPolicy


class OnSolverGrid(Method):
    """What consistency and trajectory consistency share: the solver's grid, the target, the distance, rollouts."""

    runs_at_fewer_steps: ClassVar[bool] = True

    solver_steps: Annotated[int, Field(ge=2, le=500)] = Field(
        50, description="guided DDIM steps of the teacher's whole trajectory; 50 skip k = 20 training timesteps"
    )
    sampler_steps: Annotated[tuple[Positive, ...], Field(min_length=1)] = Field(
        (3, 4, 5), description="steps of a student rollout, drawn anew for each"
    )
    target: Literal["average", "online"] = Field(
        "average", description="network of the target: a moving average of the student, or itself (LCM-LoRA)"
    )
    target_decay: Annotated[float, Field(ge=0, lt=1)] = Field(0.95, description="of the average, an update")
    huber_c: PositiveFloat = Field(0.001, description="c of the pseudo-Huber loss sqrt(d^2 + c^2) - c")
    huber: Literal["element", "sample"] = Field(
        "element", description="d is a latent's element, or the distance of whole latents"
    )

    @model_validator(mode="after")
    def _on_the_grid(self) -> OnSolverGrid:
        if max(self.sampler_steps) > self.solver_steps:
            raise ValueError(
                f"sampler_steps: {max(self.sampler_steps)} exceeds solver_steps ({self.solver_steps}), the points that "
                "there are"
            )
        return self

    def check(self, config: RunConfig) -> None:
        if config.student.steps > self.solver_steps:
            raise ValueError(
                f"student.steps: {config.student.steps} exceeds objective.solver_steps ({self.solver_steps}), the "
                "points that the student can start a step from"
            )
        if config.student.timesteps is not None:
            raise ValueError(
                "student.timesteps: a consistency student stops at points of its solver's grid, spread by LCM's rule; "
                "set it to null, and choose by student.steps and objective.solver_steps"
            )
        if self.target == "average" and config.learner.sharding == "fsdp":
            raise ValueError(
                "learner.sharding: 'fsdp' cannot share the consistency target's moving average among workers; set "
                "learner.sharding=none, or objective.target=online"
            )
        if any(part.teacher > 0 for part in config.prior.parts):
            raise ValueError(
                f"prior.parts: '{self.type}' has no mixed rollouts, as the teacher was never trained for consistency; "
                "set every part's teacher share to 0, such as [{until: 1, forward: 0.5, student: 0.5, teacher: 0}]"
            )

    def check_timesteps(self, config: RunConfig, num_train_timesteps: int) -> None:
        if num_train_timesteps % self.solver_steps:
            divisors = (num for num in range(1, num_train_timesteps // 2 + 1) if num_train_timesteps % num == 0)
            nearest = min(divisors, key=lambda num: abs(num - self.solver_steps))
            raise ConfigError(
                f"objective.solver_steps: {self.solver_steps} does not divide {num_train_timesteps}, the timesteps "
                "that the teacher was trained on: stock schedulers skip whole ones, and would sample on another "
                f"grid; choose a divisor such as {nearest}"
            )

    def grid(self, config: RunConfig) -> GridPlan:
        """The solver's: that of diffusers' LCMScheduler, 999, 979, ..., 19."""
        return GridPlan(self.solver_steps, "trailing", 1)

    def rollout_paths(self, num_points: int) -> tuple[Path, ...]:
        from ddil_dist.diffusion.consistency import multistep_indices

        return tuple(multistep_indices(steps, num_points) for steps in self.sampler_steps)

    def rollout_mode(self, paths: tuple[Path, ...]) -> RolloutMode:
        return MultistepMode(paths)

    def stock_scheduler(
        self,
        teacher_scheduler_config: Mapping[str, Any],
        grid: Sequence[int],
        config: RunConfig,
        *,
        prediction_type: PredictionType,
        clip: float | None,
    ) -> Any:
        from ddil_dist.diffusion.consistency import multistep_indices
        from ddil_dist.models.scheduler import student_scheduler

        return student_scheduler(
            teacher_scheduler_config,
            sampler=self.sampler,
            timesteps=[grid[index] for index in multistep_indices(config.student.steps, len(grid))],
            prediction_type=prediction_type,
            solver_points=len(grid),
        )


class Consistency(OnSolverGrid):
    """Latent consistency distillation (Luo et al. 2023): neighbours on the solver's grid give the same x_0."""

    title: ClassVar[str] = "latent consistency distillation"
    losses: ClassVar[str] = "learner.methods.consistency"
    sampler: ClassVar[Sampler] = "consistency"

    type: Literal["consistency"] = Field("consistency", description="latent consistency distillation")

    def student_policy(
        self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device, projection: Threshold | None
    ) -> StudentPolicy:
        from ddil_dist.policy import ConsistencyStudentPolicy

        return ConsistencyStudentPolicy(denoiser, grid, device)
