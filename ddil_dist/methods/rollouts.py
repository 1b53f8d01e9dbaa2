"""How trajectories go down the grid: where each one stops, and who moves it on from there.

A path is the grid positions that a trajectory stops at, rising; at every stop but the last somebody makes a
transition to the next. All that is drawn comes from the trajectory's own random numbers, so that it can be made
again alone.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Protocol

Path = tuple[int, ...]


class RolloutMode(Protocol):
    """What an engine rolls out."""

    def path(self, draws: random.Random) -> Path:
        """The grid positions of a new trajectory's stops."""

    def student_acts(self, draws: random.Random, probability: float) -> bool:
        """Who makes the next transition, where the prior wants the student with `probability`."""


@dataclass(frozen=True)
class MixedMode:
    """Every grid point down to `last_index`; at each a Bernoulli draw (Algorithms 2 and 3).

    At probability 1 it is the student alone, at 0 the teacher alone.
    """

    last_index: int

    def path(self, draws: random.Random) -> Path:
        return tuple(range(self.last_index + 1))

    def student_acts(self, draws: random.Random, probability: float) -> bool:
        return draws.random() < probability


@dataclass(frozen=True)
class MultistepMode:
    """The student's own sampler in one of several numbers of steps; the teacher makes no transition.

    paths: one a number of steps; each trajectory draws one of them. A consistency student's: the teacher was never
    trained for consistency, so the two do not take turns.
    """

    paths: tuple[Path, ...]

    def path(self, draws: random.Random) -> Path:
        return self.paths[draws.randrange(len(self.paths))]

    def student_acts(self, draws: random.Random, probability: float) -> bool:
        return True
