"""Everything that a run shows of itself, read once."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ddil_dist.config import RedisConfig
from ddil_dist.control import RunControl
from ddil_dist.replay.reader import ReplayReader
from ddil_dist.replay.server import connect
from ddil_dist.types import ReplayStats, WeightsVersion


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one time.

    time             seconds since 1970.
    replay           None while the run has no buffer.
    actors           heartbeats by actor (`RunControl.heartbeat`).
    wanted_actors    rollout actors asked for.
    fleet            its manager's status (`RunControl.set_fleet`), empty before the first.
    autoscale        (least, most) actors while the fleet scales itself, else None.
    learner          its status (`RunControl.set_learner_status`), empty before the first.
    weights          newest published version, None before the first.
    stop_reason      why the run was asked to stop, None where it was not.
    """

    time: float
    replay: ReplayStats | None
    actors: Mapping[str, Mapping[str, Any]]
    wanted_actors: int
    learner: Mapping[str, Any]
    weights: WeightsVersion | None
    stop_reason: str | None
    fleet: Mapping[str, Any] = field(default_factory=dict)
    autoscale: tuple[int, int] | None = None


class Source:
    """Takes snapshots of one run. Raises EnvironmentFailure where its server cannot be reached."""

    def __init__(self, config: RedisConfig, run: str) -> None:
        self.run = run
        self.reader = ReplayReader(config, run)
        self._control = RunControl(connect(config), run)

    def take(self) -> Snapshot:
        """The run now."""
        failure = self._control.failure()
        return Snapshot(
            time=time.time(),
            replay=self.reader.stats(),
            actors=self._control.heartbeats(),
            wanted_actors=self._control.wanted_actors() or 0,
            fleet=self._control.fleet(),
            autoscale=self._control.autoscale(),
            learner=self._control.learner_status() | ({} if failure is None else {"phase": "failed", "error": failure}),
            weights=self._control.newest_version(),
            stop_reason=self._control.stop_reason(),
        )

    def close(self) -> None:
        """Close the connections."""
        self.reader.close()
        self._control.close()
