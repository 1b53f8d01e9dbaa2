"""Which of the states that were ever inserted no sample has had: by timestep, and by the actor that made them.

A staleness bound keeps what slow actors make from the learner, and a small buffer what comes in bursts; the aggregated
dataset is then not the one that the rollouts visit. Plain data, as the monitor prints and the journal keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ddil_dist.types import ReplayStats

MOST_ACTORS: Final = 16
"""In the journal; those with the greatest shares."""


def never_sampled(stats: ReplayStats, *, most_actors: int | None = None) -> dict[str, Any] | None:
    """How many states were never sampled, what share of the inserted ones that is, and how many of them are still live.

    "by_timestep" and "by_actor" have both numbers of each, {"inserted", "num"}. None before the first insert.
    """
    inserted = sum(stats.inserted_by_timestep.values())
    if not inserted:
        return None
    num = inserted - sum(stats.used_by_timestep.values())
    by_actor = _counts(stats.inserted_by_actor, stats.used_by_actor)
    if most_actors is not None:
        by_actor = dict(sorted(by_actor.items(), key=lambda item: -starved_share(item[1]))[:most_actors])
    return {
        "num": num,
        "share": num / inserted,
        "live": stats.num_unused,
        "by_timestep": _counts(stats.inserted_by_timestep, stats.used_by_timestep),
        "by_actor": by_actor,
    }


def starved_share(counts: Mapping[str, int]) -> float:
    """Of a timestep's or an actor's states, those that were never sampled."""
    return counts["num"] / max(1, counts["inserted"])


def most_starved(counts: Mapping[str, Mapping[str, int]]) -> tuple[str, float] | None:
    """The timestep or actor with the greatest share, and that share; None where there is nothing to compare."""
    if len(counts) < 2:
        return None
    worst = max(counts, key=lambda name: starved_share(counts[name]))
    return worst, starved_share(counts[worst])


def _counts(inserted: Mapping[Any, int], used: Mapping[Any, int]) -> dict[str, dict[str, int]]:
    return {str(key): {"inserted": num, "num": num - used.get(key, 0)} for key, num in inserted.items()}
