"""`execution: inline`: rollouts, replay and learner take turns in one process. Deterministic; no Ray, no Redis.

For debugging, for a single GPU, and as the reference that a distributed run is compared with.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from actors.rollout import Rollout
from ddil_dist.config import RunConfig
from ddil_dist.journal import EVENTS_FILE, Journal
from ddil_dist.launch.observe import FleetObserver, replay_fields
from ddil_dist.launch.progress import Progress, ProgressView
from ddil_dist.launch.signals import stop_on_signals
from ddil_dist.problem import ImitationProblem, default_device
from ddil_dist.replay.memory import InMemoryReplay
from ddil_dist.types import Draw, SampledStates, WeightsVersion
from ddil_dist.weights import InMemoryWeightStore
from learner.assemble import create_accelerator, create_trainer
from learner.trainer import UpdateRecord


class RolloutOnDemand(InMemoryReplay):
    """A replay buffer whose samples wait for nobody: what is missing is rolled out first."""

    rollout: Rollout

    def sample(self, draws: Sequence[Draw], *, timeout_s: float) -> SampledStates:
        num = sum(draw.num for draw in draws)
        while not self.can_sample(num):
            self.rollout.work()
        return super().sample(draws, timeout_s=timeout_s)


def run_inline(config: RunConfig) -> bool:
    """Train the run to its end; False if it was stopped before."""
    torch.manual_seed(config.run.seed)
    torch.set_num_threads(max(config.learner.threads, config.rollout.threads))
    device = default_device()
    problem = ImitationProblem.create(config, device)
    replay = RolloutOnDemand(config.replay, config.run.seed)
    weights = InMemoryWeightStore()
    replay.rollout = Rollout(config, problem, weights=weights, replay=replay, writer="inline")
    events = Journal(config.run.path / EVENTS_FILE)
    fleet = FleetObserver(events)
    with ProgressView(config) as view, stop_on_signals() as stop:

        def on_publish(version: WeightsVersion) -> None:
            replay.set_newest_version(version.version)
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
            if record.update % 10 == 0:
                events.write("replay", **replay_fields(stats))
                fleet.look({"inline": replay.rollout.heartbeat()})

        trainer = create_trainer(
            config,
            problem,
            accelerator=create_accelerator(config, cpu=device.type == "cpu"),
            replay=replay,
            weights=weights,
            on_publish=on_publish,
            on_update=on_update,
        )
        return trainer.run(should_stop=stop.is_set)
