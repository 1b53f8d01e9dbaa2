"""What methods share whose student learns from a network that tells its samples from data."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from ddil_dist.methods.base import Method, check_no_labels, check_whole_substeps

if TYPE_CHECKING:
    from ddil_dist.config import RunConfig
    from ddil_dist.models.scheduler import Sampler

DISCRIMINATOR: Final = "discriminator"
"""The role of that network."""


class Adversarial(Method):
    """A student that makes x_0 and noise on top of it, against a discriminator that has data of its own."""

    sampler: ClassVar[Sampler] = "renoising"
    uses_labels: ClassVar[bool] = False

    def check(self, config: RunConfig) -> None:
        check_whole_substeps(config)
        check_no_labels(config)

    @property
    def roles(self) -> tuple[str, ...]:
        return (DISCRIMINATOR,)

    @property
    def uses_images(self) -> bool:
        return True
