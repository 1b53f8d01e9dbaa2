"""Starting commands as a user does, waiting for what they do, and finding what they left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import psutil

MARK = "DDIL_TEST_PROCESS"
"""Environment variable that everything a test starts inherits, by which its processes are found."""


def environment(**extra: str) -> dict[str, str]:
    """The environment of a test's commands: no cluster but the one in `extra`."""
    kept = {key: value for key, value in os.environ.items() if key not in ("RAY_ADDRESS", "RAY_AUTH_MODE")}
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", **extra}


def command(
    module: str, *arguments: str, env: dict[str, str], timeout_s: float = 200
) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` to its end."""
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=env,
        check=False,
    )


def wait_for(happened: Callable[[], bool], *, timeout_s: float, what: str) -> float:
    """Seconds until `happened`; fails the test where it does not."""
    begun = time.monotonic()
    while not happened():
        assert time.monotonic() - begun < timeout_s, f"waited {timeout_s:g} s in vain until {what}"
        time.sleep(0.2)
    return time.monotonic() - begun


@contextmanager
def nothing_left_behind() -> Iterator[dict[str, str]]:
    """An environment whose processes must all have ended, soon after the block has."""
    mark = uuid4().hex
    yield environment(**{MARK: mark})
    names = ("redis-server", "raylet", "gcs_server", "watchdog")  # Ray's workers end with their raylet

    def left() -> list[str]:
        found = []
        for process in psutil.process_iter():
            try:
                words = " ".join(process.cmdline())
                if any(name in words for name in names) and process.environ().get(MARK) == mark:
                    found.append(words[:200])
            except psutil.Error:
                continue
        return found

    deadline = time.monotonic() + 30
    while left() and time.monotonic() < deadline:
        time.sleep(0.5)
    assert left() == []


def override(overrides: list[str], key: str) -> str:
    """The value of a key among overrides."""
    return next(item for item in overrides if item.startswith(f"{key}=")).split("=", 1)[1]


def run_directory(overrides: list[str]) -> Path:
    """Where a run of these overrides leaves its files."""
    return Path(override(overrides, "run.directory")) / override(overrides, "run.name")
