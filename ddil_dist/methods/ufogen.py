"""UFOGen (Xu et al. 2023): a diffusion GAN whose discriminator began as the teacher's network."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ddil_dist.methods.adversarial import Adversarial
from ddil_dist.section import NonNegative

if TYPE_CHECKING:
    from ddil_dist.config import RunConfig


class Ufogen(Adversarial):
    """UFOGen (Xu et al. 2023): the student's x_0, noised to the next grid point, against data that is noised to it."""

    title: ClassVar[str] = "a diffusion GAN (UFOGen)"
    losses: ClassVar[str] = "learner.methods.ufogen"

    type: Literal["ufogen"] = Field("ufogen", description="a diffusion GAN (UFOGen)")
    reconstruction_weight: NonNegative = Field(
        1.0, description="of |x^ - x_0|^2, the distance of the student's x_0 to the data that its x_t was made of"
    )

    def check(self, config: RunConfig) -> None:
        super().check(config)
        if any(part.forward < 1 for part in config.prior.parts):
            raise ValueError(
                "prior.parts: 'ufogen' reconstructs the data that x_t was made of, so its states are forward-diffused "
                "ones alone; set prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
            )

    @property
    def makes_inputs(self) -> bool:
        return True
