"""The two phases of an adversarial method: the student by its discriminator's answers, then the discriminator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from ddil_dist.methods import DISCRIMINATOR
from ddil_dist.states import States
from learner.methods.base import STUDENT, ObjectiveOutput, Phase
from learner.methods.real_data import RealData


class AdversarialObjective:
    """Base of an objective whose two networks both learn in every update, by the same samples and data.

    A subclass is the two losses. What its generator's loss makes is for its discriminator's, micro-batch by
    micro-batch; `forget` lets go of it.
    """

    def __init__(self, real: RealData) -> None:
        self._real = real

    def phases(self, update: int) -> Sequence[Phase]:
        """Generator and discriminator."""
        self.retry(update)
        return (Phase(STUDENT, self.generator_loss), Phase(DISCRIMINATOR, self.discriminator_loss))

    def retry(self, update: int) -> None:
        """Forget the samples, which are of other micro-batches, and go back to the data that the update began with."""
        self.forget()
        self._real.seek(update)

    def after_update(self, update: int) -> None:
        """Nothing."""

    @property
    def state(self) -> Mapping[str, nn.Module]:
        """Nothing beside student and discriminator."""
        return {}

    def forget(self) -> None:
        """Let go of the generator's samples."""
        raise NotImplementedError

    def generator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The student's."""
        raise NotImplementedError

    def discriminator_loss(self, batch: States[Tensor]) -> ObjectiveOutput:
        """The discriminator's, at the student's samples and at data."""
        raise NotImplementedError
