"""Locks in a run's directory, which keep two processes apart and end with their holder at the latest."""

from __future__ import annotations

import errno
import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ddil_dist.errors import ConfigError

LOCK_FILE = ".lock"
"""Held by the launcher, and by whoever evaluates the run."""
TRAINING_LOCK = ".training.lock"
"""Held by the run's supervisor, which may outlive its launcher."""
LOOK_S = 0.1
GLANCE_S = 0.3
"""A look at who holds a lock takes it for a moment: whoever wants it tries for longer than that."""


@contextmanager
def hold_lock(directory: Path, name: str, *, timeout_s: float = GLANCE_S) -> Iterator[None]:
    """Hold a lock in the run's directory, which is made if it is not there.

    Raises ConfigError where another process still holds it after `timeout_s`, or the directory cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = (directory / name).open("a")
    except OSError as error:
        raise ConfigError(f"run.directory: {directory} cannot be written: {error}; choose another") from error
    deadline = time.monotonic() + timeout_s
    with lock:
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                    raise ConfigError(
                        f"run.directory: the file system of {directory} has no locks ({error}), which keep two "
                        "launches apart; choose a directory on one that has, or mount it with them"
                    ) from error
                if time.monotonic() >= deadline:
                    raise ConfigError(
                        f"run.name: another process is running {directory.name!r} in {directory}; stop it, or "
                        "choose another run.name"
                    ) from None
                time.sleep(LOOK_S)
            else:
                break
        yield


def is_held(path: Path) -> bool:
    """Whether a process holds the lock at `path`."""
    if not path.exists():
        return False
    try:
        with path.open("a") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
