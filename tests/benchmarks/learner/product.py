"""The learner as a run has it, update by update: live replay in Redis, publishing, journal, averages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddil_dist.config import RunConfig, load_config
from ddil_dist.problem import ImitationProblem
from ddil_dist.replay.buffer import ReplayBuffer
from ddil_dist.states import States
from ddil_dist.types import NO_POLICY, StateSource
from ddil_dist.weights import InMemoryWeightStore, WeightStore
from learner.assemble import create_accelerator, create_trainer
from learner.prefetch import Prefetch

UPDATES = 1_000_000


def config_of(directory: Path, *overrides: str) -> RunConfig:
    """The built-in run, with a limiter that holds nothing back: what is measured is the learner."""
    return load_config(
        None,
        [
            f"run.directory={directory}",
            f"learner.updates={UPDATES}",
            "learner.optimizer.warmup_updates=0",
            "replay.samples_per_insert=1e6",
            "replay.error_buffer=1e12",
            *overrides,
        ],
    )


def fill(replay: ReplayBuffer, problem: ImitationProblem, num: int) -> None:
    """Labelled states of all sources, of random latents."""
    generator = torch.Generator().manual_seed(0)
    draws = np.random.default_rng(0)
    prompts = problem.prompts()
    sources = (StateSource.FORWARD, StateSource.STUDENT, StateSource.TEACHER)
    made_by = [sources[index % 3] for index in range(num)]
    steps = [index % problem.grid.num_steps for index in range(num)]
    latents = [torch.randn(2, *problem.teacher.latent_shape, generator=generator).numpy() for _ in range(num)]
    columns: dict[str, Any] = {
        "source": made_by,
        "timestep": [problem.grid.student[step] for step in steps],
        "policy_version": [0 if source is StateSource.STUDENT else NO_POLICY for source in made_by],
        "step_index": steps,
        "guidance_scale": draws.uniform(1, 8, num),
        "prompt": [prompts[int(draws.integers(len(prompts)))] for _ in range(num)],
    }
    x_t, label = np.stack(latents, axis=1)
    for batch, states in enumerate(States.of(columns, x_t=x_t, label=label).split(64)):
        replay.insert(states, writer="benchmark", batch_id=batch, timeout_s=60)


class Product:
    """A trainer, stepped from outside."""

    def __init__(
        self, config: RunConfig, problem: ImitationProblem, replay: ReplayBuffer, weights: WeightStore | None = None
    ) -> None:
        self._publish_every = config.learner.publish_every
        self._trainer = create_trainer(
            config,
            problem,
            accelerator=create_accelerator(config, cpu=problem.device.type == "cpu"),
            replay=replay,
            weights=weights or InMemoryWeightStore(),
            on_publish=replay.note_weights,
        )
        self.waited_s = 0.0

    def update(self) -> None:
        """One update, published when one is due."""
        self._trainer._step()
        source = self._trainer._source
        if isinstance(source, Prefetch):  # else all that it does, it does in this thread
            self.waited_s += source.times.wait_s + source.times.label_s
        if self._trainer.update % self._publish_every == 0:
            self.publish()

    @property
    def rows(self) -> int:
        """Of a backward pass, as far as memory has let it."""
        return self._trainer._rows

    def publish(self) -> None:
        """Publish the student as it is."""
        self._trainer._publish()

    def close(self) -> None:
        """End its threads."""
        close = getattr(self._trainer._source, "close", lambda: None)
        close()


@contextmanager
def product(
    config: RunConfig, problem: ImitationProblem, replay: ReplayBuffer, weights: WeightStore | None = None
) -> Iterator[Product]:
    """A product that is closed at the end."""
    made = Product(config, problem, replay, weights)
    try:
        yield made
    finally:
        made.close()
