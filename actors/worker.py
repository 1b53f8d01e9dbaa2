"""The Ray shell of a rollout: one process on an inference GPU or a CPU core."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch

from actors.rollout import Rollout
from ddil_dist.config import RunConfig
from ddil_dist.control import HEARTBEAT_S, RunControl
from ddil_dist.errors import EnvironmentFailure, OutOfMemoryError, WaitTimeoutError
from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay.redis_replay import RedisReplay
from ddil_dist.replay.server import connect
from ddil_dist.weights.ray_store import RayWeightStore

REFRESH_S = 0.5
"""Shortest time between two looks for newer weights."""


@dataclass(frozen=True)
class FleetSpec:
    """What every process of a run needs to find its peers: `config.redis` carries its password, and is not shown."""

    config: RunConfig
    board: Any = field(repr=False)


class RolloutWorker:
    """Runs as a Ray actor: `run()` rolls out until `stop()`; `stop` needs a second thread of the actor.

    halvings: how often the batch was found too large for this place's memory. fleet: names the life of the fleet, where
    incarnations alone may come again.
    """

    def __init__(self, spec: FleetSpec, *, index: int, incarnation: int, halvings: int = 0, fleet: str = "") -> None:
        self._spec = spec
        self._index = index
        self._halvings = halvings
        self._writer = f"actor-{index}{f'-{fleet}' if fleet else ''}.{incarnation}"
        self._name = f"actor-{index}"
        self._stop = threading.Event()

    def run(self) -> int:
        """Roll out until asked to stop; the number of states inserted. Raises OutOfMemoryError, among others."""
        config = self._spec.config
        torch.set_num_threads(config.rollout.threads)
        control = RunControl(connect(config.redis), config.run.name)
        control.heartbeat(self._name, {"writer": self._writer, "loading": True})
        replay = RedisReplay(config.replay, config.redis, run=config.run.name, seed=self._index)
        try:
            with memory_explained(self._writer):
                problem = ImitationProblem.create(config, default_device())
                rollout = Rollout(
                    config,
                    problem,
                    weights=RayWeightStore(self._spec.board, timeout_s=config.deadlines.weights_s),
                    replay=replay,
                    writer=self._writer,
                    halvings=self._halvings,
                )
                self._await_first_weights(rollout)
                self._loop(rollout, control)
        finally:
            replay.close()
            control.close()
        return rollout.num_inserted

    def ready(self) -> None:
        """Answers once the process is up."""

    def stop(self) -> None:
        """Let `run` finish its tick and return."""
        self._stop.set()

    def _loop(self, rollout: Rollout, control: RunControl) -> None:
        next_refresh = next_heartbeat = 0.0

        def tend() -> bool:
            """Between ticks, and while an insert waits: take newer weights, show a sign of life; whether to stop."""
            nonlocal next_refresh, next_heartbeat
            now = time.monotonic()
            if now >= next_refresh:
                try:
                    next_refresh = now + REFRESH_S
                    if rollout.refresh() is not None:
                        next_heartbeat = now
                except WaitTimeoutError as error:  # the board is silent: the student that is here does for as long
                    print(f"ddil_dist: {self._writer}: {error}", flush=True)
                    next_refresh = time.monotonic() + self._spec.config.deadlines.weights_s
            if now >= next_heartbeat:
                next_heartbeat = now + HEARTBEAT_S
                # While Redis is away nobody reads it; inserts have a deadline of their own.
                with suppress(EnvironmentFailure):
                    control.heartbeat(self._name, rollout.heartbeat())
            return self._stop.is_set()

        while not tend():
            rollout.work(should_stop=tend)
        with suppress(EnvironmentFailure):
            control.heartbeat(self._name, rollout.heartbeat())

    def _await_first_weights(self, rollout: Rollout) -> None:
        wait_s = self._spec.config.deadlines.first_weights_s
        deadline = time.monotonic() + wait_s
        while True:
            with suppress(WaitTimeoutError):
                if rollout.refresh() is not None:
                    return
            if self._stop.wait(REFRESH_S):
                return
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{self._writer} waited {wait_s:g} s for the learner's first weights version "
                    "(deadlines.first_weights_s); look at the learner's log"
                )


@contextmanager
def memory_explained(writer: str) -> Iterator[None]:
    """Raises OutOfMemoryError, whichever way an allocator says it."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise OutOfMemoryError(f"{writer}: {error}") from error
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's allocator on the CPU
            raise
        raise OutOfMemoryError(f"{writer}: {error}") from error
