"""Checkpoints off the training thread: copied to the host's memory at once, written by a thread of their own.

One is written at a time. One that cannot be written, on a full disk mostly, ends nothing before the run's end: it is
said, and the next is tried. Where the host has no memory for a whole copy, training waits while parts are copied and
written one after another.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Final

from torch import Tensor

from ddil_dist.errors import CheckpointError
from ddil_dist.journal import Journal
from learner.checkpoint import CheckpointStore, Parts

LOOK_S: Final = 0.5
TELL_S: Final = 10.0
MEMORY_MARGIN: Final = 1.2
"""Times a checkpoint's size that the host's memory must have free for a copy."""

logger = logging.getLogger(__name__)


class CheckpointWriter:
    """Writes the checkpoints of rank 0.

    background    in a thread; else `write` returns when it is done.
    silent_s      a disk that takes nothing for so long, while it is waited for, has failed.
    on_progress   told the update, the bytes written and about how many there are, LOOK_S apart, while one is waited
                  for: by the thread that waits, as telling may take its time.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        background: bool = False,
        silent_s: float = 120.0,
        journal: Journal | None = None,
        on_progress: Callable[[int, int, int], None] = lambda update, written, total: None,
    ) -> None:
        self._store = store
        self._background = background
        self._silent_s = silent_s
        self._journal = journal
        self._on_progress = on_progress
        self._thread: threading.Thread | None = None
        self._update = self._written = self._total = 0
        self._failure: BaseException | None = None

    @property
    def is_busy(self) -> bool:
        """Whether a checkpoint is on its way."""
        return self._thread is not None and self._thread.is_alive()

    def write(self, update: int, parts: Parts, *, size_bytes: int) -> None:
        """Write a checkpoint, once the one before is there. parts: see `CheckpointStore.write`; size_bytes: about.

        Every part has been asked when it returns.
        """
        begun = time.monotonic()
        self._await()
        if not (self._background and _has_room(size_bytes)):
            self._write(update, parts, size_bytes, begun, None)
            return
        copies = {name: part() for name, part in parts.items()}
        whole = {name: _handing_over(copies, name) for name in parts}
        arguments = (update, whole, size_bytes, begun, time.monotonic() - begun)
        self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
        self._thread.start()

    def settle(self) -> None:
        """Wait for the checkpoint that is on its way. Raises CheckpointError if the last one could not be written."""
        self._await()
        if self._failure is not None:
            raise self._failure

    def close(self) -> None:
        """Wait for the checkpoint that is on its way, whatever becomes of it."""
        with suppress(CheckpointError):
            self._await()

    def _await(self) -> None:
        """The disk may take as long as it likes, while it takes anything."""
        written, moved = self._written, time.monotonic()
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(LOOK_S)
            self._tell()
            if self._written != written:
                written, moved = self._written, time.monotonic()
            elif time.monotonic() - moved > self._silent_s:
                raise CheckpointError(
                    f"{self._store.directory}: the disk has taken no byte of a checkpoint for {self._silent_s:g} s "
                    "(deadlines.learner_stop_s); look after it, and run again to resume"
                )
        if self._failure is not None and not isinstance(self._failure, CheckpointError):
            raise self._failure  # our own bug

    def _tell(self) -> None:
        self._on_progress(self._update, self._written, max(self._total, self._written))

    def _write(self, update: int, parts: Parts, size_bytes: int, begun: float, held_s: float | None) -> None:
        self._update, self._written, self._total = update, 0, size_bytes
        self._failure = None

        told = time.monotonic()

        def on_bytes(num: int) -> None:
            nonlocal told
            self._written += num
            if held_s is None and time.monotonic() - told > TELL_S:  # training waits for this very thread
                self._tell()
                told = time.monotonic()

        try:
            self._store.write(update, parts, on_bytes=on_bytes)
        except CheckpointError as error:
            self._failure = error
            logger.warning("%s; the next checkpoint is tried when it is due", error)
            return
        except BaseException as error:  # raised in the training thread
            self._failure = error
            return
        seconds = time.monotonic() - begun
        if self._journal is not None:
            fields = {"size_bytes": self._written, "seconds": seconds}
            self._journal.write("checkpoint", update=update, held_s=seconds if held_s is None else held_s, **fields)


def _handing_over(copies: dict[str, Mapping[str, Tensor]], name: str) -> Callable[[], Mapping[str, Tensor]]:
    """A part that is let go of once it is written."""
    return lambda: copies.pop(name)


def _has_room(size_bytes: int) -> bool:
    free = free_host_memory()
    return free is None or free > MEMORY_MARGIN * size_bytes


def free_host_memory(root: Path = Path("/")) -> int | None:
    """Bytes that this process could still have, of the machine's memory and of its container's; None: unknown."""
    found = []
    try:
        found.append(1024 * _numbers(root / "proc/meminfo")["MemAvailable:"])
        group = root / "sys/fs/cgroup"
        limit = (group / "memory.max").read_text(encoding="utf-8").strip()
        if limit != "max":
            used = int((group / "memory.current").read_text(encoding="utf-8"))
            found.append(int(limit) - used + _numbers(group / "memory.stat")["inactive_file"])
    except (OSError, ValueError, KeyError):
        pass  # another system, or another kind of container
    return min(found, default=None)


def _numbers(path: Path) -> dict[str, int]:
    """A file of lines of a name and a number."""
    words = (line.split() for line in path.read_text(encoding="utf-8").splitlines())
    return {line[0]: int(line[1]) for line in words}
