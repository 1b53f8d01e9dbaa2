"""Reading a run's replay buffer from outside, with nothing but its server's URL and its name.

For the monitor and its like: it makes nothing, follows nothing, and needs no configuration of the run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from ddil_dist.config import RedisConfig
from ddil_dist.errors import EnvironmentFailure
from ddil_dist.replay.limiter import LimiterSettings, RateLimiter
from ddil_dist.replay.shard import Request, Shard, exchange, open_shards, pack, pairs
from ddil_dist.replay.waits import Deadline
from ddil_dist.types import ReplayStats, StateSource, WeightsVersion


class ReplayReader:
    """Statistics and settings of the buffer of `run` on the servers of `config`, in the order that the run has them.

    Raises EnvironmentFailure where a server cannot be reached.
    """

    def __init__(self, config: RedisConfig, run: str) -> None:
        self._config, self._run = config, run
        self._shards = open_shards(config, run, shards=1)
        self._complete = False

    def stats(self) -> ReplayStats | None:
        """What is live and what was done; None where the run has no buffer (yet)."""
        deadline = Deadline(self._config.answer_timeout_s)
        return read_stats(self._shards, deadline) if self._find_shards(deadline) else None

    def configure(self, **changes: Any) -> LimiterSettings:
        """Change the running buffer's settings (`LimiterSettings`), for everyone; what they are then.

        Raises ConfigError on a bad value, EnvironmentFailure where the run has no buffer.
        """
        deadline = Deadline(self._config.answer_timeout_s)
        first = self._shards[0]
        state = read_state(first, deadline)
        if "incarnation" not in state:
            raise EnvironmentFailure(f"run {self._run} has no replay buffer on {first.where}: is the name right?")
        settings = settings_of(state).changed(**changes)
        words = [word for name in changes for word in (name, as_text(getattr(settings, name)))]
        exchange([(first, first.call("configure", state["incarnation"], *words), 1)], deadline, who="changing settings")
        return settings

    def close(self) -> None:
        """Close the connections."""
        for shard in self._shards:
            shard.close()

    def _find_shards(self, deadline: Deadline) -> bool:
        """Learn from the first shard how many there are; False where there is none."""
        if self._complete:
            return True
        found = int(read_state(self._shards[0], deadline).get("shards", "0"))
        if found == 0:
            return False
        servers = len(self._config.urls)
        if found % servers:
            raise EnvironmentFailure(
                f"run {self._run} spreads its states over {found} shards, and {servers} servers were named; give the "
                "URL of every server of the run"
            )
        if found > servers:
            self.close()
            self._shards = open_shards(self._config, self._run, shards=found // servers)
        self._complete = True
        return True


def read_state(shard: Shard, deadline: Deadline) -> dict[str, str]:
    """A shard's state hash; empty where there is no buffer."""
    return pairs(exchange([(shard, pack(b"HGETALL", shard.keys[0]), 1)], deadline, who="statistics")[0][0])


def read_stats(shards: Sequence[Shard], deadline: Deadline) -> ReplayStats | None:
    """What is live and what was done, over all shards; None where a shard is not there."""
    requests: list[Request] = []
    for shard in shards:
        commands = (
            (b"HGETALL", shard.keys[0]),
            (b"HGETALL", shard.keys[4]),
            (b"ZRANGE", shard.keys[7], 0, -1),
            (b"HGETALL", shard.keys[10]),
            (b"BITCOUNT", shard.keys[9]),
        )
        requests.append((shard, b"".join(pack(*command) for command in commands), len(commands)))
    answers = exchange(requests, deadline, who="statistics")
    states = [pairs(state) for state, *_ in answers]
    if not all("incarnation" in state for state in states):
        return None
    counts: dict[str, int] = {}
    for _, found, *_ in answers:
        for key, value in pairs(found).items():
            counts[key] = counts.get(key, 0) + int(value)
    fates = _fates([pairs(answer[3]) for answer in answers])
    return _stats(states, counts, clients=answers[0][2], fates=fates, num_used=sum(answer[4] for answer in answers))


def _fates(shards: Sequence[Mapping[str, str]]) -> dict[str, dict[str, int]]:
    """Counts over all shards by kind ("it", "ut", "ia", "ua") and by timestep or actor's name."""
    total: dict[str, dict[str, int]] = {kind: {} for kind in ("it", "ut", "ia", "ua")}
    for shard in shards:
        names = {number: field[2:] for field, number in shard.items() if field.startswith("a:")}
        for field, num in shard.items():
            kind, _, key = field.partition(":")
            if kind in total:
                name = names[key] if kind.endswith("a") else key
                total[kind][name] = total[kind].get(name, 0) + int(num)
    return total


def _stats(
    states: Sequence[Mapping[str, str]],
    counts: Mapping[str, int],
    clients: Sequence[bytes],
    fates: Mapping[str, Mapping[str, int]],
    num_used: int,
) -> ReplayStats:
    first = states[0]
    settings = settings_of(first)

    def total(name: str) -> int:
        return sum(int(state[name]) for state in states)

    def by_timestep(kind: str) -> dict[int, int]:
        return dict(sorted((int(timestep), num) for timestep, num in fates[kind].items()))

    def by(kind: str) -> dict[int, int]:
        return dict(sorted((int(key[2:]), num) for key, num in counts.items() if key.startswith(kind)))

    limiter = RateLimiter(
        settings, num_inserted=int(first["offered"]), num_sampled=int(first["charged"]), size=total("size")
    )
    return ReplayStats(
        size=limiter.size,
        size_bytes=total("bytes"),
        capacity=total("capacity"),
        num_inserted=total("inserted"),
        num_sampled=limiter.num_sampled,
        num_refused=total("refused"),
        by_source={StateSource(key): num for key, num in by("s:").items()},
        by_version=by("v:"),
        by_timestep=by("t:"),
        sampled_by_source={
            source: int(first[f"sampled:{source.value}"])
            for source in StateSource
            if f"sampled:{source.value}" in first
        },
        num_unused=limiter.size - num_used,
        inserted_by_timestep=by_timestep("it"),
        used_by_timestep=by_timestep("ut"),
        inserted_by_actor=dict(sorted(fates["ia"].items())),
        used_by_actor=dict(sorted(fates["ua"].items())),
        capacity_bytes=total("capacity_bytes"),
        settings=asdict(settings),
        cursor=limiter.cursor,
        cursor_bounds=(limiter.min_diff, limiter.max_diff),
        waits_s={name[5:]: int(ms) / 1000 for name, ms in sorted(first.items()) if name.startswith("wait:")},
        incarnation=first["incarnation"],
        num_shards=len(states),
        num_samplers=sum(client.startswith(b"sample:") for client in clients),
        num_inserters=sum(client.startswith(b"insert:") for client in clients),
        weights=weights_of(first),
    )


def settings_of(state: Mapping[str, str]) -> LimiterSettings:
    """The rate limiter's settings in a shard's state."""
    return LimiterSettings(
        samples_per_insert=float(state["samples_per_insert"]),
        min_size=int(state["min_size"]),
        error_buffer=float(state["error_buffer"]),
        max_staleness=int(state["max_staleness"]) if state["max_staleness"] else None,
    )


def weights_of(state: Mapping[str, str]) -> WeightsVersion | None:
    """The newest published student that is noted in the first shard's state; None before the first, or of a note that
    is none."""
    try:
        note = json.loads(state["weights"])
        return WeightsVersion(
            int(note["version"]),
            float(note["progress"]),
            str(note["digest"]),
            int(note["size_bytes"]),
            str(note["dtype"]),
        )
    except (KeyError, ValueError, TypeError):
        return None


def as_text(value: float | None) -> str:
    """A setting as the state holds it; None is empty."""
    return "" if value is None else repr(value)
