"""What every objective is: a function of a batch to losses by role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from learner.batch import TrainBatch


@dataclass(frozen=True, slots=True)
class ObjectiveOutput:
    """Losses by role ("student"), scalars with a graph; and the student's loss by sample, [B] without one."""

    losses: Mapping[str, Tensor]
    per_sample: Tensor


class Objective(Protocol):
    """The student's networks are bound at construction; a call needs only the batch."""

    def __call__(self, batch: TrainBatch) -> ObjectiveOutput: ...
