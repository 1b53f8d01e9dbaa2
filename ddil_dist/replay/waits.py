"""Waiting with a deadline: how long is left, how long to pause, and an account of who waited for what."""

from __future__ import annotations

import time
from threading import Event
from typing import Final

from ddil_dist.errors import ReplayError

FIRST_PAUSE_S: Final = 0.002
LONGEST_PAUSE_S: Final = 0.1
SLOW_PAUSE_S: Final = 0.5


class Deadline:
    """A point in time that a wait must not pass.

    deadline = Deadline(timeout_s)
    while not ready():
        if not deadline.pause():
            raise WaitTimeoutError(f"... waited {deadline.waited_s:.1f} s ...")
    """

    def __init__(self, timeout_s: float, *, cut: Event | None = None) -> None:
        """cut: once it is set, the next pause raises ReplayError instead of ending."""
        self._begin = time.monotonic()
        self._cut = Event() if cut is None else cut
        self.timeout_s = timeout_s
        self._pause_s = FIRST_PAUSE_S

    @property
    def waited_s(self) -> float:
        """Seconds since the wait began."""
        return time.monotonic() - self._begin

    @property
    def left_s(self) -> float:
        """Seconds that are left, not below 0."""
        return max(0.0, self.timeout_s - self.waited_s)

    def pause(self, *, slowly: bool = False) -> bool:
        """Sleep a little, longer each time (2 ms to 0.1 s; slowly: 0.5 s); False where the deadline has passed."""
        left_s = self.left_s
        if left_s <= 0:
            return False
        if self._cut.wait(min(SLOW_PAUSE_S if slowly else self._pause_s, left_s)):
            raise ReplayError(f"the replay buffer was closed after a wait of {self.waited_s:.1f} s for it")
        self._pause_s = min(self._pause_s * 1.5, LONGEST_PAUSE_S)
        return True
