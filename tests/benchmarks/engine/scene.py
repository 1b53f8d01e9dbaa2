"""The built-in problem, its engines, and a clock inside the networks."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from actors.rollout import Rollout
from ddil_dist.config import load_config
from ddil_dist.problem import ImitationProblem
from ddil_dist.states import States
from ddil_dist.weights import InMemoryWeightStore, pack

CPU = torch.device("cpu")

cpu_s = time.process_time
"""Seconds that this process had a core: on one thread, those of the clock on a quiet machine, whatever else runs."""


class NetworkClock:
    """Seconds inside some networks' own forward, and nothing of what is around it."""

    def __init__(self, *networks: nn.Module) -> None:
        self.seconds = 0.0
        for network in networks:
            network.forward = self._timed(network.forward)  # type: ignore[method-assign]

    def _timed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            begun = time.perf_counter()
            answer = forward(*args, **kwargs)
            self.seconds += time.perf_counter() - begun
            return answer

        return timed


class Nowhere:
    """A replay buffer that takes every insert."""

    def insert(self, states: States[Any], *, writer: str, batch_id: int, timeout_s: float) -> bool:
        return True


@dataclass(frozen=True)
class Turn:
    """What one turn of an engine came to."""

    states_per_s: float
    fill: float
    policy_share: float
    network_share: float


class EngineRun:
    """A rollout process of a configuration, with the student at the weights that training begins with."""

    def __init__(self, batch_size: int, *overrides: str, clock: bool = True) -> None:
        config = load_config(None, [f"rollout.batch_size={batch_size}", *overrides])
        self.problem = ImitationProblem.create(config, CPU)
        weights = InMemoryWeightStore()
        weights.publish(pack(self.problem.new_student().state_dict(), version=0, progress=0.0))
        self.rollout = Rollout(config, self.problem, weights=weights, replay=Nowhere(), writer="one")  # type: ignore[arg-type]
        self.rollout.refresh()
        self.engine = self.rollout.engine
        self._clock = NetworkClock(self.problem.teacher.unet, self.rollout._student) if clock else None
        self._cycle = config.rollout.batch_size + config.rollout.student_rows

    def turn(self, student_probability: float, *, forward_share: float = 0.0) -> Turn:
        """Three pools of trajectories, after one that is not counted and brings the pool to this probability's mix."""
        self.engine.set_policy(0, student_probability=student_probability, forward_share=forward_share)
        self._until(self._cycle)
        before, inside = vars(self.engine.counters).copy(), self._inside
        begun = cpu_s()
        self._until(3 * self._cycle)
        seconds = cpu_s() - begun
        after = self.engine.counters
        tick_s = after.tick_s - before["tick_s"]
        return Turn(
            states_per_s=(after.states - before["states"]) / seconds,
            fill=(after.rows - before["rows"]) / (after.places - before["places"]),
            policy_share=(after.network_s - before["network_s"]) / tick_s,
            network_share=(self._inside - inside) / tick_s,
        )

    @property
    def _inside(self) -> float:
        return 0.0 if self._clock is None else self._clock.seconds

    def _until(self, num_trajectories: int) -> None:
        wanted = self.engine.counters.trajectories + num_trajectories
        while self.engine.counters.trajectories < wanted:
            self.rollout.work()
