"""Keeps an embedded Redis server alive while its run lives, and not a moment longer. Standard library only.

Runs as a process of its own: `python -I -S watchdog.py SERVER DIRECTORY`, with the run's process id in
DDIL_WATCHED_PID, and how long the server may take to end in DDIL_STOP_TIMEOUT_S. It starts the server over
DIRECTORY/redis.conf, starts it again (from its append-only file) when it crashes, and ends it on SIGTERM or once the
run's process is no longer this one's parent, which also holds after a SIGKILL of the run. On Linux the kernel ends the
server should the watchdog itself be killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType

LOOK_EVERY_S = 0.2
FIRST_START_S = 1.0
MOST_RESTARTS = 10
PR_SET_PDEATHSIG = 1


class _Stop(Exception):  # noqa: N818
    """Asked to end."""


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _serve(binary: str, directory: str) -> subprocess.Popen[bytes]:
    server = subprocess.Popen(  # noqa: S603
        [binary, "redis.conf"],
        cwd=directory,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=_die_with_parent,  # this process has one thread
    )
    Path(directory, "redis.pid").write_text(str(server.pid), encoding="utf-8")
    return server


def _stop(server: subprocess.Popen[bytes]) -> None:
    if server.poll() is None:
        server.terminate()
        try:
            server.wait(float(os.environ["DDIL_STOP_TIMEOUT_S"]))
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def watch(binary: str, directory: str, run: int) -> int:
    """Serve until the process `run` is gone or a SIGTERM arrives; returns the exit status."""

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        raise _Stop

    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    restarts = 0
    begin = time.monotonic()
    server = _serve(binary, directory)
    try:
        while os.getppid() == run:
            try:
                server.wait(LOOK_EVERY_S)
            except subprocess.TimeoutExpired:
                continue
            if time.monotonic() - begin < FIRST_START_S or restarts == MOST_RESTARTS:
                return 1
            restarts += 1
            server = _serve(binary, directory)
    except _Stop:
        pass
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _stop(server)
        Path(directory, "redis.pid").unlink(missing_ok=True)
    return 0


if __name__ == "__main__":
    sys.exit(watch(sys.argv[1], sys.argv[2], int(os.environ["DDIL_WATCHED_PID"])))
