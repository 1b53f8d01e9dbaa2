"""The training loop: batch, loss, update; publish, checkpoint and record on their schedules. No Ray, no Redis.

The same trainer runs inline and in every Ray Train worker; Accelerate brings precision, data parallelism and devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_dist.config import LearnerConfig
from ddil_dist.errors import DivergenceError
from ddil_dist.journal import Journal
from ddil_dist.types import StateSource, WeightsVersion
from ddil_dist.weights import Packer, WeightStore, published_names
from learner.average import WeightAverage
from learner.batch import TrainBatch
from learner.batch_source import BatchSource
from learner.checkpoint import CheckpointStore
from learner.objectives import STUDENT, Objective, ObjectiveOutput, Phase
from learner.roles import Role, in_training
from learner.training_state import Stateful, TrainingState


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
class _Step:
    """What a phase did. per_sample: [B] on the CPU."""

    loss: float
    per_sample: Tensor
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float


class Trainer:
    """Trains the networks of all roles to `config.updates`, from the newest checkpoint if there is one.

    networks        by role, "student" among them; each gets an optimizer and a learning rate of its own.
    make_objective  binds the losses to the prepared (perhaps data-parallel) networks.
    companions      what else is checkpointed with the run, by name, by rank 0.

    Rank 0 publishes the student to `weights`, writes checkpoints and the journal; `on_publish` and `on_update` let the
    shell tell replay and people.
    """

    def __init__(
        self,
        config: LearnerConfig,
        *,
        accelerator: Accelerator,
        networks: Mapping[str, nn.Module],
        make_objective: Callable[[Mapping[str, nn.Module]], Objective],
        source: BatchSource,
        timesteps: tuple[int, ...],
        weights: WeightStore | None,
        checkpoints: CheckpointStore,
        journal: Journal | None,
        companions: Mapping[str, Stateful] = MappingProxyType({}),
        on_publish: Callable[[WeightsVersion], None] = lambda version: None,
        on_update: Callable[[UpdateRecord], None] = lambda record: None,
    ) -> None:
        self._config = config
        self._accelerator = accelerator
        self._source = source
        self._timesteps = timesteps
        self._weights = weights
        self._checkpoints = checkpoints
        self._journal = journal
        self._on_publish = on_publish
        self._on_update = on_update
        self._packer = Packer()
        self._published = published_names(networks[STUDENT])
        self._roles: dict[str, Role] = {}
        for name, network in networks.items():
            if config.gradient_checkpointing:
                network.enable_gradient_checkpointing()  # type: ignore[operator]
            network.train()
            self._roles[name] = Role(
                name, network, config.optimizer_of(name), accelerator=accelerator, updates=config.updates
            )
        self._student = self._roles[STUDENT]
        self._average = WeightAverage(self._student.raw, config.ema_decay)
        self._objective = make_objective({name: role.network for name, role in self._roles.items()})
        self._shown: dict[str, Any] = {}
        self._state = TrainingState(
            checkpoints,
            accelerator=accelerator,
            roles=self._roles,
            average=self._average,
            objective=self._objective,
            source=source,
            companions=companions,
        )
        self.update = self._state.resume(updates=config.updates)

    def run(self, *, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end; True if it was reached, False if asked to stop before (a checkpoint is written)."""
        if self._weights is None or self._weights.newest() is None:
            self._publish()
        while self.update < self._config.updates:
            self._step()
            if self.update % self._config.publish_every == 0 or self.update == self._config.updates:
                self._publish()
            stopping = should_stop()
            if stopping or self.update % self._config.checkpoint_every == 0 or self.update == self._config.updates:
                self._state.save(self.update)
            if stopping and self.update < self._config.updates:
                return False
        return True

    def final_weights(self) -> dict[str, Tensor]:
        """The state dict to export: the weight average, or the last weights where none is kept."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._average.weights().items()}

    def _step(self) -> None:
        begun = time.perf_counter()
        batch = self._source.next(progress=self.update / self._config.updates)
        ready = time.perf_counter()
        steps = {phase.role: self._phase(phase, batch) for phase in self._objective.phases(self.update)}
        self._objective.after_update(self.update)
        if STUDENT in steps:
            self._average.update()
        self.update += 1
        done = time.perf_counter()
        record = self._record(batch, steps, compute_s=done - ready, update_s=done - begun)
        if self._journal is not None:
            self._journal.write("update", **vars(record))
        self._on_update(record)

    def _phase(self, phase: Phase, batch: TrainBatch) -> _Step:
        """One optimizer step of a role."""
        role = self._roles[phase.role]
        with in_training(self._roles, phase.role, self._accelerator):
            step = self._backward(phase, batch)
        norm = role.clip()
        if not math.isfinite(norm) and self._accelerator.scaler is None:  # a scaler skips such an update by itself
            raise self._divergence(f"the norm of the {role.name}'s gradient is {norm}")
        role.step(self.update)
        return replace(step, grad_norm=norm if math.isfinite(norm) else 0.0)

    def _backward(self, phase: Phase, batch: TrainBatch) -> _Step:
        """Accumulate a phase's gradient over the batch's micro-batches."""
        role = self._roles[phase.role]
        outputs: list[tuple[ObjectiveOutput, float]] = []
        micro_batches = batch.split(self._config.micro_batch_size or len(batch))
        for number, micro in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            share = len(micro) / len(batch)
            with nullcontext() if last else self._accelerator.no_sync(role.network):
                with self._accelerator.autocast():
                    output = phase.loss(micro)
                self._accelerator.backward(output.loss * share)
            outputs.append((replace(output, loss=output.loss.detach()), share))
        per_sample = torch.cat([output.per_sample for output, _ in outputs]).float().cpu()
        if not torch.isfinite(per_sample).all():
            num = int((~torch.isfinite(per_sample)).sum())
            raise self._divergence(f"{num} of {len(per_sample)} losses of the {role.name} are not finite")
        return _Step(
            loss=sum(float(output.loss) * share for output, share in outputs),
            per_sample=per_sample,
            metrics={
                name: sum(float(output.metrics[name]) * share for output, share in outputs)
                for name in outputs[0][0].metrics
            },
            grad_norm=0.0,
            learning_rate=role.learning_rate(self.update),
        )

    def _divergence(self, finding: str) -> DivergenceError:
        return DivergenceError(
            f"update {self.update}: {finding}; the last good checkpoint is {self._checkpoints.newest() or 'none'}: "
            "lower learner.optimizer.learning_rate, or set thresholding, and run again to resume"
        )

    def _publish(self) -> None:
        begun = time.perf_counter()
        state = self._student.weights()  # every worker takes part where they share the network among them
        if self._weights is None:
            return
        newest = self._weights.newest()
        if newest is not None and newest.version >= self.update:
            return  # a resumed learner has not yet passed what it published before it stopped
        shipped = {name: state[name] for name in self._published}
        packed = self._packer.pack(shipped, version=self.update, progress=self.update / self._config.updates)
        self._weights.publish(packed)
        self._on_publish(packed.version)
        if self._journal is not None:
            version = packed.version
            self._journal.write(
                "publish",
                version=version.version,
                digest=version.digest,
                size_bytes=version.size_bytes,
                seconds=time.perf_counter() - begun,
            )

    def _record(
        self, batch: TrainBatch, steps: Mapping[str, _Step], *, compute_s: float, update_s: float
    ) -> UpdateRecord:
        timesteps = [self._timesteps[index] for index in batch.step_index.tolist()]
        sources = [StateSource(value).name for value in batch.source.tolist()]
        if STUDENT in steps or not self._shown:
            step = steps.get(STUDENT) or next(iter(steps.values()))
            self._shown = {
                "loss": step.loss,
                "grad_norm": step.grad_norm,
                "learning_rate": step.learning_rate,
                "loss_by_source": _mean_by(sources, step.per_sample),
                "loss_by_timestep": _mean_by([str(t) for t in timesteps], step.per_sample),
            }
        return UpdateRecord(
            update=self.update,
            total_updates=self._config.updates,
            **self._shown,
            losses={role: step.loss for role, step in steps.items()},
            metrics={f"{role}/{name}": value for role, step in steps.items() for name, value in step.metrics.items()},
            sources=_count(sources),
            policy_versions=_count([str(version) for version in batch.policy_version.tolist()]),
            staleness_mean=float(batch.staleness.float().mean()),
            staleness_max=int(batch.staleness.max()),
            wait_s=self._source.times.wait_s,
            label_s=self._source.times.label_s,
            compute_s=compute_s,
            update_s=update_s,
        )


def _mean_by(keys: list[str], values: Tensor) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for key, value in zip(keys, values.tolist(), strict=True):
        groups.setdefault(key, []).append(value)
    return {key: sum(group) / len(group) for key, group in sorted(groups.items())}


def _count(keys: list[str]) -> dict[str, int]:
    return {key: keys.count(key) for key in sorted(set(keys))}
