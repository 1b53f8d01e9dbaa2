"""Who waited for whom over a window: the autoscaler's eyes, read from heartbeats and the replay buffer's accounts."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.autoscale import Load
from ddil_dist.config import RunConfig
from ddil_dist.control import RunControl
from ddil_dist.replay.reader import ReplayReader
from ddil_dist.types import ReplayStats


@dataclass(frozen=True)
class _Reading:
    time: float
    beats: Mapping[str, Mapping[str, Any]]
    stats: ReplayStats | None


class LoadMeter:
    """Use: `begin()`, then `read(window_s)` again and again: None until the window has passed, then its load."""

    def __init__(self, config: RunConfig, control: RunControl) -> None:
        self._control = control
        self._reader = ReplayReader(config.redis, config.run.name)
        self._first: _Reading | None = None

    def begin(self) -> None:
        """A new window begins at the next `read`."""
        self._first = None

    def read(self, window_s: float) -> Load | None:
        """The load of a window that has passed; the next one begins with it."""
        if self._first is None:
            self._first = self._take()
        if time.monotonic() - self._first.time < window_s:
            return None
        before, after = self._first, self._take()
        self._first = after
        return measure_load(before.beats, before.stats, after.beats, after.stats, seconds=after.time - before.time)

    def _take(self) -> _Reading:
        return _Reading(time.monotonic(), self._control.heartbeats(), self._reader.stats())


def measure_load(
    beats_before: Mapping[str, Mapping[str, Any]],
    stats_before: ReplayStats | None,
    beats: Mapping[str, Mapping[str, Any]],
    stats: ReplayStats | None,
    *,
    seconds: float,
) -> Load | None:
    """The load between two readings; None where they are of different buffers, or no actor worked throughout."""
    if stats_before is None or stats is None or stats.incarnation != stats_before.incarnation:
        return None
    waited_s = sum(
        stats.waits_s.get(what, 0.0) - stats_before.waits_s.get(what, 0.0)
        for what in ("sample for inserts", "sample for states")
    )
    busy = 0.0
    for actor, beat in beats.items():
        before = beats_before.get(actor, {})
        if "alive_s" not in beat or beat.get("writer") != before.get("writer"):
            continue
        alive_s = beat["alive_s"] - before.get("alive_s", 0.0)
        if alive_s > 0:
            busy += min(1.0, max(0.0, 1 - (beat["insert_wait_s"] - before.get("insert_wait_s", 0.0)) / alive_s))
    if busy == 0.0:
        return None
    return Load(busy=busy, learner_wait=min(1.0, max(0.0, waited_s / seconds / max(1, stats.num_samplers))))
