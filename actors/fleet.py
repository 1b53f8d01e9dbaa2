"""The fleet manager: keeps as many rollout actors alive as the run wants. Runs as one named Ray actor.

The wanted number lives in Redis, so that any shell can change it and a restarted manager reconciles to it. Every
look compares wanted with running: missing actors are started, surplus ones are asked to stop, and one that died is
replaced by its next incarnation: at once the first time, after a pause that doubles with every death in a row later.
An actor that ran out of memory comes back at once with half its batch, until its batch is a single row.

Ray ends the actors of a manager that dies; the next manager starts them again.
"""

from __future__ import annotations

import os
import secrets
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import ray

from actors.attempts import Attempts
from actors.autoscale import Autoscaler
from actors.load import LoadMeter
from actors.worker import FleetSpec, RolloutWorker
from ddil_dist.config import AutoscaleConfig
from ddil_dist.control import RunControl, reason_of
from ddil_dist.errors import EnvironmentFailure, OutOfMemoryError
from ddil_dist.on_ray import NAMESPACE, actor_name, on_this_node
from ddil_dist.replay.server import connect

LOOK_S = 0.5
FIRST_PAUSE_S = 2.0
LONGEST_PAUSE_S = 60.0
STEADY_S = 120.0
"""An actor that lived this long is healthy: its next death counts as the first."""
SILENCE_LOOK_S = 10.0


@dataclass
class _Member:
    """One place in the fleet and the actor that fills it."""

    incarnation: int = 0
    halvings: int = 0
    handle: Any = None
    ready: Any = None
    result: Any = None
    started: float = 0.0
    up_since: float | None = None
    deaths: int = 0
    not_before: float = 0.0
    stop_by: float | None = None
    beat: float = 0.0
    heard: float = 0.0
    lacking: str = ""
    """What nobody had free for it when it was started."""


class FleetManager:
    """Reconciles from the moment it is made, in a thread of its own, until `drain`."""

    def __init__(self, spec: FleetSpec) -> None:
        self._spec = spec
        self._rollout = spec.config.rollout
        # Of several servers the one that counts incarnations may lose its data, and the others still know the writers.
        self._name = secrets.token_hex(2) if spec.config.redis.more_urls else ""
        self._scaler: Autoscaler | None = None
        self._members: dict[int, _Member] = {}
        self._wanted = spec.config.rollout.actors
        self._next_silence_look = 0.0
        self._draining = threading.Event()
        self._drained = threading.Event()
        threading.Thread(target=self._run, name="fleet", daemon=True).start()

    def drain(self) -> bool:
        """Stop every actor; True when none is left, the last ones killed where they did not listen."""
        self._draining.set()
        return self._drained.wait(self._spec.config.deadlines.fleet_drain_s)

    def _run(self) -> None:
        attempts = Attempts("fleet")  # a fleet without its manager's loop would decay unseen
        while not self._draining.wait(LOOK_S):
            attempts.make(self._look)
        deadline = time.monotonic() + self._spec.config.deadlines.actor_stop_s
        while self._running() and time.monotonic() < deadline:
            attempts.make(self._stop_all)
            time.sleep(LOOK_S / 2)
            attempts.make(self._collect)
        for member in self._members.values():
            self._end(member)
        self._drained.set()

    @cached_property
    def _control(self) -> RunControl:
        return RunControl(connect(self._spec.config.redis), self._spec.config.run.name)

    @cached_property
    def _meter(self) -> LoadMeter:
        return LoadMeter(self._spec.config, self._control)

    def _look(self) -> None:
        self._collect()
        wanted = self._control.wanted_actors()
        if wanted is None:  # the server has lost its data
            self._control.set_wanted_actors(self._wanted)
            bounds = self._rollout.autoscale
            self._control.set_autoscale(None if bounds is None else (bounds.min, bounds.max))
        else:
            self._wanted = wanted
        self._autoscale()
        due = [
            (index, member)
            for index in range(self._wanted)
            if (member := self._members.setdefault(index, _Member())).handle is None
            and time.monotonic() >= member.not_before
        ]
        free = ray.available_resources() if due else {}
        for index, member in due:
            member.lacking = self._lacking(free)
            self._start(index, member)
        self._stop_surplus(self._wanted)
        self._end_silent()
        self._control.set_fleet(self._status())

    def _lacking(self, free: dict[str, float]) -> str:
        """What an actor asks for and nobody has free, in words; takes from `free` what the actor will."""
        rollout = self._rollout
        asked = {"CPU": rollout.num_cpus, "GPU": rollout.num_gpus, **rollout.resources}
        lacking = [
            f"{name}: {amount:g} asked for, {free.get(name, 0):g} free"
            for name, amount in asked.items()
            if amount > free.get(name, 0)
        ]
        for name, amount in asked.items():
            free[name] = max(0.0, free.get(name, 0) - amount)
        return ", ".join(lacking)

    def _running(self) -> int:
        return sum(member.handle is not None for member in self._members.values())

    def _start(self, index: int, member: _Member) -> None:
        rollout = self._rollout
        member.incarnation = self._control.next_incarnation(f"actor-{index}", above=member.incarnation)
        remote = ray.remote(
            num_cpus=rollout.num_cpus,
            num_gpus=rollout.num_gpus,
            resources=rollout.resources or None,
            label_selector=rollout.label_selector or None,
            max_concurrency=3,
            max_restarts=0,
            runtime_env={"env_vars": {"OMP_NUM_THREADS": str(rollout.threads)}},
        )(RolloutWorker)
        name = actor_name(self._spec.config.run.name, f"actor-{index}.{member.incarnation}")
        member.handle = remote.options(name=name, namespace=NAMESPACE).remote(
            self._spec, index=index, incarnation=member.incarnation, halvings=member.halvings, fleet=self._name
        )
        member.ready = member.handle.ready.remote()
        member.result = member.handle.run.remote()
        member.started = time.monotonic()
        member.up_since = member.stop_by = None

    def _stop_all(self) -> None:
        self._stop_surplus(0)

    def _stop_surplus(self, wanted: int) -> None:
        for index, member in self._members.items():
            if index < wanted or member.handle is None:
                continue
            if member.stop_by is None:
                member.stop_by = time.monotonic() + self._spec.config.deadlines.actor_stop_s
                member.handle.stop.remote()
            elif member.up_since is None or time.monotonic() > member.stop_by:
                self._end(member)  # it waits for a place, or does not listen
                self._control.forget(f"actor-{index}")

    def _collect(self) -> None:
        """Take note of actors that have come up, and of those whose `run` has ended, well or badly."""
        living = {index: member for index, member in self._members.items() if member.handle is not None}
        if not living:
            return
        waiting = {member.ready: member for member in living.values() if member.up_since is None}
        if waiting:
            for ready in ray.wait(list(waiting), num_returns=len(waiting), timeout=0)[0]:
                waiting[ready].up_since = time.monotonic()
        results = {member.result: index for index, member in living.items()}
        for result in ray.wait(list(results), num_returns=len(results), timeout=0)[0]:
            index, member = results[result], living[results[result]]
            try:
                ray.get(result, timeout=1)
            except ray.exceptions.RayError as error:
                self._end(member)
                self._note_death(index, member, error)
            else:
                self._end(member)  # it was asked to
                self._control.forget(f"actor-{index}")

    def _end(self, member: _Member) -> None:
        if member.handle is not None:
            ray.kill(member.handle)
        member.handle = member.ready = member.result = None

    def _note_death(self, index: int, member: _Member, error: ray.exceptions.RayError) -> None:
        lived = time.monotonic() - (member.up_since or member.started)
        reason = reason_of(getattr(error, "cause", None) or error).splitlines()[-1]
        text = f"actor-{index}.{member.incarnation} died after {lived:.0f} s: {reason}"
        if _is_out_of_memory(error) and self._rollout.batch_size >> member.halvings > 1:
            member.halvings += 1
            text += f"; it comes back with batches of {max(1, self._rollout.batch_size >> member.halvings)}"
            pause = 0.0
        else:
            member.deaths = 1 if lived > STEADY_S else member.deaths + 1
            pause = 0.0 if member.deaths == 1 else min(FIRST_PAUSE_S * 2 ** (member.deaths - 2), LONGEST_PAUSE_S)
        member.not_before = time.monotonic() + pause
        print(f"ddil_dist: fleet: {text}", flush=True)
        with suppress(EnvironmentFailure):  # the death is noted here; the next heartbeat tells of the successor
            self._control.heartbeat(f"actor-{index}", {"failed": text, "deaths": member.deaths, "next_try_s": pause})

    def _end_silent(self) -> None:
        """Replace actors that are up and say nothing: stuck on a bad device, or cut off from Redis."""
        if time.monotonic() < self._next_silence_look:
            return
        self._next_silence_look = time.monotonic() + SILENCE_LOOK_S
        limit = self._rollout.silent_timeout_s
        beats = self._control.heartbeats()
        for index, member in self._members.items():
            if member.handle is None or member.up_since is None:
                continue
            beat = beats.get(f"actor-{index}", {})
            if str(beat.get("writer", "")).endswith(f".{member.incarnation}") and beat["time"] != member.beat:
                member.beat, member.heard = beat["time"], time.monotonic()
            if time.monotonic() - max(member.heard, member.up_since) > limit:
                reason = f"no sign of life for {limit:g} s (rollout.silent_timeout_s)"
                self._end(member)
                self._note_death(index, member, ray.exceptions.RayError(reason))

    def _autoscale(self) -> None:
        """Every window, move the wanted number towards what the learner needs, while autoscaling is on."""
        bounds = self._control.autoscale()
        if bounds is None:
            self._scaler = None
            return
        config = (self._rollout.autoscale or AutoscaleConfig()).model_copy(update={"min": bounds[0], "max": bounds[1]})
        if self._scaler is None or self._scaler.config != config:
            self._scaler = Autoscaler(config)
            self._meter.begin()
        steady = sum(member.up_since is not None for member in self._members.values()) >= self._wanted
        if not steady:
            self._meter.begin()  # a window counts once everyone wanted works through it
        elif (load := self._meter.read(config.window_s)) is not None:
            wanted = self._scaler.next(self._wanted, load)
            if wanted != self._wanted:
                self._wanted = wanted
                self._control.set_wanted_actors(wanted)

    def _status(self) -> dict[str, Any]:
        now = time.monotonic()
        living = [member for member in self._members.values() if member.handle is not None]
        return {
            "pid": os.getpid(),
            "wanted": self._wanted,
            "running": sum(member.up_since is not None and member.stop_by is None for member in living),
            "stopping": sum(member.stop_by is not None for member in living),
            "waiting_for_a_place": sum(member.up_since is None and member.stop_by is None for member in living),
            "lacking": next((member.lacking for member in living if member.up_since is None and member.lacking), ""),
            "backing_off": sum(
                index < self._wanted and member.handle is None and member.not_before > now
                for index, member in self._members.items()
            ),
        }


def _is_out_of_memory(error: ray.exceptions.RayError) -> bool:
    """Whether the actor said so itself, or Ray's memory monitor ended it."""
    return isinstance(error, ray.exceptions.OutOfMemoryError) or isinstance(
        getattr(error, "cause", None), OutOfMemoryError
    )


def start_fleet(spec: FleetSpec) -> Any:
    """Start the run's manager, here; Ray starts it again if it dies, and ends it with the process that started it."""
    remote = ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=4)(FleetManager)
    name = actor_name(spec.config.run.name, "fleet")
    return remote.options(name=name, namespace=NAMESPACE, scheduling_strategy=on_this_node()).remote(spec)
