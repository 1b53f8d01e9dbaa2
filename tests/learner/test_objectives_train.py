"""Every objective in the real trainer, on what the real rollouts visit: who moves, and that a resumed run agrees."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from actors.rollout import Rollout
from ddil_dist.config import RunConfig, load_config
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.memory import InMemoryReplay
from ddil_dist.weights import InMemoryWeightStore
from learner.assemble import create_accelerator, create_trainer
from learner.methods import create_networks
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.support.problem import CPU

STUDENT_ONLY = "prior.parts=[{until: 1, forward: 0.5, student: 0.5, teacher: 0}]"
DATA_ONLY = "prior.parts=[{until: 1, forward: 1, student: 0, teacher: 0}]"
OBJECTIVES: dict[str, list[str]] = {
    "velocity": ["objective.type=velocity", "student.steps=8"],
    "guidance": ["objective.type=guidance", "student.steps=8"],
    "consistency": ["objective={type: consistency, solver_steps: 8, sampler_steps: [2, 3]}", STUDENT_ONLY],
    "lcm-lora's target": ["objective={type: consistency, solver_steps: 8, target: online}", STUDENT_ONLY],
    "dmd2": [
        "objective={type: distribution_matching, generator_every: 2}",
        DATA_ONLY,
        "rollout.labels=learner",
        "student.spacing=trailing",
    ],
    "dmd2 with ddil": [
        "objective={type: distribution_matching, generator_every: 2, generator_input: prior}",
        "rollout.labels=learner",
        "student.spacing=trailing",
        "thresholding={type: reflect, limit: 3}",
        "rollout.until_timestep=500",
    ],
    "dmd": ["objective.type=dmd", "student.steps=1", "learner.micro_batch_size=4"],
}


class Run:
    """A trainer with its replay, filled from rollouts where the prior wants any; metrics of its updates."""

    def __init__(self, config: RunConfig) -> None:
        problem = ImitationProblem.create(config, CPU)
        self.first = {
            role: {name: weight.clone() for name, weight in network.state_dict().items()}
            for role, network in create_networks(config, problem).items()
        }
        replay, self.weights = InMemoryReplay(config.replay, seed=0), InMemoryWeightStore()
        self.records: list[UpdateRecord] = []
        self.trainer: Trainer = create_trainer(
            config,
            problem,
            accelerator=create_accelerator(config, cpu=True),
            replay=replay,
            weights=self.weights,
            on_update=self.records.append,
            on_publish=replay.note_weights,
        )
        self.trainer._publish()
        if any(part.forward < 1 for part in config.prior.parts):
            rollout = Rollout(config, problem, weights=self.weights, replay=replay, writer="actor-0.0")
            rollout.refresh()
            while replay.stats().size < 48:
                rollout.work()

    def moved(self) -> dict[str, float]:
        """By role, how far the weights are from where they began."""
        return {
            name: max(float((weight - self.first[name][key]).abs().max()) for key, weight in role.weights().items())
            for name, role in self.trainer._roles.items()
        }

    def state(self) -> dict[str, Tensor]:
        return {
            f"{name}.{key}": weight.clone()
            for name, role in self.trainer._roles.items()
            for key, weight in role.weights().items()
        }


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_trains_and_checkpoints_what_it_needs(tiny_overrides: list[str], name: str) -> None:
    torch.manual_seed(0)
    config = load_config(
        None,
        [
            *tiny_overrides,
            *OBJECTIVES[name],
            "learner.updates=4",
            "learner.batch_size=8",
            "learner.checkpoint_every=4",
            "learner.publish_every=2",
            "replay.samples_per_insert=1000",
            "replay.error_buffer=1e9",
            "learner.optimizer.learning_rate=0.001",
            "learner.optimizer.warmup_updates=1",
        ],
    )
    run = Run(config)
    assert run.trainer.run() is True
    records = run.records
    assert all(torch.isfinite(torch.tensor(list(record.losses.values()))).all() for record in records)
    moved = run.moved()
    assert min(moved.values()) > 1e-4
    if config.objective.type == "distribution_matching":
        assert [sorted(record.losses) for record in records[:2]] == [["fake_score", "student"], ["fake_score"]]
    elif config.objective.type == "dmd":
        assert {tuple(sorted(record.losses)) for record in records} == {("fake_score", "student")}
    else:
        assert {tuple(record.losses) for record in records} == {("student",)}
    resumed = Run(config)
    assert resumed.trainer.update == 4
    wanted, got = run.state(), resumed.state()
    assert wanted.keys() == got.keys()
    assert all(torch.equal(weight, got[key]) for key, weight in wanted.items())
    for key, network in run.trainer._objective.state.items():
        other = resumed.trainer._objective.state[key].state_dict()
        assert all(torch.equal(weight, other[name]) for name, weight in network.state_dict().items())
