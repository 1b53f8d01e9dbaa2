"""The Ray shell of a rollout: one process on an inference GPU or a CPU core."""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from actors.rollout import Rollout
from ddil_dist.config import RunConfig
from ddil_dist.control import RunControl
from ddil_dist.errors import WaitTimeoutError
from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay.redis import RedisReplay
from ddil_dist.replay.server import connect
from ddil_dist.weights.ray_store import RayWeightStore

REFRESH_S = 0.5
"""Shortest time between two looks for newer weights."""
HEARTBEAT_S = 2.0
FIRST_WEIGHTS_S = 300.0


@dataclass(frozen=True)
class FleetSpec:
    """What every process of a run needs to find its peers: `config.redis` carries its password, and is not shown."""

    config: RunConfig
    board: Any = field(repr=False)


class RolloutWorker:
    """Runs as a Ray actor: `run()` rolls out until `stop()`; `stop` needs a second thread of the actor."""

    def __init__(self, spec: FleetSpec, *, index: int, incarnation: int) -> None:
        self._spec = spec
        self._index = index
        self._writer = f"actor-{index}.{incarnation}"
        self._name = f"actor-{index}"
        self._stop = threading.Event()

    def run(self) -> int:
        """Roll out until asked to stop; the number of states inserted."""
        config = self._spec.config
        torch.set_num_threads(config.rollout.threads)
        problem = ImitationProblem.create(config, default_device())
        replay = RedisReplay(config.replay, config.redis, run=config.run.name, seed=self._index)
        control = RunControl(connect(config.redis), config.run.name)
        rollout = Rollout(config, problem, weights=RayWeightStore(self._spec.board), replay=replay, writer=self._writer)
        try:
            self._await_first_weights(rollout)
            self._loop(rollout, control)
        finally:
            replay.close()
            control.close()
        return rollout.num_inserted

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
                next_refresh = now + REFRESH_S
                if rollout.refresh() is not None:
                    next_heartbeat = now
            if now >= next_heartbeat:
                next_heartbeat = now + HEARTBEAT_S
                control.heartbeat(self._name, rollout.heartbeat())
            return self._stop.is_set()

        while not tend():
            rollout.work(should_stop=tend)
        control.heartbeat(self._name, rollout.heartbeat())

    def _await_first_weights(self, rollout: Rollout) -> None:
        deadline = time.monotonic() + FIRST_WEIGHTS_S
        while rollout.refresh() is None:
            if self._stop.wait(REFRESH_S):
                return
            if time.monotonic() > deadline:
                raise WaitTimeoutError(
                    f"{self._writer} waited {FIRST_WEIGHTS_S:g} s for the learner's first weights version; look at "
                    "the learner's log"
                )
