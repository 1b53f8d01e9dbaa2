"""A learner from a configuration, on the real classes: trained on what rollouts visit, resumed, exported."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from actors.rollout import Rollout
from ddil_dist.config import load_config
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.memory import InMemoryReplay
from ddil_dist.weights import InMemoryWeightStore
from learner.assemble import create_accelerator, create_trainer
from learner.methods.progressive import ProgressiveObjective
from learner.update_record import UpdateRecord
from tests.support.problem import CPU
from tests.support.tiny import save_tiny_pipeline


@pytest.mark.parametrize("labels", ["actors", "learner"])
def test_training_on_visited_states_lowers_the_loss(tiny_overrides: list[str], labels: str, tmp_path: Path) -> None:
    config = load_config(
        None,
        [
            *tiny_overrides,
            # An eps-student's loss on a random network is mostly that of a few states at the noisiest step.
            f"teacher.pipeline={save_tiny_pipeline(tmp_path / 'pipeline', prediction_type='v_prediction')}",
            f"rollout.labels={labels}",
            "replay.samples_per_insert=1000",
            "replay.error_buffer=1e9",
            "learner.updates=24",
            "learner.batch_size=16",
            "learner.micro_batch_size=8",
            "learner.ema_decay=0",
            "learner.publish_every=8",
            "learner.checkpoint_every=24",
            "learner.gradient_checkpointing=true",
            "learner.optimizer.learning_rate=0.001",
            "learner.optimizer.warmup_updates=2",
        ],
    )
    problem = ImitationProblem.create(config, CPU)
    replay, weights = InMemoryReplay(config.replay, seed=0), InMemoryWeightStore()
    records: list[UpdateRecord] = []
    trainer = create_trainer(
        config,
        problem,
        accelerator=create_accelerator(config, cpu=True),
        replay=replay,
        weights=weights,
        on_update=records.append,
        on_publish=replay.note_weights,
    )
    trainer._publish()
    rollout = Rollout(config, problem, weights=weights, replay=replay, writer="actor-0.0")
    rollout.refresh()
    while replay.stats().size < 128:
        rollout.work()
    assert trainer.run() is True
    states = [trainer._source.next(progress=1.0) for _ in range(8)]

    def loss_of(network: nn.Module) -> float:
        objective = ProgressiveObjective(problem.student_denoiser(network), problem.grid, config.objective.weighting)
        with torch.no_grad():
            return sum(float(objective.loss(batch).loss) for batch in states)

    trained = problem.new_student()
    trained.load_state_dict(trainer.final_weights())
    assert loss_of(trained) < 0.9 * loss_of(problem.new_student())
    assert {name for record in records for name in record.sources} == {"FORWARD", "STUDENT", "TEACHER", "NOISE"}
    resumed = create_trainer(
        config, problem, accelerator=create_accelerator(config, cpu=True), replay=replay, weights=weights
    )
    assert resumed.update == 24
    wanted = trainer.final_weights()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in resumed.final_weights().items())
