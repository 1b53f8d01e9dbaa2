"""What one update did, as the journal has it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from ddil_dist.states import States
from ddil_dist.types import StateSource
from learner.methods import STUDENT
from learner.phases import Step, gathered


@dataclass(frozen=True)
class UpdateRecord:
    """What one update did: the fields of an "update" journal line.

    loss, grad_norm, learning_rate, loss_by_source and loss_by_timestep are the student's; where it did not step in
    this update, of its last step, or of the first phase if it has made none. losses and metrics are of every phase of
    this update, by role and by "role/name".
    """

    update: int
    total_updates: int
    loss: float
    grad_norm: float
    learning_rate: float
    loss_by_source: dict[str, float]
    loss_by_timestep: dict[str, float]
    losses: dict[str, float]
    metrics: dict[str, float]
    sources: dict[str, int]
    policy_versions: dict[str, int]
    staleness_mean: float
    staleness_max: int
    wait_s: float
    label_s: float
    compute_s: float
    update_s: float


@dataclass(frozen=True)
class Took:
    """Seconds of an update: waiting for states or for other workers, asking the expert, computing, and in all."""

    wait_s: float
    label_s: float
    compute_s: float
    update_s: float


class Recorder:
    """Makes the records of a run; the student's figures stand until its next step."""

    def __init__(self, *, total_updates: int, timesteps: tuple[int, ...], accelerator: Accelerator) -> None:
        self._total_updates = total_updates
        self._timesteps = timesteps
        self._accelerator = accelerator
        self._shown: dict[str, Any] = {}

    def record(self, update: int, batch: States[Tensor], steps: Mapping[str, Step], *, took: Took) -> UpdateRecord:
        """The line of an update that is done; `update` counts it."""
        kept = (batch.step_index, batch.source, batch.policy_version, batch.staleness)
        columns = gathered(self._accelerator, torch.stack([column.to(torch.int64) for column in kept], 1).cpu()).T
        indices, made_by, versions, staleness = columns.tolist()
        timesteps = [self._timesteps[index] for index in indices]
        sources = [StateSource(value).name for value in made_by]
        if STUDENT in steps or not self._shown:
            step = steps.get(STUDENT) or next(iter(steps.values()))
            self._shown = {
                "loss": step.loss,
                "grad_norm": step.grad_norm if math.isfinite(step.grad_norm) else 0.0,
                "learning_rate": step.learning_rate,
                "loss_by_source": _mean_by(sources, step.per_sample),
                "loss_by_timestep": _mean_by([str(t) for t in timesteps], step.per_sample),
            }
        return UpdateRecord(
            update=update,
            total_updates=self._total_updates,
            **self._shown,
            losses={role: step.loss for role, step in steps.items()},
            metrics={f"{role}/{name}": value for role, step in steps.items() for name, value in step.metrics.items()},
            sources=_count(sources),
            policy_versions=_count([str(version) for version in versions]),
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
            **vars(took),
        )


def _mean_by(keys: list[str], values: Tensor) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for key, value in zip(keys, values.tolist(), strict=True):
        groups.setdefault(key, []).append(value)
    return {key: sum(group) / len(group) for key, group in sorted(groups.items())}


def _count(keys: list[str]) -> dict[str, int]:
    return {key: keys.count(key) for key in sorted(set(keys))}
