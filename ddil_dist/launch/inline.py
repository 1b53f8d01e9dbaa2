"""`execution: inline`: rollouts, replay and learner take turns in one process. Deterministic; no Ray, no Redis.

For debugging, for a single GPU, and as the reference that a distributed run is compared with.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from actors.rollout import Rollout
from ddil_dist.config import RunConfig
from ddil_dist.journal import EVENTS_FILE, Journal
from ddil_dist.launch.progress import Progress, ProgressView
from ddil_dist.launch.replay_journal import FleetJournal, replay_fields
from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay.codec import Rows
from ddil_dist.replay.memory import InMemoryReplay
from ddil_dist.signals import stop_on_signals
from ddil_dist.states import States
from ddil_dist.status import Status, StatusFile, is_asked_to_stop
from ddil_dist.types import Draw, WeightsVersion
from ddil_dist.weights import InMemoryWeightStore, PackedWeights, WeightStore
from learner.assemble import create_accelerator, create_trainer
from learner.update_record import UpdateRecord


class Surroundings:
    """What the learner of a run in one process lives on: rollouts in flight, replay, the published student.

    With it in its checkpoints a run goes on bit for bit as if it had not stopped.
    """

    def __init__(self, config: RunConfig, rollout: Rollout, replay: InMemoryReplay, weights: WeightStore) -> None:
        self._config = config
        self._rollout = rollout
        self._replay = replay
        self._weights = weights

    def state_dict(self) -> dict[str, Any]:
        newest = self._weights.newest()
        assert newest is not None, "a student is published before the first update"
        packed = self._weights.load(newest.version)
        return {
            "rollout": self._rollout.state_dict(),
            "replay": self._replay.state_dict(),
            "published": {"version": asdict(newest), "layout": packed.layout, "buffer": packed.buffer},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        published = state["published"]
        version = WeightsVersion(**published["version"])
        self._weights.publish(PackedWeights(version, published["layout"], published["buffer"]))
        self._replay.load_state_dict(state["replay"])
        self._replay.note_weights(version)
        settings = self._config.replay
        self._replay.configure(  # what is configured now wins
            samples_per_insert=settings.samples_per_insert,
            min_size=settings.min_size,
            error_buffer=settings.error_buffer,
            max_staleness=settings.max_staleness,
        )
        self._rollout.load_state_dict(state["rollout"])


class RolloutOnDemand(InMemoryReplay):
    """A replay buffer whose samples wait for nobody: what is missing is rolled out first.

    insert_batch: states of one insert of `rollout`'s. A draw that no live state matches is rolled out for as long as
    the rate limiter admits inserts and the sample's time is not over; nobody else would end its wait.
    """

    rollout: Rollout
    insert_batch: int

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> States[Rows]:
        num = sum(draw.num for draw in draws)
        deadline = time.monotonic() + timeout_s
        while self._why_not(num, draws):
            if not self.can_sample(num):
                self.rollout.work()
            elif self._is_full() or time.monotonic() >= deadline:
                return super().sample(draws, timeout_s=0)  # raises, and says what is missing
            else:
                self.rollout.work(should_stop=self._is_full)
        return super().sample(draws, timeout_s=timeout_s)

    def _is_full(self) -> bool:
        return not self.can_insert(self.insert_batch)


def run_inline(config: RunConfig) -> bool:
    """Train the run to its end; False if it was stopped before."""
    torch.manual_seed(config.run.seed)
    torch.set_num_threads(max(config.learner.threads, config.rollout.threads))
    device = default_device()
    problem = ImitationProblem.create(config, device)
    problem.encoder.one_by_one = True  # a resumed run meets its prompts in other company
    replay = RolloutOnDemand(config.replay, config.run.seed)
    weights = InMemoryWeightStore()
    replay.rollout = Rollout(config, problem, weights=weights, replay=replay, writer="inline")
    replay.insert_batch = config.rollout.insert_batch
    events = Journal(config.run.path / EVENTS_FILE)
    fleet = FleetJournal(events)
    status = StatusFile(config.run.path)
    status.show(Status("training", total=config.learner.updates))
    with ProgressView(config) as view, stop_on_signals() as stop:

        def on_publish(version: WeightsVersion) -> None:
            replay.note_weights(version)
            replay.rollout.refresh()

        def on_update(record: UpdateRecord) -> None:
            stats = replay.stats()
            view.show(
                Progress(
                    phase="training",
                    update=record.update,
                    loss=record.loss,
                    replay_size=stats.size,
                    num_inserted=stats.num_inserted,
                    actors=1,
                )
            )
            status.show(Status("training", done=record.update, total=record.total_updates))
            if record.update % 10 == 0 or record.update == record.total_updates:
                events.write("replay", **replay_fields(stats))
                fleet.look({"inline": replay.rollout.heartbeat()})

        trainer = create_trainer(
            config,
            problem,
            accelerator=create_accelerator(config, cpu=device.type == "cpu"),
            replay=replay,
            weights=weights,
            companions={"surroundings": Surroundings(config, replay.rollout, replay, weights)},
            on_publish=on_publish,
            on_update=on_update,
        )
        finished = trainer.run(should_stop=lambda: stop.is_set() or is_asked_to_stop(config.run.path))
    status.clear()
    return finished
