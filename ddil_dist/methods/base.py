"""What a method of distillation is to everybody else: a section of the configuration that answers for itself.

The launcher asks it for its rules, the problem for its grid, policy and scheduler, rollouts for their mode, the learner
for its networks and losses. Nobody asks which method it is. Importing a method imports no torch: what needs it is
imported by the answer that needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from ddil_dist.errors import ConfigError
from ddil_dist.methods.rollouts import MixedMode, Path, RolloutMode
from ddil_dist.section import Section

if TYPE_CHECKING:
    import torch

    from ddil_dist.config import RunConfig
    from ddil_dist.config.student import Spacing
    from ddil_dist.diffusion.grid import TrajectoryGrid
    from ddil_dist.diffusion.parameterization import PredictionType
    from ddil_dist.diffusion.thresholding import Threshold
    from ddil_dist.models.denoiser import Denoiser
    from ddil_dist.models.scheduler import Sampler
    from ddil_dist.policy import StudentPolicy

ENTRY_POINTS = "ddil_dist.methods"
"""The group under which another package names its methods."""


@dataclass(frozen=True)
class GridPlan:
    """The grid that training states live on: its points, how they are spread, and K, teacher steps between two."""

    points: int
    spacing: Spacing
    substeps: int


class Method(Section):
    """A method: the section `objective` of the configuration, under its `type`.

    A subclass sets `type` to its own name, as a `Literal` with that default, `title`, `losses`, and whatever it answers
    in another way than step distillation does, which these defaults are.
    """

    title: ClassVar[str]
    """What it is called in a sentence, such as "progressive distillation"."""
    losses: ClassVar[str]
    """The module of its networks and losses, which the learner imports: see `learner.methods.base.Losses`."""
    sampler: ClassVar[Sampler] = "deterministic"
    """How its student makes a transition."""
    uses_labels: ClassVar[bool] = True
    """Whether its losses need the expert's answer at a state."""
    projects_student: ClassVar[bool] = False
    """Whether thresholding holds the student's own x_0 as well, and the exported pipeline should."""
    runs_at_fewer_steps: ClassVar[bool] = False
    """Whether a finished student may be sampled in fewer steps than it was trained for."""

    type: str

    def check(self, config: RunConfig) -> None:
        """Its rules between sections. Raises ValueError: the key, the value, the rule, the remedy."""
        check_whole_substeps(config)

    def check_timesteps(self, config: RunConfig, num_train_timesteps: int) -> None:
        """Its rules about the timesteps that the teacher was trained on. Raises ConfigError as `check` says."""
        check_trailing_steps(config, num_train_timesteps)

    @property
    def roles(self) -> tuple[str, ...]:
        """The networks that it trains besides the student, each as large as the teacher's."""
        return ()

    @property
    def uses_images(self) -> bool:
        """Whether its losses need captioned images of their own, whatever the prior draws."""
        return False

    @property
    def makes_inputs(self) -> bool:
        """Whether it makes all x_t by itself, and needs of the prior but captions and grid positions."""
        return False

    @property
    def stock_arguments(self) -> dict[str, float]:
        """What a stock pipeline must be called with besides steps and guidance, to sample as the policy does."""
        return {}

    def grid(self, config: RunConfig) -> GridPlan:
        """Where its training states live: here the student's own steps."""
        steps = config.student.steps
        return GridPlan(steps, config.student.spacing, config.teacher.steps // steps)

    def prediction_type(self, initial: PredictionType) -> PredictionType:
        """What its student predicts, where the network that it begins as predicts `initial`."""
        return initial

    def student_policy(
        self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device, projection: Threshold | None
    ) -> StudentPolicy:
        """The student's network as a policy of its `sampler`; projection: of its x_0, of methods that project it."""
        from ddil_dist.policy import RenoisingStudentPolicy, StudentPolicy

        if self.sampler == "renoising":
            return RenoisingStudentPolicy(denoiser, grid, device, projection)
        return StudentPolicy(denoiser, grid, device)

    def rollout_paths(self, num_points: int) -> tuple[Path, ...]:
        """The grid positions where a rollout may stop, one path a way of going down the whole grid."""
        return (tuple(range(num_points)),)

    def rollout_mode(self, paths: tuple[Path, ...]) -> RolloutMode:
        """How rollouts go down `paths`, which are its own, perhaps cut short: here teacher and student take turns."""
        return MixedMode(paths[0][-1])

    def stock_scheduler(
        self,
        teacher_scheduler_config: Mapping[str, Any],
        grid: Sequence[int],
        config: RunConfig,
        *,
        prediction_type: PredictionType,
        clip: float | None,
    ) -> Any:
        """The diffusers scheduler that the exported student runs under. Raises ConfigError where there is none.

        grid: the timesteps of the grid's points. clip: what the student's x_0 is clamped to; None: it is not.
        """
        from ddil_dist.models.scheduler import student_scheduler

        return student_scheduler(
            teacher_scheduler_config,
            sampler=self.sampler,
            timesteps=grid,
            prediction_type=prediction_type,
            clip=clip,
        )


def check_trailing_steps(config: RunConfig, num_train_timesteps: int) -> None:
    """diffusers' trailing grids have as many points as they are asked for."""
    steps, total = config.student.steps, num_train_timesteps
    trailing = config.student.timesteps is None and config.student.spacing == "trailing"
    if trailing and steps != math.ceil(total / (total / steps)):
        raise ConfigError(
            f"student.steps: {steps} of {total} timesteps are a step too many under the trailing spacing of diffusers' "
            "schedulers; choose another number, or student.spacing=linspace"
        )


def check_whole_substeps(config: RunConfig) -> None:
    """One student step equals a whole number of teacher steps."""
    teacher, student = config.teacher.steps, config.student.steps
    if teacher % student:
        raise ValueError(
            f"teacher.steps: {teacher} is not a multiple of student.steps ({student}); one student step equals a whole "
            f"number of teacher steps: choose {student * max(1, round(teacher / student))}"
        )


def check_keeps_steps(config: RunConfig) -> None:
    """The student keeps the teacher's steps."""
    if config.student.steps != config.teacher.steps:
        raise ValueError(
            f"student.steps: {config.student.steps} is not teacher.steps ({config.teacher.steps}); "
            f"'{config.objective.type}' keeps the teacher's steps: set student.steps={config.teacher.steps}, and "
            "distil the result into fewer afterwards"
        )


def check_no_labels(config: RunConfig) -> None:
    """There is nothing that actors could insert with a state."""
    if config.rollout.labels == "actors":
        raise ValueError(
            f"rollout.labels: '{config.objective.type}' has no labels that actors could make: it judges the student's "
            "newest samples, at the learner; set rollout.labels=learner"
        )
