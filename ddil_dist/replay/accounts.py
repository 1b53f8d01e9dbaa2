"""The books of the Redis buffer: who waited for whom, and the statistics of all shards together."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Final

from ddil_dist.errors import WaitTimeoutError
from ddil_dist.replay.shard import exchange, pack
from ddil_dist.replay.view import Mirror, View, pairs
from ddil_dist.replay.waits import Deadline
from ddil_dist.types import ReplayStats, StateSource

REPORT_EVERY_S: Final = 1.0


class WaitAccount:
    """Adds up this client's waits by name, such as "sample for inserts", and tells the first shard once a second.

    A report that cannot be delivered is kept for the next one: books must not hold up a sample or an insert.
    """

    def __init__(self) -> None:
        self._client = secrets.token_hex(6)
        self._lock = threading.Lock()
        self._waits_s: dict[str, float] = {}
        self._reported = 0.0
        self._operation: str | None = None
        self._mirror: Mirror | None = None

    def attach(self, mirror: Mirror) -> None:
        """Name the shard that keeps the books."""
        self._mirror = mirror

    def note(self, what: str, seconds: float) -> None:
        """Add a wait, named "sample|insert for whom"."""
        with self._lock:
            self._waits_s[what] = self._waits_s.get(what, 0.0) + seconds

    def note_exchange(self, who: str, whom: str, seconds: float) -> None:
        """Add a wait for a server or its memory."""
        self.note(f"{'insert' if who == 'an insert' else 'sample'} for {whom}", seconds)

    def report(self, operation: str | None, *, now: bool = False) -> None:
        """Say that this client samples or inserts, and what it waited for; nothing where it did so just before."""
        mirror = self._mirror
        assert mirror is not None, "attach first"
        with self._lock:
            if not now and time.monotonic() - self._reported < REPORT_EVERY_S:
                return
            self._reported = time.monotonic()
            self._operation = operation or self._operation
            waits, self._waits_s = self._waits_s, {}
        if self._operation is None and not waits:
            return
        words = [word for what, s in waits.items() for word in (what, round(s * 1000))]
        client = f"{self._operation or 'other'}:{self._client}"
        try:
            packed = mirror.shard.call("account", mirror.incarnation, client, *words)
            exchange([(mirror.shard, packed, 1)], Deadline(0.0), who="books")
        except WaitTimeoutError:
            with self._lock:
                for what, seconds in waits.items():
                    self._waits_s[what] = self._waits_s.get(what, 0.0) + seconds


def read_stats(view: View, deadline: Deadline) -> ReplayStats:
    """What is live and what was done, over all shards."""
    view.sync(deadline, contents=False)
    counts: dict[str, int] = {}
    for mirror in view.mirrors:
        flat = view.exchange(mirror, pack(b"HGETALL", mirror.shard.keys[4]), deadline, "statistics")
        for key, value in pairs(flat).items():
            counts[key] = counts.get(key, 0) + int(value)
    clients = view.exchange(view.first, pack(b"ZRANGE", view.first.shard.keys[7], 0, -1), deadline, "statistics")
    limiter, state = view.limiter, view.first.state

    def by(kind: str) -> dict[int, int]:
        return dict(sorted((int(key[2:]), num) for key, num in counts.items() if key.startswith(kind)))

    return ReplayStats(
        size=view.total("size"),
        size_bytes=view.total("bytes"),
        capacity=view.total("capacity"),
        num_inserted=view.total("inserted"),
        num_sampled=limiter.num_sampled,
        num_refused=view.total("refused"),
        newest_version=view.newest,
        by_source={StateSource(key): num for key, num in by("s:").items()},
        by_version=by("v:"),
        by_timestep=by("t:"),
        sampled_by_source={
            source: view.first.number(f"sampled:{int(source)}")
            for source in StateSource
            if f"sampled:{int(source)}" in state
        },
        capacity_bytes=view.total("capacity_bytes"),
        settings={name: getattr(limiter.settings, name) for name in limiter.settings.__slots__},
        cursor=limiter.cursor,
        cursor_bounds=(limiter.min_diff, limiter.max_diff),
        waits_s={name[5:]: int(ms) / 1000 for name, ms in sorted(state.items()) if name.startswith("wait:")},
        incarnation=view.first.incarnation,
        num_shards=len(view.mirrors),
        num_samplers=sum(client.startswith(b"sample:") for client in clients),
        num_inserters=sum(client.startswith(b"insert:") for client in clients),
    )
