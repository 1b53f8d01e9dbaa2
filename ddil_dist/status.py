"""What a run's own process is at where no Redis tells of it, and whether it is asked to stop: files in its directory.

`.status.json` is written by whoever holds the run's lock: while a run trains in one process, and at the end of any
run, when its student is exported and evaluated. An end that was not whole stays written there until the run is ended
whole. `.stop` asks that process to stop in good order. Imports nothing heavy.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from ddil_dist.locks import LOCK_FILE, hold_lock, is_held

STATUS_FILE = ".status.json"
STOP_FILE = ".stop"
WRITE_EVERY_S = 1.0


@dataclass(frozen=True)
class Status:
    """What the process is at, or how it left the run's end.

    phase        training (in one process), export, evaluation; failed or stopped: what has become of the evaluation.
    policy       whose images are being made.
    done, total  updates while it trains, images of all policies while it evaluates.
    left_s       seconds left, as far as known.
    reason       why the evaluation failed.
    unmeasured   policies that a stopped evaluation has not measured.
    closes       whether the run ends with it; False: a student that was there before is evaluated again.
    time         seconds since 1970.
    """

    phase: Literal["training", "export", "evaluation", "failed", "stopped"]
    policy: str = ""
    done: int = 0
    total: int = 0
    left_s: float | None = None
    reason: str = ""
    unmeasured: tuple[str, ...] = ()
    closes: bool = True
    time: float = 0.0

    def __str__(self) -> str:
        if self.phase == "training":
            return f"training in one process, update {self.done} of {self.total}"
        if self.phase == "export":
            return "the student is being exported and verified"
        if self.phase == "evaluation":
            return f"evaluation of {self.policy}, {self.done} of {self.total} images" if self.policy else "evaluation"
        if self.phase == "failed":
            return f"its evaluation failed: {self.reason}"
        return f"its evaluation was stopped, and has not measured: {'; '.join(self.unmeasured)}"


class StatusFile:
    """The status of a run, as the process that holds its lock writes it. A full disk costs the status, not the run."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATUS_FILE
        self._shown: Status | None = None

    def show(self, status: Status) -> None:
        """Write the status, at once; while only its numbers change, once in `WRITE_EVERY_S`."""
        now, shown = time.time(), self._shown
        alike = shown is not None and (shown.phase, shown.policy) == (status.phase, status.policy)
        if shown is not None and alike and now - shown.time < WRITE_EVERY_S:
            return
        self._shown = replace(status, time=now)
        partial = self._path.with_name(self._path.name + ".partial")
        with suppress(OSError):
            partial.write_text(json.dumps(asdict(self._shown)), encoding="utf-8")
            partial.replace(self._path)

    def clear(self) -> None:
        """There is nothing to tell any more."""
        self._shown = None
        self._path.unlink(missing_ok=True)


def read_status(directory: Path) -> Status | None:
    """What was written last; None where nothing is, or by another version."""
    try:
        raw = json.loads((directory / STATUS_FILE).read_text(encoding="utf-8"))
        return Status(**{**raw, "unmeasured": tuple(raw["unmeasured"])})
    except (OSError, ValueError, TypeError, KeyError):
        return None


def living_status(directory: Path) -> Status | None:
    """What the run's process is at now; None where there is none, or Redis tells of it."""
    status = read_status(directory)
    going = status is not None and status.phase in ("training", "export", "evaluation")
    return status if going and has_process(directory) else None


def has_process(directory: Path) -> bool:
    """Whether a launcher or an evaluation of the run is going on."""
    return is_held(directory / LOCK_FILE)


def ask_to_stop(directory: Path) -> None:
    """Ask the run's process to stop in good order."""
    (directory / STOP_FILE).touch()


def is_asked_to_stop(directory: Path) -> bool:
    """Whether it has been asked."""
    return (directory / STOP_FILE).exists()


@contextmanager
def own_run(directory: Path) -> Iterator[None]:
    """Hold the run's lock; a request to stop that is made within the block is for this process, and nobody else.

    Raises ConfigError as `hold_lock` does.
    """
    stop = directory / STOP_FILE
    with hold_lock(directory, LOCK_FILE):
        stop.unlink(missing_ok=True)
        try:
            yield
        finally:
            stop.unlink(missing_ok=True)
