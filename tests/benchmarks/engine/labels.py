"""What labels made by actors do for the learner: its samples per second, and with the expert at the learner."""

from __future__ import annotations

import statistics
import tempfile
from dataclasses import replace
from typing import Any

import numpy as np

from ddil_dist.config import load_config
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.memory import InMemoryReplay
from ddil_dist.states import States
from ddil_dist.types import NO_POLICY
from ddil_dist.weights import InMemoryWeightStore
from learner.assemble import create_accelerator, create_trainer
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.benchmarks.engine.scene import CPU, EngineRun, cpu_s

NUM_STATES = 512


class Learner:
    """A learner whose replay buffer is full and waits for nobody."""

    def __init__(self, labels: str, directory: str) -> None:
        config = load_config(
            None,
            [
                f"run.directory={directory}",
                f"run.name={labels}",
                "run.execution=inline",  # batches are drawn where they are used, so one thread does everything
                f"rollout.labels={labels}",
                "replay.error_buffer=1e9",
                "learner.updates=100000",
                "learner.publish_every=100000",
                "learner.checkpoint_every=100000",
            ],
        )
        self._batch_size = config.learner.batch_size
        self._ends: list[float] = []
        self._left = 0
        replay = InMemoryReplay(config.replay, config.run.seed)
        engine = EngineRun(64, f"rollout.labels={labels}").engine
        engine.set_policy(0, student_probability=0.5, forward_share=0.5)
        made: list[States[Any]] = []
        while sum(map(len, made)) < NUM_STATES:
            made += engine.tick()
        states = States.join(made).split(NUM_STATES)[0]
        states = replace(states, policy_version=np.full(NUM_STATES, NO_POLICY))
        replay.insert(states, writer="one", batch_id=0, timeout_s=60)
        self.trainer: Trainer = create_trainer(
            config,
            ImitationProblem.create(config, CPU),
            accelerator=create_accelerator(config, cpu=True),
            replay=replay,
            weights=InMemoryWeightStore(),
            on_update=self._note,
        )

    def samples_per_s(self, num_updates: int) -> float:
        """Over that many updates after one that is not counted, batches included."""
        self._ends, self._left = [], num_updates + 1
        self.trainer.run(should_stop=lambda: self._left <= 0)
        return self._batch_size * num_updates / (self._ends[-1] - self._ends[0])

    def _note(self, record: UpdateRecord) -> None:
        self._ends.append(cpu_s())
        self._left -= 1


def run(rounds: int) -> dict[str, Any]:
    """Medians over rounds in which both take turns."""
    with tempfile.TemporaryDirectory() as directory:
        learners = {labels: Learner(labels, directory) for labels in ("actors", "learner")}
        speeds: dict[str, list[float]] = {labels: [] for labels in learners}
        for _ in range(rounds):
            for labels, learner in learners.items():
                speeds[labels].append(learner.samples_per_s(12 if labels == "actors" else 4))
        return {labels: statistics.median(found) for labels, found in speeds.items()}
