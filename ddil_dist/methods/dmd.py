"""DMD (Yin et al. 2023): one step, distribution matching, and regression to the teacher's own samples."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, model_validator

from ddil_dist.methods.distribution_matching import DistributionMatching
from ddil_dist.section import NonNegative

if TYPE_CHECKING:
    from ddil_dist.config import RunConfig


class Dmd(DistributionMatching):
    """DMD (Yin et al. 2023): one step, the same gradient, and regression to the teacher's own samples."""

    title: ClassVar[str] = "distribution matching distillation (DMD)"
    losses: ClassVar[str] = "learner.methods.dmd"

    type: Literal["dmd"] = Field("dmd", description="DMD: one step")
    regression_weight: NonNegative = Field(0.25, description="of |x - teacher's sample from the same noise|^2")

    @model_validator(mode="after")
    def _critic_learns(self) -> Dmd:
        if self.critic == "alternating":
            raise ValueError("critic: 'alternating' would never train it, as DMD's generator learns in every update")
        return self

    def check(self, config: RunConfig) -> None:
        if config.student.steps != 1:
            raise ValueError(
                f"student.steps: 'dmd' distils into one step, not {config.student.steps}; set student.steps=1, or "
                "objective.type=distribution_matching for more"
            )
