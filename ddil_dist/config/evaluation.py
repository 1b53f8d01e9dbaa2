"""The evaluation of a finished student."""

from __future__ import annotations

from pathlib import Path
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
    inception: Path | None = Field(
        None,
        description="weights of Inception v3 (torch-fidelity's) for FID, density and coverage of other data than "
        "the built-in; None: where a download leaves them, if they are there",
    )
    clip: str | None = Field(
        None, description="OpenCLIP model for the CLIP score of such images: name/weights, or local-dir:FOLDER"
    )
    hps: Path | None = Field(None, description="HPSv2's weights, for such images")
    real_images: Positive = Field(10_000, description="of the data, at most, that FID compares with")
    grid_images: Annotated[int, Field(ge=1, le=64)] = Field(10, description="of each policy in the report")

    @model_validator(mode="after")
    def _several_images(self) -> EvaluationConfig:
        if self.num_images == 1:
            raise ValueError("num_images: 1; metrics compare images: set 2 or more, or 0 for none")
        return self
