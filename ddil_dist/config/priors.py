"""Where training latents come from: shares of states by who made them, over a run."""

from __future__ import annotations

import itertools
import math
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddil_dist.section import Probability, Section


class PriorPart(Section):
    """Sampling prior of a part of the run: the shares of states by who made them. They sum to 1."""

    until: Annotated[float, Field(gt=0, le=1)] = Field(description="share of the run's updates at which the part ends")
    forward: Probability = Field(description="share of forward-diffused data")
    student: Probability = Field(description="share of states that a student's transition made")
    teacher: Probability = Field(description="share of states that a teacher's transition made")

    @model_validator(mode="after")
    def _sums_to_one(self) -> PriorPart:
        total = self.forward + self.student + self.teacher
        if abs(total - 1) > 1e-6:
            raise ValueError(
                f"forward + student + teacher = {self.forward:g} + {self.student:g} + {self.teacher:g} = {total:g}; "
                "they are shares of one whole and must sum to 1"
            )
        return self

    @property
    def student_probability(self) -> float:
        """Of a transition in a rollout being the student's; the teacher makes the rest."""
        rollouts = self.student + self.teacher
        return self.student / rollouts if rollouts > 0 else 0.0


class PriorConfig(Section):
    """Where training latents come from, over the run: the paper's two parts by default.

    The shares hold at every grid point that a policy can lead to. At the first there is only noise: rollouts' share of
    it, student's and teacher's together, is pure noise, and the forward share is data diffused to that point.

    step: each part's shares hold throughout it. linear, cosine: the first part's hold throughout it; from its end the
    shares move, in a straight line or in half a cosine, to reach each further part's own where that part ends.
    """

    parts: tuple[PriorPart, ...] = Field(
        (
            PriorPart(until=0.6, forward=0.5, student=0.1, teacher=0.4),
            PriorPart(until=1.0, forward=0.5, student=0.4, teacher=0.1),
        ),
        description="shares of states by who made them, over the run",
    )
    schedule: Literal["step", "linear", "cosine"] = Field("step", description="how the shares go from part to part")

    @model_validator(mode="after")
    def _covers_the_run(self) -> PriorConfig:
        ends = [part.until for part in self.parts]
        if not ends or ends[-1] != 1.0 or any(a >= b for a, b in itertools.pairwise(ends)):
            raise ValueError(f"'until' of the parts is {ends}; it must rise strictly and end at 1.0")
        return self

    @property
    def uses_forward(self) -> bool:
        """Whether any part wants forward-diffused states, which need data."""
        return any(part.forward > 0 for part in self.parts)

    def at(self, progress: float) -> PriorPart:
        """The shares that hold at `progress` in [0, 1] of the run."""
        index = next((i for i, part in enumerate(self.parts) if progress < part.until), len(self.parts) - 1)
        part = self.parts[index]
        if self.schedule == "step" or index == 0:
            return part
        before = self.parts[index - 1]
        way = min(1.0, (progress - before.until) / (part.until - before.until))
        if self.schedule == "cosine":
            way = (1 - math.cos(math.pi * way)) / 2
        return PriorPart(
            until=part.until,
            forward=_between(before.forward, part.forward, way),
            student=_between(before.student, part.student, way),
            teacher=_between(before.teacher, part.teacher, way),
        )


def _between(start: float, end: float, way: float) -> float:
    return start + way * (end - start)
