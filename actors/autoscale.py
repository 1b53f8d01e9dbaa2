"""How many rollout actors the learner needs, from who waited for whom. Pure arithmetic; the fleet's manager asks.

Call the actors' work that the learner can use its demand D, in actors. With n < D actors the learner waits a share
w = 1 - n / D of its time, so D = n / (1 - w). With n > D actors the limiter blocks their inserts, and only D of them
are busy. Either way, from the number of busy actors b and the learner's waiting share w,

    D = b / (1 - w)

The fleet grows to ceil(D) at once (at most doubling), and shrinks to ceil(D (1 + SLACK)) only after several windows in
a row agreed: growing needs more than ceil(D), so a steady demand is met by a steady number.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddil_dist.config import AutoscaleConfig

SLACK = 0.2
PATIENCE = 3
"""Windows in a row that must find the fleet too large."""


@dataclass(frozen=True)
class Load:
    """What one window showed.

    busy               actors' worth of work: the sum over actors of the share of their time not spent waiting.
    learner_wait       share of the learner's time that it waited for states.
    """

    busy: float
    learner_wait: float


class Autoscaler:
    """Use: once a window in which the wanted number of actors ran throughout, `wanted = scaler.next(wanted, load)`."""

    def __init__(self, config: AutoscaleConfig) -> None:
        self.config = config
        self._too_many = 0

    def next(self, current: int, load: Load) -> int:
        """The number of actors wanted after a window in which `current` ran."""
        wanted = self._unbounded(current, load)
        return min(self.config.max, max(self.config.min, wanted))

    def _unbounded(self, current: int, load: Load) -> int:
        if load.learner_wait > self.config.learner_wait:
            self._too_many = 0
            demand = load.busy / (1 - min(load.learner_wait, 0.99))
            return min(max(math.ceil(demand), current), max(1, 2 * current))
        fewer = math.ceil(load.busy * (1 + SLACK))
        self._too_many = self._too_many + 1 if fewer < current else 0
        if self._too_many < PATIENCE:
            return current
        self._too_many = 0
        return fewer
