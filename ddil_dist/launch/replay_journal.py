"""What the launcher writes down while a run trains: the "replay", "rollout", "applied" and "skipped" lines of its
journal."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from ddil_dist.data.skipped import most_skipped
from ddil_dist.journal import Journal
from ddil_dist.replay.unused import MOST_ACTORS, never_sampled
from ddil_dist.types import ReplayStats, StateSource

AMOUNTS = ("states", "teacher_calls", "student_calls", "network_s", "insert_wait_s", "tick_s")


def replay_fields(stats: ReplayStats) -> dict[str, Any]:
    """The fields of a "replay" line."""
    return {
        "size": stats.size,
        "size_bytes": stats.size_bytes,
        "num_inserted": stats.num_inserted,
        "num_sampled": stats.num_sampled,
        "by_source": {StateSource(source).name: count for source, count in stats.by_source.items()},
        "never_sampled": never_sampled(stats, most_actors=MOST_ACTORS),
        "by_version": {str(version): count for version, count in stats.by_version.items()},
    }


class FleetJournal:
    """Turns the totals of actors' heartbeats into lines of amounts since the last look, and notes new versions.

    Rows of the data that were skipped, by actors or the learner, have a line where more are known than before.
    """

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self._totals: dict[str, Mapping[str, Any]] = {}
        self._applied: dict[str, int] = {}
        self._num_skipped = 0

    def look(
        self, heartbeats: Mapping[str, Mapping[str, Any]], learner: Mapping[str, Any] = MappingProxyType({})
    ) -> list[str]:
        """Write lines for what changed; returns what failed since the last look, a sentence each.

        learner: its status, where it is a process of its own.
        """
        skipped = most_skipped([learner, *heartbeats.values()])
        if skipped is not None and skipped["num_skipped"] > self._num_skipped:
            self._num_skipped = skipped["num_skipped"]
            self._journal.write("skipped", **skipped)
        failures = []
        for actor, beat in sorted(heartbeats.items()):
            if beat == self._totals.get(actor):
                continue
            if "failed" in beat:
                failures.append(str(beat["failed"]))
            elif "loading" not in beat:
                self._write(actor, beat)
            self._totals[actor] = beat
        return failures

    def _write(self, actor: str, beat: Mapping[str, Any]) -> None:
        before = self._totals.get(actor, {})
        if before.get("writer") != beat["writer"]:
            before = {}
        amounts = {key: beat[key] - before.get(key, 0) for key in AMOUNTS}
        amounts["tick_s"] += amounts["insert_wait_s"]
        self._journal.write("rollout", actor=actor, batch_fill=beat["batch_fill"], **amounts)
        if beat["version"] > self._applied.get(actor, -1):
            self._applied[actor] = beat["version"]
            self._journal.write("applied", time=beat["applied_at"], actor=actor, version=beat["version"])
