"""What is trained, and on which timesteps: the `student` section."""

from __future__ import annotations

import itertools
from typing import Annotated, Literal

from pydantic import Field, model_validator

from ddil_dist.section import Positive, PositiveFloat, Section

Spacing = Literal["linspace", "trailing", "leading"]


class LoraConfig(Section):
    """A low-rank adapter on the frozen teacher's U-Net, in place of training all of it (Hu et al. 2022)."""

    rank: Positive = Field(64, description="of every adapted layer's two factors")
    alpha: PositiveFloat | None = Field(None, description="the adapter is scaled by alpha / rank; None: rank, so by 1")
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        (
            *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
            *("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "time_emb_proj"),
        ),
        description="ends of the names of the layers that are adapted; LCM-LoRA's by default",
    )


class StudentConfig(Section):
    """The learner's policy: the teacher's network, told the guidance scale, sampled in a few steps."""

    steps: Annotated[int, Field(ge=1, le=64)] = Field(4, description="denoising steps of the finished student")
    spacing: Spacing = Field(
        "linspace",
        description="of the student grid: linspace 999, 749, 500, 250; trailing 999, 749, 499, 249; leading 801, 601, "
        "401, 201",
    )
    timesteps: tuple[Annotated[int, Field(ge=0)], ...] | None = Field(
        None, description="the grid itself, descending, where a stock scheduler can make it; None: by spacing"
    )
    initial: str | None = Field(
        None, description="a distilled pipeline's directory, whose network the student begins as; None: the teacher's"
    )
    lora: LoraConfig | None = Field(None, description="train an adapter of the teacher's network; None: all of it")
    guidance_embedding: bool | None = Field(
        None,
        description="the network is told the guidance scale, and one call serves for two; None: yes, but not with lora",
    )

    @model_validator(mode="after")
    def _the_grid_is_one(self) -> StudentConfig:
        if self.timesteps is not None:
            if len(self.timesteps) != self.steps:
                raise ValueError(
                    f"timesteps: {len(self.timesteps)} of them for steps = {self.steps}; give as many, or set "
                    f"student.steps={len(self.timesteps)}"
                )
            if any(a <= b for a, b in itertools.pairwise(self.timesteps)):
                raise ValueError(f"timesteps: {list(self.timesteps)} must fall strictly, from noise to image")
        return self

    @model_validator(mode="after")
    def _an_adapter_has_no_new_layers(self) -> StudentConfig:
        if self.lora is not None and self.initial is not None:
            raise ValueError(
                "initial: an adapter stands on the teacher's network and begins as it; set student.lora=null, or give "
                "the pipeline as teacher.pipeline"
            )
        if self.lora is not None and self.guidance_embedding:
            raise ValueError(
                "guidance_embedding: an adapter changes layers that the teacher has, and the guidance embedding is a "
                "new one that stock pipelines would not find; set student.guidance_embedding=false, or "
                "student.lora=null"
            )
        return self

    @property
    def embeds_guidance(self) -> bool:
        """Whether the student's network is told the guidance scale."""
        return self.lora is None if self.guidance_embedding is None else self.guidance_embedding
