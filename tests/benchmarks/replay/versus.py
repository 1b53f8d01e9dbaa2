"""Sampling and inserting against the peers, in turns: a few calls of one, a few of the next, many times over.

Whatever else the machine does falls on all alike. A turn gives the mean time of its calls, so that fetching ahead is
paid for; what is reported is the ratio of the medians over turns.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from statistics import median
from typing import Any
from urllib.parse import urlparse

from tests.benchmarks.replay.environments import Unavailable, python_of
from tests.benchmarks.replay.worker import BATCH

WORKER = Path(__file__).with_name("worker.py")
ROOT = Path(__file__).parents[3]
READY_TIMEOUT_S = 180
UNCOUNTED = {"insert": 2, "sample": 24}
COUNTED = {"insert": 8, "sample": 16}
"""Calls of a turn: first those that may have been fetched ahead while others had their turn (Reverb's dataset holds
some 16 batches), then those that count."""

TARGETS = {
    ("sample", "torchrl"): 5.0,
    ("sample", "reverb-dataset"): 1.0,
    ("sample", "reverb"): 2.0,
    ("insert", "reverb"): 1.0,
    ("sample", "redis-benchmark"): 0.6,
    ("insert", "redis-benchmark"): 0.6,
}
"""How many times as fast as the peer we want to be."""


class Worker:
    """A buffer in a process of its own."""

    def __init__(self, python: Path, arguments: Sequence[str]) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - as long as the process; a pipe would fill up
        self._process = subprocess.Popen(
            [str(python), str(WORKER), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=environment,
        )
        line = self._read()
        if line != "ready":
            raise Unavailable(line)

    def times(self, operation: str, num: int) -> list[float]:
        """Seconds of each of `num` calls."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{operation} {num}\n")
        self._process.stdin.flush()
        return list(json.loads(self._read()))

    def stop(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(20)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _read(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(("ready", "[")) and not line.startswith("[reverb"):
                return line.strip()
        self._errors.seek(0)
        tail = self._errors.read().strip().splitlines()
        return tail[-1] if tail else f"ended with {self._process.wait()}"


def run(server_url: str, *, rounds: int) -> dict[str, Any]:
    """Median seconds of a batch by operation and kind, and what could not be measured with its reason."""
    place = urlparse(server_url)
    redis = ["--port", str(place.port), "--password", str(place.password)]
    missing: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    with ExitStack() as stack:

        def start(kind: str, python: Path, *arguments: str, listed: bool = True) -> None:
            worker = Worker(python, [kind, *arguments])
            stack.callback(worker.stop)
            if listed:
                workers[kind] = worker

        start("ours", Path(sys.executable), *redis)
        for kind, peer in (("torchrl", "torchrl"), ("reverb", "reverb"), ("reverb-dataset", "reverb")):
            try:
                python = python_of(peer)
                arguments = redis
                if peer == "reverb":
                    port = _free_port()
                    start("reverb-server", python, "--port", str(port), listed=False)
                    arguments = ["--port", str(port)]
                start(kind, python, *arguments)
            except (Unavailable, OSError, subprocess.SubprocessError) as error:
                missing[kind] = str(error)
        try:
            start("ray", Path(sys.executable))
        except Unavailable as error:
            missing["ray"] = str(error)
        times = _take_turns(workers, place, rounds)
    return {"median_s": {op: {k: median(t) for k, t in by.items()} for op, by in times.items()}, "missing": missing}


def _take_turns(workers: dict[str, Worker], place: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    times: dict[str, dict[str, list[float]]] = {"insert": {}, "sample": {}}
    for worker in workers.values():
        worker.times("insert", 6)
        worker.times("sample", 3)
    for _ in range(rounds):
        for operation, by_kind in times.items():
            for kind, worker in workers.items():
                skipped, counted = UNCOUNTED[operation], COUNTED[operation]
                turn = worker.times(operation, skipped + counted)[skipped:]
                by_kind.setdefault(kind, []).append(sum(turn) / counted)
            by_kind.setdefault("redis-benchmark", []).append(_redis_benchmark(place, operation))
    return times


def _redis_benchmark(place: Any, operation: str) -> float:
    """Seconds in which redis-benchmark moves a batch: SET or GET of 32,900 bytes, a pipeline of 224, one connection."""
    command = ["redis-benchmark", "-p", str(place.port), "-a", str(place.password), "--dbnum", "2", "-q", "--csv"]
    command += ["-d", "32900", "-P", str(BATCH), "-c", "1", "-n", str(BATCH * 12), "-r", str(BATCH * 6)]
    done = subprocess.run(
        [*command, "-t", "set" if operation == "insert" else "get"], capture_output=True, text=True, check=True
    )
    row = next(line for line in done.stdout.splitlines() if line.startswith(('"SET', '"GET')))
    return BATCH / float(row.split(",")[1].strip('"'))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
