"""Latent adversarial diffusion distillation (LADD, Sauer et al. 2024; ADD, Sauer et al. 2023).

The discriminator is heads on the frozen teacher's own features of latents that are noised again, so nothing has to be
decoded and no further network be had. Beside it stands ADD's distance to the teacher's x_0 of the student's noised
sample. ADD's other discriminator, on a DINOv2 of decoded images, is not offered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, Literal

from pydantic import Field

from ddil_dist.methods.base import Method, check_whole_substeps
from ddil_dist.section import NonNegative, PositiveFloat

if TYPE_CHECKING:
    import torch

    from ddil_dist.config import RunConfig
    from ddil_dist.diffusion.grid import TrajectoryGrid
    from ddil_dist.diffusion.thresholding import Threshold
    from ddil_dist.models.denoiser import Denoiser
    from ddil_dist.models.scheduler import Sampler
    from ddil_dist.policy import StudentPolicy

DISCRIMINATOR: Final = "discriminator"
"""The role of a network that tells the student's samples from data."""


def check_no_labels(config: RunConfig) -> None:
    """Of methods that learn from no answers of the expert: there is nothing that actors could insert with a state."""
    if config.rollout.labels == "actors":
        raise ValueError(
            f"rollout.labels: '{config.objective.type}' has no labels that actors could make: it judges the student's "
            "newest samples, at the learner; set rollout.labels=learner"
        )


class Ladd(Method):
    """Latent adversarial distillation (Sauer et al. 2024): a hinge loss by heads on the frozen teacher's features."""

    title: ClassVar[str] = "latent adversarial diffusion distillation"
    losses: ClassVar[str] = "learner.methods.ladd"
    sampler: ClassVar[Sampler] = "renoising"
    uses_labels: ClassVar[bool] = False

    type: Literal["ladd"] = Field("ladd", description="latent adversarial distillation (LADD)")
    distillation_weight: NonNegative = Field(
        2.5, description="of the distance to the teacher's x_0 of the student's sample, noised again (ADD); 0: none"
    )
    distillation_scale: Literal["alpha", "score_distillation"] = Field(
        "alpha", description="c(t) of that distance: alpha_t, or alpha_t sigma_t, as score distillation has it"
    )
    r1_weight: NonNegative = Field(
        1e-5, description="of the squared gradient of a head's answers to data by the features that it reads"
    )
    noise_mean: float = Field(
        1.0, description="of the logit of t / T to which latents are noised for the discriminator, a normal deviate"
    )
    noise_std: PositiveFloat = Field(1.0, description="its deviation")

    def check(self, config: RunConfig) -> None:
        check_whole_substeps(config)
        check_no_labels(config)

    @property
    def roles(self) -> tuple[str, ...]:
        return (DISCRIMINATOR,)

    @property
    def uses_images(self) -> bool:
        return True

    def student_policy(
        self, denoiser: Denoiser, grid: TrajectoryGrid, device: torch.device, projection: Threshold | None
    ) -> StudentPolicy:
        from ddil_dist.policy import RenoisingStudentPolicy

        return RenoisingStudentPolicy(denoiser, grid, device, projection)
