"""Velocity conversion (Salimans & Ho 2022): a student that says v of a teacher that says eps or v."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field

from ddil_dist.methods.base import Method, check_keeps_steps

if TYPE_CHECKING:
    from ddil_dist.config import RunConfig
    from ddil_dist.diffusion.parameterization import PredictionType


class Velocity(Method):
    """Velocity conversion: the student's v against the teacher's, on the teacher's own steps.

    With a range of guidance scales it conditions the student on guidance at the same time.
    """

    title: ClassVar[str] = "conversion to velocity prediction"
    losses: ClassVar[str] = "learner.methods.velocity"

    type: Literal["velocity"] = Field("velocity", description="conversion to v prediction")

    def check(self, config: RunConfig) -> None:
        check_keeps_steps(config)

    def prediction_type(self, initial: PredictionType) -> PredictionType:
        return "v_prediction"
