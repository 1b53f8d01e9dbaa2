"""What two snapshots of a run say together: rates, shares, ages, and who waits for whom.

A report is plain data, as `--json` prints it. Rates are over the time between the snapshots; a counter that went back
(the server lost its data, an actor was restarted) counts from 0.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Final

from ddil_dist.data.skipped import most_skipped
from ddil_dist.monitor.snapshot import Snapshot
from ddil_dist.replay.buffer import actor_of
from ddil_dist.replay.unused import never_sampled, starved_share
from ddil_dist.status import Status
from ddil_dist.types import NO_POLICY, ReplayStats, StateSource

LATE_S: Final = 30.0
"""An actor that has not beaten for this long is called silent."""

NOTICEABLE: Final = 0.05
"""A share of waiting time below this is no bottleneck."""

SUBJECTS: Final = {"sample": "learner", "insert": "actors"}
OBJECTS: Final = {
    "inserts": "inserts",
    "states": "states of the source, timestep or age it asks for",
    "samples": "the learner to sample",
    "server": "the Redis server to answer",
    "memory": "room in Redis (maxmemory)",
}


def compare(before: Snapshot, after: Snapshot, run: str) -> dict[str, Any]:
    """The report of a run; `before` is an earlier snapshot of it."""
    seconds = max(after.time - before.time, 1e-3)
    replay = None
    if after.replay is not None:
        earlier = before.replay
        if earlier is None or earlier.incarnation != after.replay.incarnation:
            earlier = None
        replay = _replay(earlier, after.replay, seconds)
    wanted = after.learner.get("prior")
    if replay is not None and isinstance(wanted, Mapping):
        replay["wanted_share"] = dict(wanted)
    return {
        "run": run,
        "time": after.time,
        "interval_s": seconds,
        "bottleneck": _bottleneck(after, replay),
        "stop_reason": after.stop_reason,
        "skipped": most_skipped([after.learner, *after.actors.values()]),
        "replay": replay,
        "learner": dict(after.learner),
        "process": None if after.status is None else _process(after.status),
        "weights": _weights(after),
        "wanted_actors": after.wanted_actors,
        "fleet": {key: num for key, num in after.fleet.items() if key != "time"},
        "autoscale": None if after.autoscale is None else list(after.autoscale),
        "actors": [
            _actor(name, before.actors.get(name, {}), beat, after, seconds) | {"never_sampled": _starved(beat, replay)}
            for name, beat in after.actors.items()
        ],
    }


def _replay(before: ReplayStats | None, after: ReplayStats, seconds: float) -> dict[str, Any]:
    inserted = after.num_inserted - (before.num_inserted if before else after.num_inserted)
    sampled = after.num_sampled - (before.num_sampled if before else after.num_sampled)
    low, high = after.cursor_bounds
    return {
        "size": after.size,
        "capacity": after.capacity,
        "size_bytes": after.size_bytes,
        "capacity_bytes": after.capacity_bytes,
        "num_inserted": after.num_inserted,
        "num_sampled": after.num_sampled,
        "num_refused": after.num_refused,
        "inserts_per_s": max(0.0, inserted / seconds),
        "samples_per_s": max(0.0, sampled / seconds),
        "by_source": _names(after.by_source),
        "share_by_source": _shares(after.by_source),
        "sampled_share_by_source": _shares(after.sampled_by_source),
        "wanted_share": {},
        "newest_version": after.newest_version,
        "ages": _ages(after),
        "by_timestep": {str(timestep): num for timestep, num in after.by_timestep.items()},
        "never_sampled": never_sampled(after),
        "limiter": {
            "settings": dict(after.settings),
            "cursor": after.cursor,
            "min_cursor": low,
            "max_cursor": high,
            "state": _limiter_state(after),
        },
        "num_samplers": after.num_samplers,
        "num_inserters": after.num_inserters,
        "waits": _waits(before, after, seconds),
        "incarnation": after.incarnation,
        "num_shards": after.num_shards,
    }


def _names(counts: Mapping[StateSource, int]) -> dict[str, int]:
    return {StateSource(source).name.lower(): num for source, num in counts.items()}


def _shares(counts: Mapping[StateSource, int]) -> dict[str, float]:
    total = sum(counts.values())
    return {name: num / total for name, num in _names(counts).items()} if total else {}


def _ages(stats: ReplayStats) -> list[dict[str, Any]]:
    """Histogram of ages in student updates: at most 8 bins of one round width, and the states without a policy."""
    ages = {max(stats.newest_version - v, 0): num for v, num in stats.by_version.items() if v != NO_POLICY}
    bins = []
    if stats.by_version.get(NO_POLICY):
        bins.append({"label": "no policy", "from": None, "to": None, "num": stats.by_version[NO_POLICY]})
    if ages:
        width = _round_width((max(ages) + 1) / 8)
        for begin in range(0, max(ages) + 1, width):
            num = sum(n for age, n in ages.items() if begin <= age < begin + width)
            label = str(begin) if width == 1 else f"{begin}-{begin + width - 1}"
            bins.append({"label": label, "from": begin, "to": begin + width - 1, "num": num})
    return bins


def _round_width(least: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, ... that is not below `least`."""
    power = int(10 ** math.floor(math.log10(max(least, 1))))
    return next(step * power for step in (1, 2, 5, 10) if step * power >= least)


def _limiter_state(stats: ReplayStats) -> str:
    """The limiter in words."""
    low, high = stats.cursor_bounds
    settings = stats.settings
    least = settings.get("min_size") or 0
    if stats.size < least:
        return f"filling: {stats.size} of {least:g} states before the first sample"
    ratio = settings.get("samples_per_insert") or 1.0
    if stats.cursor - low < ratio:
        return "samples wait for inserts"
    if high - stats.cursor < ratio:
        return "inserts wait for samples"
    return "open to both"


def _waits(before: ReplayStats | None, after: ReplayStats, seconds: float) -> dict[str, float]:
    """Share of time that each side waits for each reason: of one sampler's or inserter's time, on average."""
    clients = {"sample": after.num_samplers, "insert": after.num_inserters}
    shares = {}
    for name, waited_s in after.waits_s.items():
        since = waited_s - (before.waits_s.get(name, 0.0) if before else waited_s)
        shares[name] = min(1.0, max(0.0, since / seconds / max(1, clients.get(name.split()[0], 1))))
    return shares


def _bottleneck(after: Snapshot, replay: dict[str, Any] | None) -> str:
    """Who waits for whom, in words."""
    if after.status is not None:
        return str(after.status)
    if replay is None:
        return "there is no replay buffer: the run has not begun, or its name is another"
    waits: dict[str, float] = replay["waits"]
    worst = max(waits, key=lambda name: waits[name], default="")
    if worst and waits[worst] >= NOTICEABLE:
        who, _, whom = worst.partition(" for ")
        return f"{SUBJECTS.get(who, who)} waits for {OBJECTS.get(whom, whom)} {waits[worst]:.0%}".replace(
            "actors waits", "actors wait"
        )
    if not replay["num_inserters"] and not replay["num_samplers"]:
        phase = after.learner.get("phase")
        return "nobody inserts and nobody samples" + (f" (learner: {phase})" if phase else "")
    if not replay["num_inserters"]:
        return "nobody inserts"
    if not replay["num_samplers"]:
        return "nobody samples"
    return "nobody waits for the buffer"


def _process(status: Status) -> dict[str, Any]:
    """What the run's own process is at."""
    return {"phase": status.phase, "policy": status.policy, "done": status.done, "total": status.total,
            "left_s": status.left_s}  # fmt: skip


def _weights(after: Snapshot) -> dict[str, Any] | None:
    if after.weights is None:
        return None
    version = after.weights.version
    have = sorted(name for name, beat in after.actors.items() if beat.get("version") == version)
    return {
        "version": version,
        "progress": after.weights.progress,
        "size_bytes": after.weights.size_bytes,
        "dtype": after.weights.dtype,
        "applied_by": have,
    }


def _starved(beat: Mapping[str, Any], replay: dict[str, Any] | None) -> float | None:
    """The share of an actor's states, of all its lives, that were never sampled."""
    if replay is None or replay["never_sampled"] is None:
        return None
    counts = replay["never_sampled"]["by_actor"].get(actor_of(str(beat.get("writer", ""))))
    return None if counts is None else starved_share(counts)


def _actor(
    name: str, before: Mapping[str, Any], beat: Mapping[str, Any], after: Snapshot, seconds: float
) -> dict[str, Any]:
    """An actor's line. Rates are over its own heartbeats; with only one seen, over its life."""
    silent_s = max(0.0, after.time - float(beat["time"]))
    same = before.get("writer") == beat.get("writer") and beat["time"] > before.get("time", beat["time"])
    span_s = float(beat["time"]) - float(before["time"]) if same else float(beat.get("alive_s", 0.0))

    def rate(field: str) -> float | None:
        if field not in beat or span_s <= 0:
            return None
        return max(0.0, (float(beat[field]) - (float(before.get(field, 0.0)) if same else 0.0)) / span_s)

    waiting = rate("insert_wait_s")
    version = beat.get("version")
    behind = None
    if after.weights is not None and isinstance(version, int) and version >= 0:
        behind = after.weights.version - version
    if "loading" in beat:
        state = "loading"
    else:
        state = "failed" if "failed" in beat else "silent" if silent_s > LATE_S else "alive"
    return {
        "name": name,
        "writer": beat.get("writer"),
        "state": state,
        "beat_age_s": silent_s,
        "states_per_s": rate("states"),
        "waiting_share": None if waiting is None else min(1.0, waiting),
        "version": version,
        "versions_behind": behind,
        "failed": beat.get("failed"),
    }
