"""The imitation problem that a configuration poses: teacher, grid, policies, data. Actors, learner and evaluation
build it from the same lines, each on its own device."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from ddil_dist.config import ConsistencyConfig, DistributionMatchingConfig, RunConfig
from ddil_dist.data.forward import ForwardData
from ddil_dist.data.image_text import ImageTextData
from ddil_dist.data.prompts import load_prompts
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.diffusion.thresholding import make_threshold
from ddil_dist.models.conditioning import PromptEncoder
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.models.pipeline import TeacherPipeline, load_teacher
from ddil_dist.models.student import create_student
from ddil_dist.policy import ConsistencyStudentPolicy, RenoisingStudentPolicy, StudentPolicy, TeacherPolicy


@dataclass
class ImitationProblem:
    """A loaded teacher and what follows from it and the configuration."""

    config: RunConfig
    device: torch.device
    teacher: TeacherPipeline
    grid: TrajectoryGrid
    encoder: PromptEncoder

    @classmethod
    def create(cls, config: RunConfig, device: torch.device) -> ImitationProblem:
        """Load the teacher. Raises ConfigError or DataError where the configuration cannot be posed."""
        teacher = load_teacher(config.teacher, device)
        grid = TrajectoryGrid.create(
            config.grid_steps,
            config.grid_steps * config.substeps,
            spacing=config.grid_spacing,
            num_train_timesteps=teacher.schedule.num_timesteps,
        )
        return cls(config, device, teacher, grid, teacher.prompt_encoder())

    def teacher_policy(self, grid: TrajectoryGrid | None = None, unet: nn.Module | None = None) -> TeacherPolicy:
        """The guided teacher, on the problem's grid or another; through its own network or a wrapper of it."""
        threshold = make_threshold(self.config.thresholding)
        denoiser = self.teacher.denoiser() if unet is None else self.student_denoiser(unet)
        return TeacherPolicy(denoiser, self.encoder.encode([""]), threshold, grid or self.grid)

    def new_student(self) -> nn.Module:
        """The student's network before training, on the problem's device."""
        return create_student(self.teacher.unet).to(self.device)

    def student_denoiser(self, unet: nn.Module) -> Denoiser:
        return Denoiser(unet, self.teacher.schedule, self.teacher.prediction_type)

    def student_policy(self, unet: nn.Module) -> StudentPolicy:
        """The network as the objective's kind of policy."""
        denoiser, objective = self.student_denoiser(unet), self.config.objective
        if isinstance(objective, ConsistencyConfig):
            return ConsistencyStudentPolicy(denoiser, self.grid, self.device)
        if isinstance(objective, DistributionMatchingConfig):
            threshold = make_threshold(self.config.thresholding)
            return RenoisingStudentPolicy(denoiser, self.grid, self.device, threshold)
        return StudentPolicy(denoiser, self.grid, self.device)

    def open_data(self) -> ImageTextData:
        return ImageTextData.open(self.config.data, image_size=self.teacher.image_size)

    def prompts(self) -> list[str]:
        """The prompts that rollouts start from."""
        data = None if self.config.data.prompts is not None else self.open_data()
        return load_prompts(self.config.data, data)

    def forward_data(self, *, seed: int) -> ForwardData:
        """The data's latents in an order of this seed."""
        return ForwardData(self.open_data(), self.teacher, seed=seed)


def default_device() -> torch.device:
    """The GPU that this process sees, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
