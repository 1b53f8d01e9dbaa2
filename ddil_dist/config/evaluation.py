"""The evaluation of a finished student."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from ddil_dist.section import Positive, Section


class EvaluationConfig(Section):
    """The table at the end of a run and its report."""

    num_images: Annotated[int, Field(ge=0)] = Field(500, description="per policy; 0 skips the evaluation")
    guidance_scale: Annotated[float, Field(ge=1)] | None = Field(
        None, description="within teacher.guidance; None: 1.5, or the nearest scale in that range"
    )
    batch_size: Positive = Field(100, description="images made at once")
    seed: Annotated[int, Field(ge=0)] = Field(1234, description="of the starting noises")
    grid_images: Annotated[int, Field(ge=1, le=64)] = Field(10, description="of each policy in the report")

    @model_validator(mode="after")
    def _several_images(self) -> EvaluationConfig:
        if self.num_images == 1:
            raise ValueError("num_images: 1; metrics compare images: set 2 or more, or 0 for none")
        return self
