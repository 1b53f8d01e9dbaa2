"""The replay buffer of a run in one process: the same semantics as in Redis, no service, exactly repeatable.

Given a seed and the same calls, every draw is the same. `state_dict` holds all of it (contents, counters, generator),
so that a resumed run goes on as if it had never stopped; whoever publishes notes again what is newest.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

import numpy as np

from ddil_dist.config import ReplayConfig
from ddil_dist.errors import CheckpointError, ConfigError, RecordError, ReplayError, WaitTimeoutError
from ddil_dist.replay.buffer import actor_of, check_draws, describe_draw
from ddil_dist.replay.codec import Codec, Columns, Record, Rows
from ddil_dist.replay.index import SlotIndex
from ddil_dist.replay.limiter import LimiterSettings, RateLimiter
from ddil_dist.states import States
from ddil_dist.types import Draw, ReplayStats, StateSource, WeightsVersion

WINDOW: Final = 32
"""Batches of a writer, newest first, of which it is known whether they are stored."""

TIMESTEP: Final = 1
"""Place of the timestep in a record's metadata."""

_STATE_VERSION: Final = 1


@dataclass
class _Counters:
    """What outlives the states: totals, the limiter's counters, the reservoir's threshold."""

    head: int = 0
    tail: int = 0
    size_bytes: int = 0
    threshold: float = 1.0
    num_inserted: int = 0
    num_sampled: int = 0
    num_refused: int = 0
    sampled_by_source: dict[int, int] = field(default_factory=dict)
    inserted_by_timestep: dict[int, int] = field(default_factory=dict)
    used_by_timestep: dict[int, int] = field(default_factory=dict)
    inserted_by_actor: dict[str, int] = field(default_factory=dict)
    used_by_actor: dict[str, int] = field(default_factory=dict)
    waits_s: dict[str, float] = field(default_factory=dict)


class InMemoryReplay:
    """`ReplayBuffer` in this process. Safe to share between threads.

    Invariants: slot s holds a record exactly where `_records` has s, of the actor `_actors[s]`, and `_used` has s where
    a sample has had it; with removal oldest the live slots are those of the insert numbers tail..head-1, modulo
    capacity; with reservoir they are 0..size-1.
    """

    def __init__(self, config: ReplayConfig, seed: int, *, kind: type[States[Any]] = States) -> None:
        self._config = config
        self.codec = Codec(kind)
        self._settings = LimiterSettings(
            config.samples_per_insert, config.min_size, config.error_buffer, config.max_staleness
        )
        self._rng = np.random.default_rng(seed)
        self._changed = threading.Condition(threading.RLock())
        self._index = SlotIndex(len(self.codec.meta))
        self._records: dict[int, Record] = {}
        self._actors: dict[int, str] = {}
        self._used: set[int] = set()
        self._counters = _Counters()
        self._weights: WeightsVersion | None = None
        self._writers: dict[str, tuple[int, int]] = {}
        self._layout: str | None = None

    # -- inserting ----------------------------------------------------------------------------------------------------

    def insert(self, states: States[Rows], *, writer: str, batch_id: int, timeout_s: float) -> bool:
        """See `ReplayBuffer.insert`."""
        if not len(states):
            raise ConfigError("an insert of no states: give at least one")
        with self._changed:
            records = self._encode(states)
            newest, bits = self._seen(writer, batch_id)
            if bits == 0:
                return False
            self._limiter().check_insert(len(states))
            self._wait(
                lambda: "" if self._limiter().can_insert(len(states)) else self._limiter().why_no_insert(len(states)),
                timeout_s,
                who=f"an insert of {len(states)} states",
                what="insert for samples",
            )
            newest, bits = self._seen(writer, batch_id)
            if bits == 0:
                return False
            self._writers[writer] = (newest, bits)
            self._layout = records[0].layout
            place = self._insert_reservoir if self._config.removal == "reservoir" else self._insert_oldest_first
            actor = actor_of(writer)
            for record in records:
                _add(self._counters.inserted_by_timestep, record.meta[TIMESTEP])
                _add(self._counters.inserted_by_actor, actor)
                place(record, actor)
            self._counters.num_inserted += len(records)
            self._changed.notify_all()
            return True

    def _encode(self, states: States[Rows]) -> list[Record]:
        """The records of a batch; a bad state is counted and raises RecordError."""
        try:
            encoded = self.codec.encode(states)
            largest = int(encoded.meta["size"].max())
            if largest > self._config.capacity_bytes:
                raise RecordError(f"a record of {largest} bytes exceeds replay.capacity_bytes")
            if self._layout not in (None, encoded.layout):
                raise RecordError(
                    f"states are {encoded.layout}, this run's are {self._layout}: one buffer holds one dtype and shape"
                )
        except RecordError:
            self._counters.num_refused += 1
            raise
        return [self.codec.decode(record) for record in encoded.joined()]

    def _seen(self, writer: str, batch_id: int) -> tuple[int, int]:
        """A writer's newest batch and bits of those stored, once this one is; bits 0 where it is stored already."""
        known = self._writers.get(writer)
        if known is None:
            return batch_id, 1
        newest, bits = known
        if batch_id > newest:
            return batch_id, ((bits << min(batch_id - newest, WINDOW)) | 1) & (2**WINDOW - 1)
        back = newest - batch_id
        if back >= WINDOW:
            raise ReplayError(
                f"batch {batch_id} of writer {writer!r} is {WINDOW} or more behind its newest, {newest}: whether it "
                "was stored is no longer known; number batches upwards"
            )
        return newest, 0 if bits >> back & 1 else bits | 1 << back

    def _insert_oldest_first(self, record: Record, actor: str) -> None:
        counters, config, size = self._counters, self._config, len(record.data)
        while counters.tail < counters.head and (
            counters.head - counters.tail >= config.capacity or counters.size_bytes + size > config.capacity_bytes
        ):
            self._remove(counters.tail % config.capacity)
            counters.tail += 1
        self._put(counters.head % config.capacity, record, actor)
        counters.head += 1

    def _insert_reservoir(self, record: Record, actor: str) -> None:
        """Keep it with the chance that every record before it has had; `insert.lua` tells why this is uniform."""
        counters, config, size = self._counters, self._config, len(record.data)
        if self._rng.random() >= counters.threshold:
            return
        while len(self._records) >= config.capacity or counters.size_bytes + size > config.capacity_bytes:
            live = len(self._records)
            counters.threshold *= self._rng.random() ** (1 / (live + 1))
            victim = int(self._rng.integers(live + 1))
            if victim == live:
                return
            self._remove(victim)
            if victim != live - 1:
                moved = self._records[live - 1], self._actors[live - 1], live - 1 in self._used
                self._remove(live - 1)
                self._put(victim, *moved)
        self._put(len(self._records), record, actor)

    def _put(self, slot: int, record: Record, actor: str, used: bool = False) -> None:
        self._records[slot] = record
        self._actors[slot] = actor
        if used:
            self._used.add(slot)
        self._index.set(slot, record.meta)
        self._counters.size_bytes += len(record.data)

    def _remove(self, slot: int) -> None:
        record = self._records.pop(slot)
        del self._actors[slot]
        self._used.discard(slot)
        self._index.set(slot, None)
        self._counters.size_bytes -= len(record.data)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> States[Rows]:
        """See `ReplayBuffer.sample`."""
        total = check_draws(draws)
        with self._changed:
            self._limiter().check_sample(total)
            self._wait(
                lambda: self._why_not(total, draws),
                timeout_s,
                who=f"a sample of {total} states",
                what="sample for inserts",
            )
            newest, staleness = self._newest, self._settings.max_staleness
            slots: list[int] = []
            for draw in draws:
                slots += self._index.choose(draw, draw.num, newest=newest, staleness=staleness, rng=self._rng)[0]
            for slot in set(slots) - self._used:
                _add(self._counters.used_by_timestep, self._records[slot].meta[TIMESTEP])
                _add(self._counters.used_by_actor, self._actors[slot])
            self._used |= set(slots)
            records = [self._records[slot] for slot in slots]
            self._counters.num_sampled += total
            counted = self._counters.sampled_by_source
            for source, num in Counter(record.meta[0] for record in records).items():
                counted[source] = counted.get(source, 0) + num
            self._changed.notify_all()
        columns = Columns(total, self.codec)
        for row, record in enumerate(records):
            columns.put(row, record)
        return columns.build(newest)

    def _why_not(self, total: int, draws: Sequence[Draw]) -> str:
        """For whom a sample must wait and why, in words; "" where it need not."""
        limiter = self._limiter()
        if not limiter.can_sample(total):
            return limiter.why_no_sample(total)
        newest, staleness = self._newest, self._settings.max_staleness
        for draw in draws:
            if draw.num and not self._index.count(draw, newest=newest, staleness=staleness):
                bound = "" if staleness is None else f" within replay.max_staleness = {staleness} of version {newest}"
                return (
                    f"for inserts: none of the {limiter.size} live states is of {describe_draw(draw)}{bound}; do "
                    "rollout actors make such states?"
                )
        return ""

    def _wait(self, reason: Callable[[], str], timeout_s: float, *, who: str, what: str) -> None:
        """Wait until `reason` is empty; raises WaitTimeoutError with it at the deadline."""
        begin = time.monotonic()
        while why := reason():
            left_s = begin + timeout_s - time.monotonic()
            before = time.monotonic()
            if left_s <= 0 or not self._changed.wait(left_s):
                waited_s = time.monotonic() - begin
                self._add_wait(what, time.monotonic() - before)
                if why := reason():
                    raise WaitTimeoutError(f"{who} waited {waited_s:.1f} s {why}")
                return
            self._add_wait(what, time.monotonic() - before)

    def _add_wait(self, what: str, seconds: float) -> None:
        self._counters.waits_s[what] = self._counters.waits_s.get(what, 0.0) + seconds

    # -- the limiter, settings, statistics ----------------------------------------------------------------------------

    def can_sample(self, num: int) -> bool:
        """See `ReplayBuffer.can_sample`."""
        with self._changed:
            return self._limiter().can_sample(num)

    def can_insert(self, num: int) -> bool:
        """See `ReplayBuffer.can_insert`."""
        with self._changed:
            return self._limiter().can_insert(num)

    def note_weights(self, newest: WeightsVersion) -> None:
        """See `ReplayBuffer.note_weights`."""
        with self._changed:
            if self._weights is None or newest.version > self._weights.version:
                self._weights = newest
            self._changed.notify_all()

    @property
    def _newest(self) -> int:
        return 0 if self._weights is None else self._weights.version

    def configure(self, **changes: Any) -> None:
        """See `ReplayBuffer.configure`."""
        with self._changed:
            self._settings = self._settings.changed(**changes)
            self._changed.notify_all()

    def stats(self, *, timeout_s: float | None = None) -> ReplayStats:
        """See `ReplayBuffer.stats`."""
        with self._changed:
            counters, limiter = self._counters, self._limiter()
            sources, timesteps, versions = (
                dict(sorted(Counter(record.meta[part] for record in self._records.values()).items()))
                for part in range(3)
            )
            return ReplayStats(
                size=len(self._records),
                size_bytes=counters.size_bytes,
                capacity=self._config.capacity,
                num_inserted=counters.num_inserted,
                num_sampled=counters.num_sampled,
                num_refused=counters.num_refused,
                by_source={StateSource(source): num for source, num in sources.items()},
                by_version=versions,
                by_timestep=timesteps,
                sampled_by_source={StateSource(k): v for k, v in sorted(counters.sampled_by_source.items())},
                num_unused=len(self._records) - len(self._used),
                inserted_by_timestep=dict(sorted(counters.inserted_by_timestep.items())),
                used_by_timestep=dict(sorted(counters.used_by_timestep.items())),
                inserted_by_actor=dict(sorted(counters.inserted_by_actor.items())),
                used_by_actor=dict(sorted(counters.used_by_actor.items())),
                capacity_bytes=self._config.capacity_bytes,
                settings=asdict(self._settings),
                cursor=limiter.cursor,
                cursor_bounds=(limiter.min_diff, limiter.max_diff),
                waits_s=dict(counters.waits_s),
                incarnation="memory",
                weights=self._weights,
            )

    def close(self) -> None:
        """Nothing to let go of."""

    # -- exact resume -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All but the note of the newest weights, as plain data: records as bytes, counters, settings, generator."""
        with self._changed:
            return {
                "version": _STATE_VERSION,
                "records": {slot: bytes(record.data) for slot, record in self._records.items()},
                "actors": dict(self._actors),
                "used": sorted(self._used),
                "groups": self._index.state(),
                "counters": asdict(self._counters),
                "settings": asdict(self._settings),
                "writers": dict(self._writers),
                "generator": self._rng.bit_generator.state,
                "bounds": (self._config.capacity, self._config.capacity_bytes, self._config.removal),
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Become what `state_dict` described. Raises CheckpointError where the bounds differ."""
        bounds = (self._config.capacity, self._config.capacity_bytes, self._config.removal)
        if state.get("version") != _STATE_VERSION or tuple(state["bounds"]) != bounds:
            raise CheckpointError(
                f"the saved replay buffer (version {state.get('version')}) has capacity, capacity_bytes and removal "
                f"{tuple(state.get('bounds', ()))}, the configuration {bounds}; resume with the same"
            )
        records = {int(slot): self.codec.decode(data) for slot, data in state["records"].items()}
        layout = next((record.layout for record in records.values()), None)
        if layout is not None and layout.split(":")[0] != self._config.latent_dtype:
            raise CheckpointError(
                f"the saved replay buffer holds latents of {layout}, the configuration wants replay.latent_dtype="
                f"{self._config.latent_dtype}; resume with the same"
            )
        with self._changed:
            self._records = records
            self._actors = dict(state.get("actors", dict.fromkeys(records, "")))
            self._used = set(state.get("used", records))  # of before there was an account: as if it were settled
            self._index.restore(state["groups"])
            known = {one.name for one in fields(_Counters)}  # once there were others
            self._counters = _Counters(**{name: value for name, value in state["counters"].items() if name in known})
            self._settings = LimiterSettings(**state["settings"])
            self._writers = {writer: (newest, bits) for writer, (newest, bits) in state["writers"].items()}
            self._layout = layout
            self._rng.bit_generator.state = state["generator"]
            self._changed.notify_all()

    def _limiter(self) -> RateLimiter:
        counters = self._counters
        return RateLimiter(
            self._settings,
            num_inserted=counters.num_inserted,
            num_sampled=counters.num_sampled,
            size=len(self._records),
        )


def _add(counts: dict[Any, int], key: Any) -> None:
    counts[key] = counts.get(key, 0) + 1
