"""The fleet manager: keeps as many rollout actors alive as the run wants. Runs as one named Ray actor.

The wanted number lives in Redis, so that any shell can change it and a restarted manager reconciles to it. Every
look compares wanted with running: missing actors are started, surplus ones are asked to stop, and one that died is
replaced by its next incarnation, after a pause that doubles with every death in a row.
"""

from __future__ import annotations

import threading
import time
from dataclasses import dataclass
from typing import Any

import ray

from actors.worker import FleetSpec, RolloutWorker
from ddil_dist.control import RunControl
from ddil_dist.replay.server import connect
from ddil_dist.weights.ray_store import NAMESPACE

LOOK_S = 0.5
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
STEADY_S = 120.0
"""An actor that lived this long is healthy: its next death counts as the first."""
DRAIN_S = 20.0


@dataclass
class _Member:
    """One place in the fleet and the actor that fills it."""

    incarnation: int = 0
    handle: Any = None
    result: Any = None
    started: float = 0.0
    deaths: int = 0
    not_before: float = 0.0
    stopping: bool = False


class FleetManager:
    """Use: `manager.run.remote()` once, `manager.drain.remote()` at the end, each in a thread of its own."""

    def __init__(self, spec: FleetSpec) -> None:
        self._spec = spec
        self._control = RunControl(connect(spec.config.redis), spec.config.run.name)
        self._members: dict[int, _Member] = {}
        self._failures: list[str] = []
        self._draining = threading.Event()
        self._drained = threading.Event()

    def run(self) -> None:
        """Reconcile until drained."""
        try:
            while not self._draining.wait(LOOK_S):
                self._reconcile(self._control.wanted_actors())
            self._reconcile(0)
            deadline = time.monotonic() + DRAIN_S
            while self._running() and time.monotonic() < deadline:
                time.sleep(LOOK_S / 2)
                self._reconcile(0)
            for member in self._members.values():
                if member.handle is not None:
                    ray.kill(member.handle)
        finally:
            self._drained.set()

    def drain(self) -> None:
        """Stop every actor and return when none is left."""
        self._draining.set()
        self._drained.wait(DRAIN_S + 10)

    def failures(self) -> list[str]:
        """Why actors died, newest last."""
        return self._failures[-20:]

    def _running(self) -> int:
        return sum(member.handle is not None for member in self._members.values())

    def _reconcile(self, wanted: int) -> None:
        self._collect()
        for index in range(wanted):
            member = self._members.setdefault(index, _Member())
            if member.handle is None and time.monotonic() >= member.not_before:
                self._start(index, member)
        for index, member in self._members.items():
            if index >= wanted and member.handle is not None and not member.stopping:
                member.stopping = True
                member.handle.stop.remote()

    def _start(self, index: int, member: _Member) -> None:
        rollout = self._spec.config.rollout
        member.incarnation = self._control.next_incarnation(f"actor-{index}")
        remote = ray.remote(
            num_cpus=rollout.num_cpus,
            num_gpus=rollout.num_gpus,
            resources=rollout.resources or None,
            max_concurrency=2,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(rollout.threads)}},
        )(RolloutWorker)
        name = f"ddil-{self._spec.config.run.name}-actor-{index}.{member.incarnation}"
        member.handle = remote.options(name=name, namespace=NAMESPACE).remote(
            self._spec, index=index, incarnation=member.incarnation
        )
        member.result = member.handle.run.remote()
        member.started = time.monotonic()
        member.stopping = False

    def _collect(self) -> None:
        """Take note of actors whose `run` has ended, well or badly."""
        results = {member.result: (index, member) for index, member in self._members.items() if member.handle}
        if not results:
            return
        ended, _ = ray.wait(list(results), num_returns=len(results), timeout=0)
        for result in ended:
            index, member = results[result]
            try:
                ray.get(result, timeout=1)
            except ray.exceptions.RayError as error:
                self._note_death(index, member, error)
            ray.kill(member.handle)
            member.handle = member.result = None

    def _note_death(self, index: int, member: _Member, error: ray.exceptions.RayError) -> None:
        lived = time.monotonic() - member.started
        member.deaths = 1 if lived > STEADY_S else member.deaths + 1
        pause = min(FIRST_PAUSE_S * 2 ** (member.deaths - 1), LONGEST_PAUSE_S)
        member.not_before = time.monotonic() + pause
        reason = str(getattr(error, "cause", None) or error).strip().splitlines()
        text = f"actor-{index}.{member.incarnation} died after {lived:.0f} s: {reason[-1] if reason else error!r}"
        self._failures.append(text)
        self._control.heartbeat(f"actor-{index}", {"failed": text, "deaths": member.deaths, "next_try_s": pause})


def start_fleet(spec: FleetSpec) -> Any:
    """Start the run's manager and its loop; it ends with the process that started it."""
    remote = ray.remote(num_cpus=0, max_restarts=0, max_concurrency=4)(FleetManager)
    manager = remote.options(name=f"ddil-{spec.config.run.name}-fleet", namespace=NAMESPACE).remote(spec)
    manager.run.remote()
    return manager
