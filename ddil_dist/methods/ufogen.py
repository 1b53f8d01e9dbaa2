"""UFOGen (Xu et al. 2023): a diffusion GAN whose discriminator began as the teacher's network."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ddil_dist.methods.base import Method, check_whole_substeps
from ddil_dist.methods.ladd import DISCRIMINATOR, check_no_labels
from ddil_dist.section import NonNegative

if TYPE_CHECKING:
    import torch

    from ddil_dist.config import RunConfig
    from ddil_dist.diffusion.grid import TrajectoryGrid
    from ddil_dist.diffusion.thresholding import Threshold
    from ddil_dist.models.denoiser import Denoiser
    from ddil_dist.models.scheduler import Sampler
    from ddil_dist.policy import StudentPolicy


class Ufogen(Method):
    """UFOGen (Xu et al. 2023): the student's x_0, noised to the next grid point, against data that is noised to it."""

    title: ClassVar[str] = "a diffusion GAN (UFOGen)"
    losses: ClassVar[str] = "learner.methods.ufogen"
    sampler: ClassVar[Sampler] = "renoising"
    uses_labels: ClassVar[bool] = False

    type: Literal["ufogen"] = Field("ufogen", description="a diffusion GAN (UFOGen)")
    reconstruction_weight: NonNegative = Field(
        1.0, description="of |x^ - x_0|^2, the distance of the student's x_0 to the data that its x_t was made of"
    )

    def check(self, config: RunConfig) -> None:
        check_whole_substeps(config)
        check_no_labels(config)
        if any(part.forward < 1 for part in config.prior.parts):
            raise ValueError(
                "prior.parts: 'ufogen' reconstructs the data that x_t was made of, so its states are forward-diffused "
                "ones alone; set prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
            )

    @property
    def roles(self) -> tuple[str, ...]:
        return (DISCRIMINATOR,)

    @property
    def uses_images(self) -> bool:
        return True

    @property
    def makes_inputs(self) -> bool:
        return True

    def student_policy(
        self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device, projection: Threshold | None
    ) -> StudentPolicy:
        from ddil_dist.policy import RenoisingStudentPolicy

        return RenoisingStudentPolicy(denoiser, grid, device, projection)
