"""Latent adversarial diffusion distillation (LADD, Sauer et al. 2024; ADD, Sauer et al. 2023).

The discriminator is heads on the frozen teacher's own features of latents that are noised again, so nothing has to be
decoded and no further network be had. Beside it stands ADD's distance to the teacher's x_0 of the student's noised
sample. ADD's other discriminator, on a DINOv2 of decoded images, is not offered.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ddil_dist.methods.adversarial import Adversarial
from ddil_dist.section import NonNegative, PositiveFloat


class Ladd(Adversarial):
    """Latent adversarial distillation (Sauer et al. 2024): a hinge loss by heads on the frozen teacher's features."""

    title: ClassVar[str] = "latent adversarial diffusion distillation"
    losses: ClassVar[str] = "learner.methods.ladd"

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
