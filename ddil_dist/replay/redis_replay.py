"""The replay buffer in Redis: many processes insert and sample, each as if it were alone.

Inserting is one script call a batch. Sampling follows the shards' logs into a mirror of what lies where (`view.py`),
chooses slots there, and fetches them with one HMGET a shard (`fetch.py`); a record carries its own source, timestep
and version, so one that was overwritten in between is judged by what it is and, if it does not fit, drawn again. The
first shard keeps the rate limiter, the settings and a note of the newest weights for all.
"""

from __future__ import annotations

import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from threading import Event
from typing import Any, Final

import numpy as np

from ddil_dist.config import RedisConfig, ReplayConfig
from ddil_dist.errors import ConfigError, RecordError, ReplayError, WaitTimeoutError
from ddil_dist.replay.accounts import WaitAccount
from ddil_dist.replay.admission import admit, wait_for_samples
from ddil_dist.replay.buffer import actor_of, check_draws, fits
from ddil_dist.replay.codec import Codec, Columns, Encoded, Rows
from ddil_dist.replay.fetch import Buffers, receive
from ddil_dist.replay.reader import read_stats
from ddil_dist.replay.shard import Request, exchange, open_shards, pack
from ddil_dist.replay.view import Mirror, View
from ddil_dist.replay.waits import Deadline
from ddil_dist.states import States
from ddil_dist.types import Draw, ReplayStats, WeightsVersion

logger = logging.getLogger(__name__)

QUICK_TRIES: Final = 3
"""Of a server's answer, within the deadline of the small exchanges that have none of their own: statistics, settings.
"""


@dataclass(slots=True)
class Landing:
    """Where the records of one shard go: row by row into the sample, if they are what was asked for.

    targets    (row, slot) by the record's number in the answer.
    wanted     the draw of every row of the sample; newest, staleness: what ages are judged by.
    layout     of all records of the run.
    refused    (slot, bytes, why) of records that cannot be read.
    """

    targets: list[tuple[int, int]]
    wanted: Sequence[Draw]
    newest: int
    staleness: int | None
    layout: str
    columns: Columns
    codec: Codec
    refused: list[tuple[int, bytes, str]] = field(default_factory=list)

    def take(self, number: int, data: memoryview | None) -> None:
        """Put a record into its row; one that is not there, or not what was asked for, leaves its row missing."""
        if data is None:
            return
        row, slot = self.targets[number]
        try:
            record = self.codec.decode(data)
            if not self.columns.like(record) and record.layout != self.layout:
                raise RecordError(f"a record of {record.layout} among {self.layout}")
        except RecordError as error:
            self.refused.append((slot, bytes(data), str(error)))
            return
        if fits(record, self.wanted[row], newest=self.newest, staleness=self.staleness):
            self.columns.put(row, record)


class RedisReplay:
    """`ReplayBuffer` on one or more Redis servers. Safe to share between threads.

    run     keeps runs on one server apart.
    seed    of this client's draws; give every client its own.
    kind    what states it holds.
    """

    def __init__(
        self,
        config: ReplayConfig,
        redis: RedisConfig | str,
        *,
        run: str,
        seed: int,
        kind: type[States[Any]] = States,
    ) -> None:
        redis_config = RedisConfig(url=redis) if isinstance(redis, str) else redis
        self._config = config
        self._quick_s = QUICK_TRIES * redis_config.answer_timeout_s
        self.codec = Codec(kind)
        self._waits = WaitAccount()
        shards = open_shards(redis_config, run, codec=self.codec)
        self._view = View(shards, config, self.codec, account=self._waits.note_exchange)
        self._waits.attach(self._view.first)
        self._rng = np.random.default_rng(seed)
        self._buffers = Buffers()
        self._closed = Event()
        deadline = Deadline(self._quick_s)
        for mirror in self._view.mirrors:
            self._view.open(mirror, deadline)
        self._view.check_bounds()

    # -- inserting ----------------------------------------------------------------------------------------------------

    def insert(self, states: States[Rows], *, writer: str, batch_id: int, timeout_s: float) -> bool:
        """See `ReplayBuffer.insert`."""
        if not len(states):
            raise ConfigError("an insert of no states: give at least one")
        deadline = Deadline(timeout_s, cut=self._closed)
        encoded = self._encode(states)
        view = self._view
        mirror = view.mirrors[batch_id % len(view.mirrors)]
        view.limiter.check_insert(len(states))
        if len(view.mirrors) > 1:
            admit(view, self._waits, writer, batch_id, len(states), deadline)
        while True:
            packed = self._pack_insert(mirror, writer, batch_id, encoded)
            answer = view.exchange(mirror, packed, deadline, "an insert")
            if answer[0] in (b"stored", b"duplicate"):
                self._waits.report("insert")
                return bool(answer[0] == b"stored")
            if answer[0] == b"reset":
                view.open(mirror, deadline)
            elif answer[0] == b"wait":
                wait_for_samples(view, self._waits, len(states), deadline)
            elif answer[0] == b"layout":
                self._view.count_refused(Deadline(self._quick_s))
                raise RecordError(
                    f"states are {encoded.layout}, this run's are {answer[1].decode()}: one buffer holds one dtype and "
                    "shape; choose another run.name for another latent"
                )
            else:
                raise ReplayError(
                    f"batch {batch_id} of writer {writer!r} is 32 or more behind its newest, {answer[1].decode()}: "
                    "whether it was stored is no longer known; number batches upwards"
                )

    def _encode(self, states: States[Rows]) -> Encoded:
        """The records; a bad state is counted and raises RecordError."""
        try:
            encoded = self.codec.encode(states)
            largest = int(encoded.meta["size"].max())
            if largest > self._config.capacity_bytes // len(self._view.mirrors):
                raise RecordError(f"a record of {largest} bytes exceeds a shard's share of replay.capacity_bytes")
        except RecordError:
            self._view.count_refused(Deadline(self._quick_s))
            raise
        return encoded

    def _pack_insert(self, mirror: Mirror, writer: str, batch_id: int, encoded: Encoded) -> bytes:
        """The insert script's call; the join is the one copy that a latent goes through."""
        keys = mirror.shard.keys
        limited = 1 if len(self._view.mirrors) == 1 else 0
        words = (mirror.incarnation, writer, batch_id, limited, secrets.randbits(31), encoded.layout, actor_of(writer))
        head = [b"EVALSHA", mirror.shard.digest("insert"), b"%d" % len(keys), *keys, *(str(w).encode() for w in words)]
        head.append(encoded.meta.tobytes())
        buffers: list[Any] = [b"*%d\r\n" % (len(head) + len(encoded.records))]
        buffers += [b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in head]
        for parts, size in encoded.records:
            buffers.append(b"$%d\r\n" % size)
            buffers += parts
            buffers.append(b"\r\n")
        return b"".join(buffers)

    # -- sampling -----------------------------------------------------------------------------------------------------

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> States[Rows]:
        """See `ReplayBuffer.sample`."""
        total = check_draws(draws)
        deadline = Deadline(timeout_s, cut=self._closed)
        self._view.limiter.check_sample(total)
        wanted = [draw for draw in draws for _ in range(draw.num)]
        columns = Columns(total, self.codec)
        newest = self._draw(draws, range(total), wanted, columns, deadline, charge=total)
        while missing := columns.missing():  # overwritten before they were read, or refused
            if deadline.left_s <= 0:
                raise WaitTimeoutError(
                    f"a sample of {total} states took {deadline.waited_s:.1f} s and {len(missing)} are missing: "
                    "records are overwritten faster than they are read; raise replay.capacity"
                )
            again = [replace(wanted[row], num=1) for row in missing]
            newest = self._draw(again, missing, wanted, columns, deadline, charge=0)
        self._waits.report("sample")
        return columns.build(newest)

    def _draw(
        self,
        draws: Sequence[Draw],
        rows: Sequence[int],
        wanted: Sequence[Draw],
        columns: Columns,
        deadline: Deadline,
        *,
        charge: int,
    ) -> int:
        """Choose slots for the rows and fetch what lies there; returns the newest version at the choice.

        Waits for the limiter (unless `charge`, the samples to count, is 0) and for states that fit every draw.
        """
        view = self._view
        while True:
            with view.lock:
                view.sync(deadline, contents=True)
                limiter, newest, staleness = view.limiter, view.newest, view.settings.max_staleness
                reason, what = view.missing(draws), "sample for states"
                if charge and not limiter.can_sample(charge):
                    reason, what = limiter.why_no_sample(charge), "sample for inserts"
                if not reason:
                    picks, by_source, fresh = view.choose(draws, self._rng)
            if not reason:
                landings: dict[int, Landing] = {}
                layout = view.layout
                for row, (number, slot) in zip(rows, picks, strict=True):
                    if number not in landings:
                        landings[number] = Landing([], wanted, newest, staleness, layout, columns, self.codec)
                    landings[number].targets.append((row, slot))
                sources = [word for source, n in enumerate(by_source.tolist()) if n for word in (source, n)]
                fetched = False
                try:
                    fetched = self._fetch(
                        landings, [charge, limiter.size] if charge else None, sources, fresh, deadline
                    )
                finally:
                    if not fetched:
                        view.forget_used(fresh)
                if fetched:
                    return newest
                columns.clear()
                reason, what = "for inserts: other clients sampled first", "sample for inserts"
            if not self._waits.pause(deadline, what):
                raise WaitTimeoutError(f"a sample of {len(rows)} states waited {deadline.waited_s:.1f} s {reason}")

    def _fetch(
        self,
        landings: dict[int, Landing],
        charge: Sequence[int] | None,
        sources: Sequence[int],
        fresh: dict[int, bytes],
        deadline: Deadline,
    ) -> bool:
        """Fetch what the landings of the shards wait for; False where the limiter refuses the charge by now.

        Each shard gets one HMGET; before it the first one the charge, and any other a word of the slots that are fresh,
        which nobody may have sampled before. On those others they count as sampled also where the charge is refused.
        """
        requests: list[Request] = []
        numbers = sorted(landings if charge is None else {0, *landings})
        for number in numbers:
            mirror, landing, slots = self._view.mirrors[number], landings.get(number), fresh.get(number, b"")
            packed, told = b"", bool(slots)
            if charge is not None and number == 0:
                name = secrets.token_hex(8)
                packed = mirror.shard.call("charge", mirror.incarnation, name, *charge, slots, *sources)
                told = True
            elif told:
                packed = mirror.shard.call("use", mirror.incarnation, slots)
            if landing is not None:
                packed += pack(b"HMGET", mirror.shard.keys[1], *(slot for _, slot in landing.targets))
            read = partial(self._receive, landing=landing, told=told)
            requests.append((mirror.shard, packed, read))
        answers = exchange(requests, deadline, who="a sample", account=self._waits.note_exchange)
        for number, landing in landings.items():
            self._drop(self._view.mirrors[number], landing, deadline)
        return all(answer == [1] for answer in answers)

    def _receive(self, connection: Any, *, landing: Landing | None, told: bool) -> list[int]:
        """Read one shard's answers; what the script answered that was told of the sample, 1 where none was."""
        if landing is None:
            return [receive(connection, self._buffers, _unexpected, told=told, fetched=False)]
        landing.refused.clear()  # of a try that broke
        return [receive(connection, self._buffers, landing.take, told=told, fetched=True)]

    def _drop(self, mirror: Mirror, landing: Landing, deadline: Deadline) -> None:
        """Take records that cannot be read out of the buffer; they are counted."""
        for slot, data, why in landing.refused:
            logger.warning("refused the record in slot %d of %s: %s", slot, mirror.shard.where, why)
            packed = mirror.shard.call("drop", mirror.incarnation, slot, data)
            self._view.exchange(mirror, packed, deadline, "refusing a record")

    # -- the limiter, settings, statistics ----------------------------------------------------------------------------

    def can_sample(self, num: int) -> bool:
        """See `ReplayBuffer.can_sample`."""
        with self._view.lock:
            self._view.sync(Deadline(self._quick_s), contents=False)
            return self._view.limiter.can_sample(num)

    def can_insert(self, num: int) -> bool:
        """See `ReplayBuffer.can_insert`."""
        with self._view.lock:
            self._view.sync(Deadline(self._quick_s), contents=False)
            return self._view.limiter.can_insert(num)

    def note_weights(self, newest: WeightsVersion) -> None:
        """See `ReplayBuffer.note_weights`."""
        self._view.note_weights(newest, Deadline(self._quick_s))

    def forget_weights(self) -> None:
        """The weight store is a new one, and holds none: what an earlier one held is not the newest any more."""
        self._view.forget_weights(Deadline(self._quick_s))

    def configure(self, **changes: Any) -> None:
        """See `ReplayBuffer.configure`."""
        self._view.configure(changes, Deadline(self._quick_s))

    def stats(self, *, timeout_s: float | None = None) -> ReplayStats:
        """See `ReplayBuffer.stats`."""
        deadline = Deadline(self._quick_s if timeout_s is None else timeout_s)
        self._waits.report(None, now=True)
        while True:
            stats = read_stats([mirror.shard for mirror in self._view.mirrors], deadline)
            if stats is not None:
                return stats
            self._view.sync(deadline, contents=False)  # makes again what the server lost

    def close(self) -> None:
        """See `ReplayBuffer.close`. Whoever waits in another thread is told so by ReplayError."""
        self._closed.set()
        for mirror in self._view.mirrors:
            mirror.shard.close()


def _unexpected(number: int, _data: memoryview | None) -> None:
    raise AssertionError(f"record {number} was not asked for")
