"""How a predicted x_0 is projected onto the support of the data; each kind answers with its function of latents."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Discriminator, Field, Tag

from ddil_dist.section import PositiveFloat, Section

if TYPE_CHECKING:
    from ddil_dist.diffusion.thresholding import Threshold

ONE, EACH = "a number", "a list"

Limit = Annotated[
    Annotated[PositiveFloat, Tag(ONE)] | Annotated[tuple[PositiveFloat, ...], Tag(EACH), Field(min_length=1)],
    Discriminator(lambda value: EACH if isinstance(value, list | tuple) else ONE),
]
"""One limit, or one a channel."""


class NoThresholding(Section):
    """Predicted x_0 is used as it is."""

    type: Literal["none"] = Field("none", description="predictions are taken as they are")

    @property
    def stock_limit(self) -> float | None:
        """The one limit that a stock scheduler can clamp x_0 to in the projection's place; None: there is none."""
        return None

    def threshold(self) -> Threshold:
        """What is done to predictions of x_0; the same for rollouts and losses."""
        return lambda x_0: x_0

    def projection(self) -> Threshold:
        """The nearest point of the assumed support: where generated samples are held."""
        return self.threshold()


class StaticThresholding(Section):
    """Predicted x_0 is clamped to [-limit, limit], one limit or one a channel."""

    type: Literal["static"] = Field("static", description="predictions are clamped")
    limit: Limit = Field(description="c of [-c, c], or one a channel")

    @property
    def stock_limit(self) -> float | None:
        return None if isinstance(self.limit, tuple) else self.limit

    def threshold(self) -> Threshold:
        from ddil_dist.diffusion.thresholding import clamp

        return lambda x_0: clamp(x_0, limit=self.limit)

    def projection(self) -> Threshold:
        return self.threshold()


class DynamicThresholding(Section):
    """Predicted x_0 is clamped to its own quantile s >= limit and rescaled by limit / s (Saharia et al. 2022)."""

    type: Literal["dynamic"] = Field(
        "dynamic", description="predictions are clamped to their own quantile, and scaled back"
    )
    limit: PositiveFloat = Field(description="c of [-c, c] that they are scaled to")
    quantile: Annotated[float, Field(gt=0, le=1)] = Field(0.995, description="of a prediction's magnitudes")

    @property
    def stock_limit(self) -> float | None:
        return None

    def threshold(self) -> Threshold:
        from ddil_dist.diffusion.thresholding import dynamic_threshold

        return lambda x_0: dynamic_threshold(x_0, limit=self.limit, quantile=self.quantile)

    def projection(self) -> Threshold:
        return self.threshold()


class ReflectThresholding(Section):
    """Predicted x_0 is folded back into [-limit, limit] (reflected diffusion, Lou & Ermon 2023)."""

    type: Literal["reflect"] = Field("reflect", description="predictions are folded back at the walls")
    limit: Limit = Field(description="c of [-c, c], or one a channel")

    @property
    def stock_limit(self) -> float | None:
        return None if isinstance(self.limit, tuple) else self.limit

    def threshold(self) -> Threshold:
        from ddil_dist.diffusion.thresholding import reflect

        return lambda x_0: reflect(x_0, limit=self.limit)

    def projection(self) -> Threshold:
        """A clamp: a fold takes a sample from outside far into the support, and turns gradients there round."""
        return StaticThresholding(limit=self.limit).threshold()


Thresholding = Annotated[
    NoThresholding | StaticThresholding | DynamicThresholding | ReflectThresholding, Field(discriminator="type")
]
