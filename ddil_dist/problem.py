"""The imitation problem that a configuration poses: teacher, grid, policies, data. Actors, learner and evaluation
build it from the same lines, each on its own device."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import nn

from ddil_dist.config import NoThresholding, RunConfig
from ddil_dist.data.cache import LatentCache
from ddil_dist.data.forward import ForwardData
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.prompts import load_prompts
from ddil_dist.data.rows import CachedRows, Rows, ShuffledRows
from ddil_dist.data.windows import WindowedRows, Windows
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.parameterization import PredictionType
from ddil_dist.errors import ConfigError
from ddil_dist.methods import RolloutMode
from ddil_dist.models.conditioning import PromptEncoder
from ddil_dist.models.denoiser import Denoiser, embeds_guidance
from ddil_dist.models.initial import InitialStudent
from ddil_dist.models.lora import LoraNetwork
from ddil_dist.models.pipeline import TeacherPipeline, load_teacher
from ddil_dist.models.student import STUDENT, create_networks, fix_guidance
from ddil_dist.policy import StudentPolicy, TeacherPolicy


@dataclass
class ImitationProblem:
    """A loaded teacher and what follows from it and the configuration."""

    config: RunConfig
    device: torch.device
    teacher: TeacherPipeline
    grid: TrajectoryGrid
    encoder: PromptEncoder
    cache: LatentCache | None = None
    _data: ImageTextData | None = field(default=None, init=False)

    @classmethod
    def create(cls, config: RunConfig, device: torch.device) -> ImitationProblem:
        """Load the teacher. Raises ConfigError or DataError where the configuration cannot be posed."""
        teacher = load_teacher(config.teacher, device)
        config.objective.check_timesteps(config, teacher.schedule.num_timesteps)
        grid = _grid(config, teacher.schedule.num_timesteps)
        problem = cls(config, device, teacher, grid, teacher.prompt_encoder())
        if config.data.cache is not None:
            problem.encoder.known = problem.cache = LatentCache.open(config, teacher)
        problem.student_scheduler()  # a grid that no export could carry is refused before any work
        return problem

    def teacher_policy(self, grid: TrajectoryGrid | None = None, unet: nn.Module | None = None) -> TeacherPolicy:
        """The guided teacher, on the problem's grid or another; through its own network or a wrapper of it."""
        threshold = self.config.thresholding.threshold()
        guides = self.config.teacher.guidance.max > 1
        denoiser = self.teacher_denoiser(unet)
        return TeacherPolicy(denoiser, self.encoder.null(), threshold, grid or self.grid, guides=guides)

    def teacher_denoiser(self, unet: nn.Module | None = None) -> Denoiser:
        """Over the teacher's network, a wrapper of it, or one that began as it and predicts the same (a critic)."""
        network = self.teacher.unet if unet is None else unet
        return Denoiser(network, self.teacher.schedule, self.teacher.prediction_type)

    def new_student(self) -> nn.Module:
        """The student's network before training, on the problem's device."""
        return self.new_networks(STUDENT)[STUDENT]

    def new_networks(self, *roles: str) -> dict[str, nn.Module]:
        """A network for the student and for each critic, each equal to the teacher's; see `create_networks`.

        The student's is that of `student.initial` where one is given. Where training knows a single guidance scale they
        answer for it, whatever scale they are told.
        """
        networks = create_networks(self.teacher.unet, self.config.student, roles)
        if self._initial is not None and STUDENT in networks:
            self._initial.load_into(networks[STUDENT])
        scale = self.config.teacher.guidance.single
        for network in networks.values():
            if scale is not None and not isinstance(network, LoraNetwork) and embeds_guidance(network):
                fix_guidance(network, scale)
        return {role: network.to(self.device) for role, network in networks.items()}

    @property
    def student_prediction_type(self) -> PredictionType:
        """What the student predicts: as the network that it begins as, unless the method makes it another."""
        begins_as = self.teacher.prediction_type if self._initial is None else self._initial.prediction_type
        return self.config.objective.prediction_type(begins_as)

    @cached_property
    def _initial(self) -> InitialStudent | None:
        initial = self.config.student.initial
        return None if initial is None else InitialStudent.open(initial)

    def student_denoiser(self, unet: nn.Module) -> Denoiser:
        return Denoiser(unet, self.teacher.schedule, self.student_prediction_type)

    def teacher_grid(self, steps: int) -> TrajectoryGrid:
        """The teacher's own trajectory of `steps` single steps, for evaluation, on the problem's points where possible.

        So the many-step teacher takes the very steps that label, and the few-step one starts where the student does.
        """
        fine = [t for row in self.grid.teacher for t in row[:-1]]
        for points in (fine, self.grid.student):
            if len(points) == steps:
                return TrajectoryGrid.through(points, 1)
        return TrajectoryGrid.create(
            steps, steps, spacing=self.config.student.spacing, num_train_timesteps=self.teacher.schedule.num_timesteps
        )

    def student_scheduler(self) -> Any:
        """The stock scheduler that the exported student runs under; raises ConfigError where there is none."""
        return self.config.objective.stock_scheduler(
            self.teacher.pipeline.scheduler.config,
            self.grid.student,
            self.config,
            prediction_type=self.student_prediction_type,
            clip=self.exported_clip,
        )

    @property
    def exported_clip(self) -> float | None:
        """The limit that the exported pipeline clamps the student's x_0 to, as training does; None: it clamps nothing.

        Stock schedulers can follow a projection by one limit, and no other, of students that re-noise.
        """
        if not self.config.objective.projects_student or not self.teacher.keeps_clipping:
            return None
        return self.config.thresholding.stock_limit

    @property
    def export_lets_go(self) -> bool:
        """Whether training projects a student's x_0 where no stock pipeline will: only its penalty keeps it there."""
        projects = not isinstance(self.config.thresholding, NoThresholding)
        return projects and self.config.objective.projects_student and self.exported_clip is None

    def student_policy(self, unet: nn.Module, *, exported: bool = False) -> StudentPolicy:
        """The network as the objective's kind of policy.

        exported: as stock pipelines run it, which clamp x_0 to `exported_clip` at most.
        """
        method = self.config.objective
        projects = method.projects_student and (not exported or self.exported_clip is not None)
        projection = self.config.thresholding.projection() if projects else None
        return method.student_policy(self.student_denoiser(unet), self.grid, self.device, projection)

    def rollout_paths(self) -> tuple[tuple[int, ...], ...]:
        """Grid positions where rollouts stop, down to the first at or below `rollout.until_timestep`."""

        def until(path: tuple[int, ...]) -> tuple[int, ...]:
            above = [index for index in path if self.grid.student[index] > self.config.rollout.until_timestep]
            return path[: len(above) + 1]

        return tuple(until(path) for path in self.config.objective.rollout_paths(self.grid.num_steps))

    def rollout_mode(self) -> RolloutMode:
        """How the run's trajectories go down the student's grid."""
        return self.config.objective.rollout_mode(self.rollout_paths())

    @property
    def noise_share(self) -> float:
        """The share of rollouts' states that are pure noise, where they begin: no policy led there."""
        last = self.config.rollout.record == "last"
        recorded = [path[-1:] if last else path for path in self.rollout_paths()]
        return sum(0 in path for path in recorded) / sum(map(len, recorded))

    def open_data(self) -> ImageTextData:
        """The data, opened once: all who read it here share what is kept of it in memory. Of windows, the first."""
        if self.config.data.window is not None:
            return self._windows.first.data
        if self._data is None:
            self._data = ImageTextData.open(self.config.data, image_size=self.teacher.image_size)
        return self._data

    @cached_property
    def _windows(self) -> Windows:
        return Windows(self.config.data, image_size=self.teacher.image_size, seed=self.config.run.seed)

    def data_status(self) -> dict[str, Any] | None:
        """For heartbeats, see `data.skipped`: rows of the data, and those skipped here; None where nobody opened it."""
        if "_windows" in self.__dict__:
            return self._windows.status()
        if self._data is None:
            return None
        skipped = self._data.skipped if self.cache is None else self.cache.skipped
        return {"num_rows": len(self._data), "num_skipped": sum(skipped.values()), "skipped": skipped}

    def prompts(self) -> list[str]:
        """The prompts that rollouts start from."""
        data = None if self.config.data.prompts is not None else self.open_data()
        return load_prompts(self.config.data, data)

    def forward_data(self, *, seed: int) -> ForwardData:
        """The data's latents in an order of this seed."""
        return ForwardData(self._rows(seed), self.teacher, seed=seed)

    def _rows(self, seed: int) -> Rows:
        if self.config.data.window is not None:
            return WindowedRows(self._windows, self.teacher, seed=seed)
        data = self.open_data()
        return ShuffledRows(data, self.teacher, seed=seed) if self.cache is None else CachedRows(self.cache, seed=seed)


def _grid(config: RunConfig, num_train_timesteps: int) -> TrajectoryGrid:
    """Where states live: on the method's grid, or through the points that the configuration lists."""
    plan = config.grid
    if config.student.timesteps is None:
        return TrajectoryGrid.create(
            plan.points,
            plan.points * plan.substeps,
            spacing=plan.spacing,
            num_train_timesteps=num_train_timesteps,
        )
    if config.student.timesteps[0] >= num_train_timesteps:
        raise ConfigError(
            f"student.timesteps: begins at {config.student.timesteps[0]}, but the teacher was trained on "
            f"{num_train_timesteps} timesteps from 0; begin at {num_train_timesteps - 1} or less"
        )
    return TrajectoryGrid.through(config.student.timesteps, plan.substeps)


def default_device() -> torch.device:
    """The GPU that this process sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
