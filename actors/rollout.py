"""One rollout process without its shell: pull the newest student, roll out, insert. No Ray, no Redis by name."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch

from actors.acceleration import accelerated
from actors.engine import RolloutEngine, RolloutSettings
from ddil_dist.config import RunConfig
from ddil_dist.errors import WaitTimeoutError, WeightsError
from ddil_dist.models.denoiser import torch_dtype
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.buffer import ReplayBuffer
from ddil_dist.replay.codec import Codec
from ddil_dist.states import States
from ddil_dist.types import WeightsVersion
from ddil_dist.weights import WeightStore, apply, published_names

WAIT_SLICE_S = 2.0


class Rollout:
    """Engine, student and inserts of one writer.

    Use: `rollout.refresh()` until it returns a version, then `rollout.work()` for ever, with `refresh()` as often as
    newer students should be picked up. `writer` must be new for every life of the process: batch ids begin at 0.
    halvings: how often the configured batches are halved, for a device that ran out of memory; one row at least.
    """

    def __init__(
        self,
        config: RunConfig,
        problem: ImitationProblem,
        *,
        weights: WeightStore,
        replay: ReplayBuffer,
        writer: str,
        halvings: int = 0,
    ) -> None:
        self._config = config
        self._weights = weights
        self._replay = replay
        self._data_status = problem.data_status
        self._writer = writer
        self.batch_size = max(1, config.rollout.batch_size >> halvings)
        self._batch_id = 0
        self._begun = time.monotonic()
        self._pending: list[States[Any]] = []
        self.applied: WeightsVersion | None = None
        self.applied_at = 0.0  # unix seconds
        self.num_inserted = 0
        self.insert_wait_s = 0.0
        self._missed = False
        seed = writer_seed(config.run.seed, writer)
        labels = config.rollout.labels == "actors"
        precision = torch_dtype(config.rollout.precision)
        student = problem.new_student()
        self._published = published_names(student)
        self._student = student.requires_grad_(False).eval()
        if precision != torch.float32:  # diffusers logs a warning at every cast, even at none
            self._student.to(precision)
        policy = problem.student_policy(accelerated(self._student, config.rollout, problem.device))
        teacher = accelerated(problem.teacher.unet, config.rollout, problem.device)
        self.engine = RolloutEngine(
            teacher=problem.teacher_policy(unet=teacher),
            student=policy,
            schedule=problem.teacher.schedule,
            encoder=problem.encoder,
            prompts=problem.prompts(),
            forward=problem.forward_data(seed=seed) if labels and config.prior.uses_forward else None,
            latent_shape=problem.teacher.latent_shape,
            device=problem.device,
            settings=RolloutSettings(
                batch_size=self.batch_size,
                student_batch_size=max(1, config.rollout.student_rows >> halvings),
                labels=labels,
                guidance=(config.teacher.guidance.min, config.teacher.guidance.max),
                seed=seed,
                mode=problem.rollout_mode(),
                record=config.rollout.record,
                latent_dtype=config.replay.latent_dtype,
            ),
        )

    def refresh(self) -> WeightsVersion | None:
        """Apply the newest published student if it is new; returns it if it was applied, else None."""
        newest = self._weights.newest()
        if newest is None or (self.applied is not None and newest.version <= self.applied.version):
            return None
        try:
            packed = self._weights.load(newest.version)
        except WeightsError:  # two versions were published since it was the newest: the next look finds the newer one
            if self._missed:
                raise
            self._missed = True
            return None
        self._missed = False
        apply(packed, self._student, self._published)
        part = self._config.prior.at(newest.progress)
        self.engine.set_policy(newest.version, student_probability=part.student_probability, forward_share=part.forward)
        self.applied, self.applied_at = newest, time.time()
        return newest

    def work(self, *, should_stop: Callable[[], bool] = lambda: False) -> int:
        """One engine tick, and an insert if a batch is full; the number of states inserted."""
        assert self.applied is not None, "refresh() must apply a student first"
        self._pending += self.engine.tick()
        inserted = 0
        while sum(map(len, self._pending)) >= self._config.rollout.insert_batch and not should_stop():
            inserted += self._insert(should_stop)
        return inserted

    def heartbeat(self) -> dict[str, Any]:
        """What the process says of itself: totals since it began, plain JSON values."""
        counters = self.engine.counters
        return {
            "writer": self._writer,
            "pid": os.getpid(),
            "version": -1 if self.applied is None else self.applied.version,
            "applied_at": self.applied_at,
            "batch_size": self.batch_size,
            "states": self.num_inserted,
            "teacher_calls": counters.teacher_calls,
            "student_calls": counters.student_calls,
            "batch_fill": counters.rows / max(1, counters.places),
            "network_s": counters.network_s,
            "tick_s": counters.tick_s,
            "insert_wait_s": self.insert_wait_s,
            "alive_s": time.monotonic() - self._begun,
            "data": self._data_status(),
        }

    def state_dict(self) -> dict[str, Any]:
        """Everything that its next states follow from, and those that it has not inserted yet."""
        return {
            "engine": self.engine.state_dict(),
            "student": self._student.state_dict(),
            "applied": None if self.applied is None else asdict(self.applied),
            "pending": [record for states in self._pending for record in Codec().encode(states).joined()],
            "batch_id": self._batch_id,
            "num_inserted": self.num_inserted,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, as the same writer."""
        self._student.load_state_dict(state["student"])
        self.engine.load_state_dict(state["engine"])
        self.applied = None if state["applied"] is None else WeightsVersion(**state["applied"])
        self.applied_at = time.time()
        self._pending = [Codec().decode_all(state["pending"])] if state["pending"] else []
        self._batch_id = state["batch_id"]
        self.num_inserted = state["num_inserted"]

    def _insert(self, should_stop: Callable[[], bool]) -> int:
        """Insert the oldest batch. Waits in slices, so that a stop is noticed: a repeated insert counts once."""
        num = self._config.rollout.insert_batch
        self._pending = States.join(self._pending).split(num)
        deadline = time.perf_counter() + self._config.rollout.insert_timeout_s
        while True:
            begun = time.perf_counter()
            try:
                self._replay.insert(
                    self._pending[0],
                    writer=self._writer,
                    batch_id=self._batch_id,
                    timeout_s=max(0.1, min(WAIT_SLICE_S, deadline - begun)),
                )
                break
            except WaitTimeoutError:
                if should_stop():
                    return 0
                if time.perf_counter() >= deadline:
                    raise
            finally:
                self.insert_wait_s += time.perf_counter() - begun
        self._pending = self._pending[1:]
        self._batch_id += 1
        self.num_inserted += num
        return num


def writer_seed(run_seed: int, writer: str) -> int:
    """A 31-bit seed of a writer's own, so that no two writers roll out the same trajectories."""
    digest = hashlib.blake2b(f"{run_seed}/{writer}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1
