"""Everything that a run shows of itself, read once."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ddil_dist.config import RedisConfig
from ddil_dist.control import RunControl
from ddil_dist.errors import EnvironmentFailure, WaitTimeoutError
from ddil_dist.replay.reader import ReplayReader
from ddil_dist.replay.server import connect
from ddil_dist.runs import whereabouts
from ddil_dist.status import Status, has_process, is_asked_to_stop, living_status
from ddil_dist.types import ReplayStats, WeightsVersion

LOOK_S = 0.3


@dataclass(frozen=True, slots=True)
class Snapshot:
    """A run at one time.

    time             seconds since 1970.
    replay           None while the run has no buffer.
    actors           heartbeats by actor (`RunControl.heartbeat`).
    wanted_actors    rollout actors asked for.
    fleet            its manager's status (`RunControl.set_fleet`), empty before the first.
    autoscale        (least, most) actors while the fleet scales itself, else None.
    status           what the run's own process is at where no Redis tells of it (`ddil_dist.status`), else None.
    learner          its status (`RunControl.set_learner_status`), empty before the first.
    stop_reason      why the run was asked to stop, None where it was not.
    """

    time: float
    replay: ReplayStats | None
    actors: Mapping[str, Mapping[str, Any]]
    wanted_actors: int
    learner: Mapping[str, Any]
    stop_reason: str | None
    fleet: Mapping[str, Any] = field(default_factory=dict)
    autoscale: tuple[int, int] | None = None
    status: Status | None = None

    @property
    def weights(self) -> WeightsVersion | None:
        """The newest published student; None before the first."""
        return None if self.replay is None else self.replay.weights


class Source:
    """Takes snapshots of the run in a directory: of its Redis, or of its own process where no Redis tells of it.

    find_redis: how to reach its Redis; called, and connected to, only where that is needed.
    """

    def __init__(self, path: Path, find_redis: Callable[[], RedisConfig]) -> None:
        self.path = path
        self._find_redis = find_redis
        self._reader: ReplayReader | None = None
        self._control: RunControl | None = None

    @property
    def reader(self) -> ReplayReader:
        """Of its replay buffer. Raises EnvironmentFailure where its server is not there."""
        if self._reader is None:
            self._reader = ReplayReader(self._find_redis(), self.path.name)
        return self._reader

    def take(self) -> Snapshot:
        """The run now. Raises EnvironmentFailure, which says what has become of it, where nobody tells of it."""
        status = living_status(self.path)
        if status is not None:
            self.close()
            return Snapshot(
                time=time.time(),
                replay=None,
                actors={},
                wanted_actors=0,
                learner=_learner_of(status),
                stop_reason="asked to stop" if is_asked_to_stop(self.path) else None,
                status=status,
            )
        if self._control is None:
            self._control = RunControl(connect(self._find_redis()), self.path.name)
        control = self._control
        if control.supervisor().get("state") == "ended":
            raise EnvironmentFailure(f"no run is going on at this server: it has ended; {whereabouts(self.path)}")
        failure = control.failure()
        return Snapshot(
            time=time.time(),
            replay=self.reader.stats(),
            actors=control.heartbeats(),
            wanted_actors=control.wanted_actors() or 0,
            fleet=control.fleet(),
            autoscale=control.autoscale(),
            learner=control.learner_status() | ({} if failure is None else {"phase": "failed", "error": failure}),
            stop_reason=control.stop_reason(),
        )

    def take_again(self, *, wait_s: float) -> Snapshot:
        """The same of a run that was there: between its training and its evaluation nobody tells of it for a moment."""
        deadline = time.monotonic() + wait_s
        while True:
            try:
                return self.take()
            except (EnvironmentFailure, WaitTimeoutError):
                self.close()
                if not has_process(self.path) or time.monotonic() > deadline:
                    raise
            time.sleep(LOOK_S)

    def close(self) -> None:
        """Close the connections; the next look opens them again."""
        for connection in (self._reader, self._control):
            if connection is not None:
                connection.close()
        self._reader = self._control = None


def _learner_of(status: Status) -> dict[str, Any]:
    """The status as a learner gives it."""
    if status.phase != "training":
        return {"phase": status.phase}
    return {"phase": status.phase, "update": status.done, "total_updates": status.total}
