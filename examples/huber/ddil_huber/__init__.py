"""Step distillation by a robust distance: what the launcher, the actors and the configuration know of it."""

from typing import ClassVar, Literal

from pydantic import Field

from ddil_dist.methods import Method
from ddil_dist.section import PositiveFloat


class Huber(Method):
    """Progressive distillation under the pseudo-Huber distance sqrt(d^2 + c^2) - c."""

    title: ClassVar[str] = "step distillation by the pseudo-Huber distance"
    losses: ClassVar[str] = "ddil_huber.losses"

    type: Literal["huber"] = Field("huber", description="step distillation by the pseudo-Huber distance")
    c: PositiveFloat = Field(0.03, description="below it the distance is a square, above it a magnitude")
