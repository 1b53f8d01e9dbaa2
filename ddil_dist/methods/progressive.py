"""Progressive distillation (Salimans & Ho 2022): one student step lands where K guided teacher steps do."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from ddil_dist.methods.base import Method

Weighting = Literal["truncated_snr", "snr_plus_one", "snr"]


class Progressive(Method):
    """Progressive distillation: one student step equals teacher.steps / student.steps guided teacher steps."""

    title: ClassVar[str] = "progressive distillation"
    losses: ClassVar[str] = "learner.methods.progressive"

    type: Literal["progressive"] = Field("progressive", description="progressive distillation")
    weighting: Weighting = Field("truncated_snr", description="of the loss by signal-to-noise ratio")
