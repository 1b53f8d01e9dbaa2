"""Batches and states by hand, and a trainer over a network that costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from ddil_dist.config import LearnerConfig, OptimizerConfig
from ddil_dist.diffusion.grid import TrajectoryGrid
from ddil_dist.journal import Journal
from ddil_dist.models.conditioning import Conditioning
from ddil_dist.models.denoiser import Denoiser
from ddil_dist.states import States
from ddil_dist.types import NO_POLICY, StateSource, WeightsVersion
from ddil_dist.weights import InMemoryWeightStore
from learner.batch_source import SourceTimes
from learner.checkpoint import CheckpointStore
from learner.checkpoint_writer import CheckpointWriter
from learner.methods import Objective
from learner.methods.progressive import ProgressiveObjective
from learner.publisher import Publisher
from learner.trainer import Trainer
from tests.diffusion.support import stable_diffusion_schedule
from tests.support.cheap import CheapUNet
from tests.support.states import train_batch

GRID = TrajectoryGrid.create(4, 8, spacing="linspace")
SCHEDULE = stable_diffusion_schedule()


def make_batch(generator: np.random.Generator, num: int, *, label_scale: float = 1.0) -> States[torch.Tensor]:
    """A batch of arbitrary states and answers, all grid points and sources among them."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    return train_batch(
        x_t=normal(num, 4, 4, 4),
        step_index=torch.arange(num) % GRID.num_steps,
        conditioning=Conditioning(normal(num, 4, 8)),
        guidance_scale=torch.from_numpy(generator.uniform(2, 8, num).astype(np.float32)),
        label=label_scale * normal(num, 4, 4, 4),
        source=torch.tensor([(0, 1, 2)[i % 3] for i in range(num)], dtype=torch.uint8),
        policy_version=torch.tensor([(-1, 4, -1)[i % 3] for i in range(num)]),
        staleness=torch.tensor([(0, i, 0)[i % 3] for i in range(num)]),
    )


class SeededSource:
    """Batches that follow from a seed and nothing else, resumable like a `BatchSource`."""

    def __init__(self, *, num: int = 6, seed: int = 0) -> None:
        self._num = num
        self._generator = np.random.default_rng(seed)
        self.times = SourceTimes()
        self.progress: list[float] = []
        self.spoil: Callable[[int, States[torch.Tensor]], States[torch.Tensor]] = lambda update, batch: batch

    def next(self, *, progress: float, on_wait: Callable[[], None] = lambda: None) -> States[torch.Tensor]:
        self.progress.append(progress)
        return self.spoil(len(self.progress) - 1, make_batch(self._generator, self._num))

    def state_dict(self) -> dict[str, Any]:
        return {"generator": self._generator.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._generator.bit_generator.state = state["generator"]

    def close(self) -> None:
        pass


def learner_config(**changes: Any) -> LearnerConfig:
    """Six updates of six states at a learning rate that shows."""
    settings: dict[str, Any] = {
        "updates": 6,
        "batch_size": 6,
        "publish_every": 2,
        "checkpoint_every": 2,
        "ema_decay": 0.8,
        "optimizer": OptimizerConfig(learning_rate=0.05, warmup_updates=2),
        **changes,
    }
    return LearnerConfig(**settings)


def new_network() -> CheapUNet:
    return CheapUNet(guided=True, bias=0.1)


def objective_of(network: torch.nn.Module) -> ProgressiveObjective:
    return ProgressiveObjective(Denoiser(network, SCHEDULE, "v_prediction"), GRID, "truncated_snr")


def make_trainer(
    directory: Path,
    *,
    config: LearnerConfig | None = None,
    source: SeededSource | None = None,
    make_objective: Callable[[Mapping[str, torch.nn.Module]], Objective] = lambda networks: objective_of(
        networks["student"]
    ),
    weights: InMemoryWeightStore | None = None,
    network: torch.nn.Module | None = None,
    networks: Mapping[str, torch.nn.Module] | None = None,
    journal: bool = True,
    accelerator: Accelerator | None = None,
    on_publish: Callable[[WeightsVersion], None] = lambda version: None,
    **callbacks: Any,
) -> Trainer:
    config = config or learner_config()
    checkpoints = CheckpointStore(directory / "checkpoints", keep=config.keep_checkpoints)
    lines = Journal(directory / "metrics.jsonl") if journal else None
    return Trainer(
        config,
        accelerator=accelerator or Accelerator(cpu=True),
        networks=networks or {"student": network or new_network()},
        make_objective=make_objective,
        source=source or SeededSource(),  # type: ignore[arg-type]
        timesteps=GRID.student,
        publisher=None if weights is None else Publisher(weights, on_publish=on_publish, journal=lines),
        checkpoints=checkpoints,
        writer=CheckpointWriter(checkpoints, journal=lines),
        journal=lines,
        **callbacks,
    )


def make_state(index: int, *, source: StateSource, labelled: bool = True, version: int | None = None) -> States[Any]:
    """One state whose latent says its index."""
    step = index % GRID.num_steps
    x_t = np.full((1, 4, 4, 4), index, np.float32)
    columns = {
        "source": source,
        "timestep": GRID.student[step],
        "policy_version": NO_POLICY if version is None else version,
        "step_index": step,
        "trajectory_id": index,
        "guidance_scale": 2 + index % 7,
        "prompt": f"prompt {index % 5}",
    }
    return States.of({name: [value] for name, value in columns.items()}, x_t=x_t, label=-x_t if labelled else None)


def make_states(
    begin: int, end: int, *, source: StateSource, labelled: bool = True, version: int | None = None
) -> States[Any]:
    return States.join([make_state(i, source=source, labelled=labelled, version=version) for i in range(begin, end)])


def weights_of(network: torch.nn.Module) -> dict[str, float]:
    return {name: float(value) for name, value in network.state_dict().items()}
