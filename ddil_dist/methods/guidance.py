"""Guidance conditioning (Meng et al. 2023, stage one): one call of the student for the guided teacher's two."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ddil_dist.methods.base import Method, check_keeps_steps
from ddil_dist.methods.progressive import Weighting

if TYPE_CHECKING:
    from ddil_dist.config import RunConfig


class Guidance(Method):
    """Guidance conditioning: one call of the student against the guided teacher's two (Meng et al. 2023, stage one)."""

    title: ClassVar[str] = "conditioning on the guidance scale"
    # One teacher step a student step (K = 1) asks of the student just the guided teacher's x_0 at x_t.
    losses: ClassVar[str] = "learner.methods.progressive"

    type: Literal["guidance"] = Field("guidance", description="conditioning on the guidance scale")
    weighting: Weighting = Field("truncated_snr", description="of the loss by signal-to-noise ratio")

    def check(self, config: RunConfig) -> None:
        check_keeps_steps(config)
        if not config.student.embeds_guidance:
            raise ValueError(
                "student.guidance_embedding: 'guidance' teaches the student to obey the guidance scale, which this one "
                "is not told; set student.guidance_embedding=true, and student.lora=null"
            )
