"""The replay buffer in Redis: many processes insert and sample, each exactly as if it were alone.

Inserting is one script call per batch. Sampling follows the shards' logs (a few microseconds a state) into a mirror of
what lies where, chooses slots there, and fetches them with one HMGET a shard; a record carries its own source,
timestep and version, so one that was overwritten in between is judged by what it is and, if it does not fit, drawn
again. The first shard keeps the rate limiter, the settings and the newest policy version for all.
"""

from __future__ import annotations

import logging
import secrets
import threading
from collections.abc import Sequence
from typing import Any, Final

import numpy as np

from ddil_dist.config import RedisConfig, ReplayConfig, RunConfig
from ddil_dist.errors import ConfigError, RecordError, ReplayError, WaitTimeoutError
from ddil_dist.replay.buffer import check_draws, describe_draw, fits, to_columns
from ddil_dist.replay.codec import Record, decode, encode_parts, layout_of
from ddil_dist.replay.index import LOG_DTYPE, META_DTYPE, SlotIndex
from ddil_dist.replay.limiter import LimiterSettings, RateLimiter
from ddil_dist.replay.shard import Shard, exchange, open_shards, script
from ddil_dist.replay.waits import Deadline
from ddil_dist.types import NO_POLICY, Draw, LatentState, ReplayStats, SampledStates, StateSource

logger = logging.getLogger(__name__)

QUICK_S: Final = 30.0
"""Deadline of the small exchanges that have none of their own: statistics, settings."""

ACCOUNT_EVERY_S: Final = 1.0


class _Mirror:
    """What this client knows of one shard."""

    def __init__(self, shard: Shard) -> None:
        self.shard = shard
        self.index = SlotIndex()
        self.incarnation = ""
        self.ops = -1
        self.epoch = -1
        self.state: dict[str, str] = {}

    def number(self, name: str) -> int:
        """An integer of the shard's state, 0 if absent."""
        return int(float(self.state.get(name, "0")))


class RedisReplay:
    """`ReplayBuffer` on one or more Redis servers. Safe to share between threads.

    run     keeps runs on one server apart.
    seed    of this client's draws; give every client its own.
    """

    def __init__(self, config: ReplayConfig, redis: RedisConfig | str, *, run: str, seed: int) -> None:
        self._config = config
        redis_config = RedisConfig(url=redis) if isinstance(redis, str) else redis
        self._mirrors = [_Mirror(shard) for shard in open_shards(redis_config, run)]
        self._rng = np.random.default_rng(seed)
        self._lock = threading.RLock()
        self._newest = 0
        self._changes: dict[str, str] = {}
        self._waits: dict[str, float] = {}
        deadline = Deadline(QUICK_S)
        for mirror in self._mirrors:
            self._open(mirror, deadline)
        self._check_bounds()
        self._sync(deadline)

    @classmethod
    def from_url(cls, url: str, config: RunConfig, *, seed: int) -> RedisReplay:
        """The buffer of a run whose first server is at `url`: the configured one, or the run's own."""
        redis = config.redis.model_copy(update={"url": url})
        return cls(config.replay, redis, run=config.run.name, seed=seed)

    # -- inserting ----------------------------------------------------------------------------------------------------

    def insert(self, states: Sequence[LatentState], *, writer: str, batch_id: int, timeout_s: float) -> bool:
        """See `ReplayBuffer.insert`."""
        if not states:
            raise ConfigError("an insert of no states: give at least one")
        deadline = Deadline(timeout_s)
        layout, metas, records = self._encode(states)
        mirror = self._mirrors[batch_id % len(self._mirrors)]
        self._limiter(len(states)).check_insert(len(states))
        if len(self._mirrors) > 1:
            self._admit(writer, batch_id, len(states), deadline)
        while True:
            packed = self._pack_insert(mirror, writer, batch_id, layout, metas, records)
            answer = self._exchange(mirror, packed, deadline, "an insert")[0]
            kind = answer[0]
            if kind == b"stored":
                return True
            if kind == b"duplicate":
                return False
            if kind == b"reset":
                self._open(mirror, deadline)
            elif kind == b"wait":
                self._wait_for_samples(len(states), deadline)
            elif kind == b"layout":
                self._count_refused(len(states))
                raise RecordError(
                    f"states are {layout}, this run's are {answer[1].decode()}: one buffer holds one dtype and shape; "
                    "choose another run.name for another latent"
                )
            else:
                raise ReplayError(
                    f"batch {batch_id} of writer {writer!r} is 32 or more behind its newest, {answer[1].decode()}: "
                    "whether it was stored is no longer known; number batches upwards"
                )

    def _encode(self, states: Sequence[LatentState]) -> tuple[str, bytes, list[tuple[list[Any], int]]]:
        """Layout, packed meta, and every record's parts and size; a bad state is counted and raises RecordError."""
        metas = np.zeros(len(states), META_DTYPE)
        records = []
        try:
            for i, state in enumerate(states):
                parts, size = encode_parts(state)
                if size > self._config.capacity_bytes // len(self._mirrors):
                    raise RecordError(f"a record of {size} bytes exceeds a shard's share of replay.capacity_bytes")
                version = NO_POLICY if state.policy_version is None else state.policy_version
                metas[i] = (state.source, state.label is not None, state.timestep, version, size)
                records.append((parts, size))
            layouts = {layout_of(state.latent.dtype, state.latent.array.shape) for state in states}
            if len(layouts) > 1:
                raise RecordError(f"states of several layouts in one insert: {', '.join(sorted(layouts))}")
        except RecordError:
            self._count_refused(1)
            raise
        return layouts.pop(), metas.tobytes(), records

    def _pack_insert(
        self,
        mirror: _Mirror,
        writer: str,
        batch_id: int,
        layout: str,
        metas: bytes,
        records: list[tuple[list[Any], int]],
    ) -> bytes:
        """The insert script's call; the join is the one copy that a latent goes through."""
        shard = mirror.shard
        seed = secrets.randbits(31)
        limited = 1 if len(self._mirrors) == 1 else 0
        head = [b"EVALSHA", script("insert")[0], str(len(shard.keys)).encode(), *shard.keys]
        words = (mirror.incarnation, writer, batch_id, limited, seed, layout)
        head += [str(word).encode() for word in words]
        head.append(metas)
        buffers: list[Any] = [b"*%d\r\n" % (len(head) + len(records))]
        buffers += [b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in head]
        for parts, size in records:
            buffers.append(b"$%d\r\n" % size)
            buffers += parts
            buffers.append(b"\r\n")
        return b"".join(buffers)

    def _admit(self, writer: str, batch_id: int, num: int, deadline: Deadline) -> None:
        """Several shards: charge a batch to the limiter on the first one, once."""
        first = self._mirrors[0]
        keys = (*first.shard.keys[:5], first.shard.keys[5] + b"-charged", first.shard.keys[6] + b"-charged")
        while True:
            packed = first.shard.call("admit", first.incarnation, writer, batch_id, num, keys=keys)
            kind = self._exchange(first, packed, deadline, "an insert")[0][0]
            if kind == b"ok":
                return
            if kind == b"reset":
                self._open(first, deadline)
            else:
                self._wait_for_samples(num, deadline)

    def _wait_for_samples(self, num: int, deadline: Deadline) -> None:
        begin_s = deadline.waited_s
        while True:
            if not deadline.pause():
                self._account("insert for samples", deadline.waited_s - begin_s, flush=True)
                raise WaitTimeoutError(
                    f"an insert of {num} states waited {deadline.waited_s:.1f} s "
                    f"{self._limiter(num).why_no_insert(num)}"
                )
            now_s = deadline.waited_s
            self._account("insert for samples", now_s - begin_s)
            begin_s = now_s
            with self._lock:
                self._sync(deadline)
                if self._limiter(num).can_insert(num):
                    return

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> SampledStates:
        """See `ReplayBuffer.sample`."""
        total = check_draws(draws)
        deadline = Deadline(timeout_s)
        wanted = [draw for draw in draws for _ in range(draw.num)]
        self._limiter(total).check_sample(total)
        rows: list[Record | None] = [None] * total
        charged = False
        while True:
            missing = [i for i, row in enumerate(rows) if row is None]
            if charged and not missing:
                break
            with self._lock:
                self._sync(deadline)
                newest, staleness = self._newest_version(), self._settings().max_staleness
                reason, whom = self._why_not(total, draws, charged=charged)
                picks = [] if reason else self._choose(wanted, missing)
            if not reason:
                begin_s = deadline.waited_s
                found = self._fetch(picks, deadline, charge=None if charged else total)
                if found is not None:
                    charged = True
                    for i, record in zip(missing, found, strict=True):
                        if record is not None and fits(record, wanted[i], newest=newest, staleness=staleness):
                            rows[i] = record
                    if deadline.left_s > 0 or all(row is not None for row in rows):
                        continue
                reason, whom = "for records that are not overwritten at once", "inserts"
            begin_s = deadline.waited_s
            more = deadline.pause()
            self._account(f"sample for {whom}", deadline.waited_s - begin_s, flush=not more)
            if not more:
                raise WaitTimeoutError(f"a sample of {total} states waited {deadline.waited_s:.1f} s {reason}")
        return to_columns([row for row in rows if row is not None], newest)

    def _why_not(self, total: int, draws: Sequence[Draw], *, charged: bool) -> tuple[str, str]:
        """For whom a sample must wait and why, in words; two empty texts where it need not."""
        limiter = self._limiter(total)
        if not charged and not limiter.can_sample(total):
            return limiter.why_no_sample(total), "inserts"
        newest, staleness = self._newest_version(), self._settings().max_staleness
        for draw in draws:
            if draw.num == 0:
                continue
            if not any(m.index.count(draw, newest=newest, staleness=staleness) for m in self._mirrors):
                bound = "" if staleness is None else f" within replay.max_staleness = {staleness} of version {newest}"
                return (
                    f"for inserts: none of the {limiter.size} live states is of {describe_draw(draw)}{bound}; do "
                    "rollout actors make such states?"
                ), "states"
        return "", ""

    def _choose(self, wanted: Sequence[Draw], missing: Sequence[int]) -> list[tuple[int, int]]:
        """(shard, slot) for every missing row; runs of the same draw are chosen together."""
        newest, staleness = self._newest_version(), self._settings().max_staleness
        picks: list[tuple[int, int]] = []
        begin = 0
        while begin < len(missing):
            draw = wanted[missing[begin]]
            end = begin
            while end < len(missing) and wanted[missing[end]] is draw:
                end += 1
            counts = np.array([m.index.count(draw, newest=newest, staleness=staleness) for m in self._mirrors], float)
            parts = [end - begin] if len(counts) == 1 else self._rng.multinomial(end - begin, counts / counts.sum())
            for number, part in enumerate(parts):
                slots = self._mirrors[number].index.choose(
                    draw, int(part), newest=newest, staleness=staleness, rng=self._rng
                )
                picks += [(number, slot) for slot in slots]
            begin = end
        return picks

    def _fetch(
        self, picks: Sequence[tuple[int, int]], deadline: Deadline, *, charge: int | None
    ) -> list[Record | None] | None:
        """The records at (shard, slot), None where there is none; None for all where the limiter refuses by now."""
        rows_of: dict[int, list[int]] = {}
        for row, (number, _) in enumerate(picks):
            rows_of.setdefault(number, []).append(row)
        requests, with_charge = [], []
        for number in sorted({0, *rows_of} if charge is not None else rows_of):
            shard, rows = self._mirrors[number].shard, rows_of.get(number, [])
            packed, num = b"", 0
            if number == 0 and charge is not None:
                size = sum(len(m.index) for m in self._mirrors)
                packed, num = shard.call("charge", self._mirrors[0].incarnation, charge, size), 1
            with_charge.append(num)
            if rows:
                slots = [b"$%d\r\n%b\r\n" % (len(t), t) for t in (b"%d" % picks[row][1] for row in rows)]
                packed += b"*%d\r\n$5\r\nHMGET\r\n$%d\r\n%b\r\n" % (len(rows) + 2, len(shard.keys[1]), shard.keys[1])
                packed += b"".join(slots)
                num += 1
            requests.append((shard, packed, num))
        numbers = sorted({0, *rows_of} if charge is not None else rows_of)
        answers = exchange(requests, deadline, who="a sample", account=self._account_server)
        found: list[Record | None] = [None] * len(picks)
        for number, skip, answer in zip(numbers, with_charge, answers, strict=True):
            if skip and answer[0][0] != b"ok":
                return None
            for row, data in zip(rows_of.get(number, []), answer[skip] if len(answer) > skip else (), strict=True):
                found[row] = None if data is None else self._decode(number, picks[row][1], data, deadline)
        return found

    def _decode(self, number: int, slot: int, data: bytes, deadline: Deadline) -> Record | None:
        """A record, or None for one that cannot be read, which is then taken out and counted."""
        mirror = self._mirrors[number]
        try:
            record = decode(data)
            layout = mirror.state.get("layout", record.layout)
            if record.layout != layout:
                raise RecordError(f"a record of {record.layout} among {layout}")
        except RecordError as error:
            logger.warning("refused the record in slot %d of %s: %s", slot, mirror.shard.where, error)
            self._exchange(mirror, mirror.shard.call("drop", mirror.incarnation, slot, data), deadline, "a sample")
            return None
        return record

    # -- the limiter, settings, statistics ----------------------------------------------------------------------------

    def can_sample(self, num: int) -> bool:
        """See `ReplayBuffer.can_sample`."""
        with self._lock:
            self._sync(Deadline(QUICK_S))
            return self._limiter(num).can_sample(num)

    def can_insert(self, num: int) -> bool:
        """See `ReplayBuffer.can_insert`."""
        with self._lock:
            self._sync(Deadline(QUICK_S))
            return self._limiter(num).can_insert(num)

    def set_newest_version(self, version: int) -> None:
        """See `ReplayBuffer.set_newest_version`."""
        with self._lock:
            self._newest = max(self._newest, version)
            self._write_settings({"newest": str(version)}, Deadline(QUICK_S))

    def configure(self, **changes: Any) -> None:
        """See `ReplayBuffer.configure`."""
        with self._lock:
            self._sync(Deadline(QUICK_S))
            settings = self._settings().changed(**changes)
            written = {name: _text(getattr(settings, name)) for name in changes}
            self._changes.update(written)
            self._write_settings(written, Deadline(QUICK_S))

    def stats(self) -> ReplayStats:
        """See `ReplayBuffer.stats`."""
        deadline = Deadline(QUICK_S)
        with self._lock:
            self._sync(deadline)
            counts: dict[str, int] = {}
            for mirror in self._mirrors:
                packed = b"*2\r\n$7\r\nHGETALL\r\n$%d\r\n%b\r\n" % (len(mirror.shard.keys[4]), mirror.shard.keys[4])
                flat = self._exchange(mirror, packed, deadline, "statistics")[0]
                for key, value in zip(flat[::2], flat[1::2], strict=True):
                    counts[key.decode()] = counts.get(key.decode(), 0) + int(value)
            limiter = self._limiter(0)
            first = self._mirrors[0]

            def total(name: str) -> int:
                return sum(mirror.number(name) for mirror in self._mirrors)

            def by(kind: str) -> dict[int, int]:
                return {int(k[2:]): v for k, v in sorted(counts.items()) if k.startswith(kind)}

            return ReplayStats(
                size=total("size"),
                size_bytes=total("bytes"),
                capacity=total("capacity"),
                num_inserted=total("inserted"),
                num_sampled=limiter.num_sampled,
                num_refused=total("refused"),
                newest_version=self._newest_version(),
                by_source={StateSource(k): v for k, v in by("s:").items()},
                by_version=by("v:"),
                by_timestep=by("t:"),
                sampled_by_source={},
                capacity_bytes=total("capacity_bytes"),
                settings={n: getattr(limiter.settings, n) for n in limiter.settings.__slots__},
                cursor=limiter.cursor,
                cursor_bounds=(limiter.min_diff, limiter.max_diff),
                waits_s={k[5:]: int(v) / 1000 for k, v in first.state.items() if k.startswith("wait:")},
                incarnation=first.incarnation,
                num_shards=len(self._mirrors),
            )

    def close(self) -> None:
        """See `ReplayBuffer.close`."""
        for mirror in self._mirrors:
            mirror.shard.close()

    # -- keeping up with the shards -----------------------------------------------------------------------------------

    def _exchange(self, mirror: _Mirror, packed: bytes, deadline: Deadline, who: str) -> list[Any]:
        return exchange([(mirror.shard, packed, 1)], deadline, who=who, account=self._account_server)[0]

    def _open(self, mirror: _Mirror, deadline: Deadline) -> None:
        """Open a shard, or make it where the server has none: at first, or after it lost its data."""
        number = len(self._mirrors)
        config = self._config
        fields = {
            "capacity": str(max(1, config.capacity // number)),
            "capacity_bytes": str(max(1, config.capacity_bytes // number)),
            "removal": config.removal,
            "samples_per_insert": repr(config.samples_per_insert),
            "min_size": str(config.min_size),
            "error_buffer": repr(config.error_buffer),
            "max_staleness": _text(config.max_staleness),
            **self._changes,
        }
        args = [text for pair in fields.items() for text in pair]
        with self._lock:
            packed = mirror.shard.call("init", "i-" + secrets.token_hex(8), *args)
            flat = self._exchange(mirror, packed, deadline, "opening the buffer")[0]
            mirror.state = _pairs(flat)
            incarnation = mirror.state["incarnation"]
            if mirror.incarnation not in ("", incarnation):
                logger.warning(
                    "replay server %s lost its data (incarnation %s, was %s); the run refills it",
                    mirror.shard.where,
                    incarnation,
                    mirror.incarnation,
                )
            mirror.incarnation = incarnation
            mirror.ops = -1
            if mirror is self._mirrors[0] and self._newest > mirror.number("newest"):
                self._write_settings({"newest": str(self._newest)}, deadline)

    def _check_bounds(self) -> None:
        """Raise ConfigError where the buffer of this run exists with other bounds."""
        number = len(self._mirrors)
        for name in ("capacity", "capacity_bytes", "removal"):
            wanted = getattr(self._config, name)
            wanted = str(wanted if name == "removal" else max(1, wanted // number))
            found = self._mirrors[0].state[name]
            if found != wanted:
                raise ConfigError(
                    f"replay.{name}: {getattr(self._config, name)}, but this run's buffer exists with "
                    f"{found if name == 'removal' else int(found) * number}; keep that, or choose another run.name"
                )

    def _sync(self, deadline: Deadline) -> None:
        """Bring every mirror up to date."""
        with self._lock:
            todo = list(self._mirrors)
            while todo:
                requests = []
                for mirror in todo:
                    if mirror.epoch != mirror.shard.epoch:
                        mirror.ops = -1
                    mirror.epoch = mirror.shard.epoch
                    requests.append((mirror.shard, mirror.shard.call("sync", mirror.incarnation, mirror.ops), 1))
                answers = exchange(requests, deadline, who="reading the buffer", account=self._account_server)
                again = []
                for mirror, (answer,) in zip(todo, answers, strict=True):
                    if answer[0] == b"reset":
                        self._open(mirror, deadline)
                        again.append(mirror)
                        continue
                    if answer[0] == b"all":
                        mirror.index.load(np.frombuffer(answer[2], META_DTYPE))
                    elif answer[2]:
                        mirror.index.apply(np.frombuffer(answer[2], LOG_DTYPE))
                    mirror.ops = int(answer[1])
                    mirror.state = _pairs(answer[3])
                todo = again

    def _write_settings(self, fields: dict[str, str], deadline: Deadline) -> None:
        first = self._mirrors[0]
        args = [text for pair in fields.items() for text in pair]
        while True:
            packed = first.shard.call("configure", first.incarnation, *args)
            if self._exchange(first, packed, deadline, "changing settings")[0][0] == b"ok":
                first.state.update({k: v for k, v in fields.items() if k != "newest"})
                return
            self._open(first, deadline)

    def _settings(self) -> LimiterSettings:
        state = self._mirrors[0].state
        staleness = state.get("max_staleness", "")
        return LimiterSettings(
            samples_per_insert=float(state["samples_per_insert"]),
            min_size=int(state["min_size"]),
            error_buffer=float(state["error_buffer"]),
            max_staleness=int(staleness) if staleness else None,
        )

    def _newest_version(self) -> int:
        return max(self._newest, self._mirrors[0].number("newest"))

    def _limiter(self, _num: int) -> RateLimiter:
        first = self._mirrors[0]
        return RateLimiter(
            self._settings(),
            num_inserted=first.number("offered"),
            num_sampled=first.number("charged"),
            size=sum(mirror.number("size") for mirror in self._mirrors),
        )

    def _count_refused(self, num: int) -> None:
        mirror = self._mirrors[0]
        key = mirror.shard.keys[0]
        packed = b"*4\r\n$7\r\nHINCRBY\r\n$%d\r\n%b\r\n$7\r\nrefused\r\n$%d\r\n%d\r\n" % (
            len(key),
            key,
            len(str(num)),
            num,
        )
        self._exchange(mirror, packed, Deadline(QUICK_S), "counting a refusal")

    def _account_server(self, whom: str, seconds: float) -> None:
        with self._lock:
            self._waits[f"client for {whom}"] = self._waits.get(f"client for {whom}", 0.0) + seconds

    def _account(self, what: str, seconds: float, *, flush: bool = False) -> None:
        """Note a wait; the shard hears of it about once a second."""
        with self._lock:
            self._waits[what] = self._waits.get(what, 0.0) + seconds
            if not flush and sum(self._waits.values()) < ACCOUNT_EVERY_S:
                return
            waits, self._waits = self._waits, {}
            args = [text for name, s in waits.items() for text in (name, str(round(s * 1000)))]
            first = self._mirrors[0]
            packed = first.shard.call("account", first.incarnation, "client", "0", *args)
            self._exchange(first, packed, Deadline(QUICK_S), "noting a wait")


def _text(value: float | None) -> str:
    return "" if value is None else repr(value)


def _pairs(flat: Sequence[bytes]) -> dict[str, str]:
    return {k.decode(): v.decode() for k, v in zip(flat[::2], flat[1::2], strict=True)}
