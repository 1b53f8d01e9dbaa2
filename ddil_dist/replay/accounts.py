"""The books of the Redis buffer: who waited for whom, and for how long."""

from __future__ import annotations

import secrets
import threading
import time
from typing import Final

from ddil_dist.errors import WaitTimeoutError
from ddil_dist.replay.shard import exchange
from ddil_dist.replay.view import Mirror
from ddil_dist.replay.waits import Deadline

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

    def pause(self, deadline: Deadline, what: str) -> bool:
        """Wait a little and note it; False where the deadline has passed."""
        begin_s = deadline.waited_s
        more = deadline.pause()
        self.note(what, deadline.waited_s - begin_s)
        self.report(what.split()[0], now=not more)
        return more

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
