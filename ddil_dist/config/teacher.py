"""The expert, and the guidance that it is asked under."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ddil_dist.config.data import BUILTIN
from ddil_dist.section import Precision, Section


class GuidanceRange(Section):
    """Guidance scales w of x_uncond + w (x_cond - x_uncond) that training covers, drawn uniformly."""

    min: Annotated[float, Field(ge=1)] = Field(1.0, description="the lowest scale; 1 means none")
    max: Annotated[float, Field(ge=1)] = Field(
        8.0, description="the highest scale; equal to min: the student knows that one alone"
    )

    @model_validator(mode="after")
    def _ordered(self) -> GuidanceRange:
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) must not exceed max ({self.max})")
        return self

    @property
    def single(self) -> float | None:
        """The one scale that there is; None where there are many."""
        return self.min if self.min == self.max else None


class TeacherConfig(Section):
    """The expert: any Stable Diffusion pipeline in diffusers' format, sampled in many guided DDIM steps."""

    pipeline: str = Field(BUILTIN, description="'builtin', a pipeline directory, or a hub id")
    revision: str | None = Field(None, description="hub revision")
    variant: str | None = Field(None, description="weights variant of the files, such as fp16")
    steps: Annotated[int, Field(ge=1, le=500)] = Field(
        32, description="teacher steps of a whole trajectory; a multiple of student.steps"
    )
    precision: Precision = Field("float32", description="the frozen network runs in this")
    guidance: GuidanceRange = Field(GuidanceRange(), description="scales that training covers")
