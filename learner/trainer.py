"""The training loop: batch, loss, update; publish, checkpoint and record on their schedules. No Ray, no Redis.

The same trainer runs inline and in every Ray Train worker; Accelerate brings precision, data parallelism and devices.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from ddil_dist.config import LearnerConfig
from ddil_dist.errors import CheckpointError, DivergenceError
from ddil_dist.journal import Journal
from ddil_dist.types import StateSource, WeightsVersion
from ddil_dist.weights import WeightStore, pack
from learner.batch import TrainBatch
from learner.batch_source import BatchSource
from learner.checkpoint import CheckpointStore, load_state, load_weights, save_state
from learner.objectives import Objective, ObjectiveOutput
from learner.optimization import create_optimizer


@dataclass(frozen=True)
class UpdateRecord:
    """What one update did: the fields of an "update" journal line."""

    update: int
    total_updates: int
    loss: float
    grad_norm: float
    learning_rate: float
    loss_by_source: dict[str, float]
    loss_by_timestep: dict[str, float]
    sources: dict[str, int]
    policy_versions: dict[str, int]
    staleness_mean: float
    staleness_max: int
    wait_s: float
    label_s: float
    compute_s: float
    update_s: float


class Trainer:
    """Trains a student to `config.updates`, from its newest checkpoint if there is one.

    make_objective binds the loss to the prepared (perhaps data-parallel) network. Rank 0 publishes to `weights`,
    writes checkpoints and the journal; `on_publish` and `on_update` let the shell tell replay and people.
    """

    def __init__(
        self,
        config: LearnerConfig,
        *,
        accelerator: Accelerator,
        student: nn.Module,
        make_objective: Callable[[nn.Module], Objective],
        source: BatchSource,
        timesteps: tuple[int, ...],
        weights: WeightStore | None,
        checkpoints: CheckpointStore,
        journal: Journal | None,
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
        if config.gradient_checkpointing:
            student.enable_gradient_checkpointing()  # type: ignore[operator]
        student.train()
        optimizer, scheduler = create_optimizer(student.parameters(), config.optimizer, updates=config.updates)
        self._raw = student
        self._ema = AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(config.ema_decay))
        self._student, self._optimizer = accelerator.prepare(student, optimizer)
        self._scheduler = scheduler
        self._objective = make_objective(self._student)
        self.update = 0
        self._resume()

    def run(self, *, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end; True if it was reached, False if asked to stop before (a checkpoint is written)."""
        if self._weights is not None and self._weights.newest() is None:
            self._publish()
        while self.update < self._config.updates:
            self._step()
            if self.update % self._config.publish_every == 0 or self.update == self._config.updates:
                self._publish()
            stopping = should_stop()
            if stopping or self.update % self._config.checkpoint_every == 0 or self.update == self._config.updates:
                self._save()
            if stopping and self.update < self._config.updates:
                return False
        return True

    def final_weights(self) -> dict[str, Tensor]:
        """The state dict to export: the weight average, or the last weights where none is kept."""
        averaged = self._config.ema_decay > 0 and self.update > 0
        network = self._ema.module if averaged else self._raw
        return {name: tensor.detach().cpu().clone() for name, tensor in network.state_dict().items()}

    def _step(self) -> None:
        begun = time.perf_counter()
        batch = self._source.next(progress=self.update / self._config.updates)
        ready = time.perf_counter()
        learning_rate = float(self._scheduler.get_last_lr()[0])
        per_sample = self._backward(batch)
        norm = float(
            self._accelerator.clip_grad_norm_(self._student.parameters(), self._config.optimizer.max_grad_norm)
        )
        if not math.isfinite(norm) and self._accelerator.scaler is None:  # a scaler skips such an update by itself
            raise self._divergence(f"the gradient's norm is {norm}")
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._scheduler.step()
        self._ema.update_parameters(self._raw)
        self.update += 1
        done = time.perf_counter()
        record = self._record(batch, per_sample, norm, learning_rate, compute_s=done - ready, update_s=done - begun)
        if self._journal is not None:
            self._journal.write("update", **vars(record))
        self._on_update(record)

    def _backward(self, batch: TrainBatch) -> Tensor:
        """Accumulate the batch's gradient over its micro-batches; the loss of each sample, [B] on the CPU."""
        per_sample = []
        micro_batches = batch.split(self._config.micro_batch_size or len(batch))
        for index, micro in enumerate(micro_batches):
            last = index == len(micro_batches) - 1
            with self._accelerator.autocast():
                if last:
                    output = self._objective(micro)
                    self._backward_one(output, len(micro) / len(batch))
                else:
                    with self._accelerator.no_sync(self._student):
                        output = self._objective(micro)
                        self._backward_one(output, len(micro) / len(batch))
            per_sample.append(output.per_sample.cpu())
        losses = torch.cat(per_sample)
        if not torch.isfinite(losses).all():
            raise self._divergence(f"{int((~torch.isfinite(losses)).sum())} of {len(losses)} losses are not finite")
        return losses

    def _divergence(self, finding: str) -> DivergenceError:
        return DivergenceError(
            f"update {self.update}: {finding}; the last good checkpoint is {self._checkpoints.newest() or 'none'}: "
            "lower learner.optimizer.learning_rate, or set thresholding, and run again to resume"
        )

    def _backward_one(self, output: ObjectiveOutput, share: float) -> None:
        self._accelerator.backward(sum(output.losses.values()) * share)

    def _publish(self) -> None:
        if self._weights is None:
            return
        begun = time.perf_counter()
        packed = pack(self._raw.state_dict(), version=self.update, progress=self.update / self._config.updates)
        newest = self._weights.newest()
        if newest is not None and newest.version >= self.update:
            return  # a resumed learner has not yet passed what it published before it stopped
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

    def _save(self) -> None:
        staged = self._checkpoints.stage(self.update)
        accelerator = self._accelerator
        save_state(
            staged / f"worker_{accelerator.process_index}.pt",
            {"source": _encode_generator(self._source.state_dict()), "torch_rng": torch.get_rng_state()},
        )
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            save_file(_contiguous(self._raw.state_dict()), staged / "student.safetensors")
            save_file(_contiguous(self._ema.module.state_dict()), staged / "average.safetensors")
            save_state(
                staged / "optimizer.pt",
                {
                    "optimizer": self._optimizer.state_dict(),
                    "scheduler": self._scheduler.state_dict(),
                    "update": self.update,
                    "num_averaged": int(self._ema.n_averaged),
                },
            )
            self._checkpoints.commit(self.update)
        accelerator.wait_for_everyone()

    def _resume(self) -> None:
        path = self._checkpoints.newest()
        if path is None:
            return
        state = load_state(path / "optimizer.pt")
        if state["update"] > self._config.updates:
            raise CheckpointError(
                f"{path}: was written at update {state['update']}, past learner.updates={self._config.updates}; "
                "raise learner.updates, or choose another run.name"
            )
        load_weights(path / "student.safetensors", self._raw)
        load_weights(path / "average.safetensors", self._ema.module)
        self._ema.n_averaged.fill_(state["num_averaged"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._scheduler.load_state_dict(state["scheduler"])
        self.update = int(state["update"])
        worker = path / f"worker_{self._accelerator.process_index}.pt"
        if worker.is_file():  # a run resumed on more workers than it had: the new ones begin with fresh generators
            own = load_state(worker)
            self._source.load_state_dict(_decode_generator(own["source"]))
            torch.set_rng_state(own["torch_rng"])

    def _record(
        self, batch: TrainBatch, losses: Tensor, norm: float, learning_rate: float, *, compute_s: float, update_s: float
    ) -> UpdateRecord:
        timesteps = [self._timesteps[index] for index in batch.step_index.tolist()]
        sources = [StateSource(value).name for value in batch.source.tolist()]
        return UpdateRecord(
            update=self.update,
            total_updates=self._config.updates,
            loss=float(losses.mean()),
            grad_norm=norm if math.isfinite(norm) else 0.0,
            learning_rate=learning_rate,
            loss_by_source=_mean_by(sources, losses),
            loss_by_timestep=_mean_by([str(t) for t in timesteps], losses),
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


def _contiguous(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}


def _encode_generator(state: dict[str, Any]) -> dict[str, Any]:
    """NumPy's generator state holds 128-bit integers, which `weights_only` loading refuses; carry them as text."""
    bits = state["generator"]
    return {**state, "generator": {**bits, "state": {key: str(value) for key, value in bits["state"].items()}}}


def _decode_generator(state: dict[str, Any]) -> dict[str, Any]:
    bits = state["generator"]
    return {**state, "generator": {**bits, "state": {key: int(value) for key, value in bits["state"].items()}}}
