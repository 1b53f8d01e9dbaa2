"""The training loop: batch, loss, update; publish, checkpoint and record on their schedules. No Ray, no Redis.

The same trainer runs inline and in every Ray Train worker; Accelerate brings precision, data parallelism and devices.
"""

from __future__ import annotations

import gc
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather
from torch import Tensor, nn

from ddil_dist.config import LearnerConfig
from ddil_dist.errors import DivergenceError, EnvironmentFailure
from ddil_dist.journal import Journal
from ddil_dist.states import States
from ddil_dist.types import StateSource
from ddil_dist.weights import published_names
from learner.checkpoint import CheckpointStore
from learner.checkpoint_writer import CheckpointWriter
from learner.compilation import compile_in_place
from learner.ema import Ema
from learner.memory import MemoryEstimate, estimate_memory
from learner.methods import STUDENT, Objective, ObjectiveOutput, Phase
from learner.prefetch import Source
from learner.publisher import Publisher
from learner.roles import Role, in_training
from learner.training_state import Stateful, TrainingState

CAREFUL_UPDATES = 2
"""Steps of every role and start: after the first its optimizer has its state, and the second finds out if it fits."""

LEAST_LOSS_SCALE = 2.0**-8
"""Of a float16 run: where gradients still overflow under it, they will under any."""

logger = logging.getLogger(__name__)


class _StopWaiting(Exception):  # noqa: N818
    """Ends the wait for a batch."""


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
    """What a phase did, over all workers. per_sample: [B] on the CPU, worker by worker."""

    loss: float
    per_sample: Tensor
    metrics: dict[str, float]
    grad_norm: float
    learning_rate: float


class Watcher(Protocol):
    """Called after every update, and closed when the trainer is done."""

    def __call__(self, record: UpdateRecord) -> None: ...

    def close(self) -> None: ...


class Judge(Protocol):
    """Measures students as they train, on rank 0."""

    def wants(self, update: int) -> bool: ...

    def judge(self, weights: Mapping[str, Tensor], *, update: int) -> None: ...


class Trainer:
    """Trains the networks of all roles to `config.updates`, from the newest checkpoint if there is one.

    networks        by role, "student" among them; each gets an optimizer and a learning rate of its own.
    make_objective  binds the losses to the prepared (perhaps data-parallel) networks.
    companions      what else is checkpointed with the run, by name, by rank 0.

    Rank 0 publishes the student by its `publisher`, has the one that would be exported measured by its `keeper`, writes
    checkpoints and the journal; `on_update` and `on_wait`, which is called now and then while a batch is awaited, let
    the shell tell people. `is_checkpoint_wanted` is asked
    after each update whether it wants a checkpoint that is not due.
    """

    def __init__(
        self,
        config: LearnerConfig,
        *,
        accelerator: Accelerator,
        networks: Mapping[str, nn.Module],
        make_objective: Callable[[Mapping[str, nn.Module]], Objective],
        source: Source,
        timesteps: tuple[int, ...],
        publisher: Publisher | None,
        checkpoints: CheckpointStore,
        writer: CheckpointWriter,
        journal: Journal | None,
        companions: Mapping[str, Stateful] = MappingProxyType({}),
        on_update: Callable[[UpdateRecord], None] = lambda record: None,
        on_wait: Callable[[], None] = lambda: None,
        is_checkpoint_wanted: Callable[[int], bool] = lambda update: False,
        watch: Watcher | None = None,
        keeper: Judge | None = None,
    ) -> None:
        self._watch = watch
        self._keeper = keeper
        self._on_wait = on_wait
        self._config = config
        self._accelerator = accelerator
        self._source = source
        self._timesteps = timesteps
        self._publisher = publisher
        self._checkpoints = checkpoints
        self._writer = writer
        self._journal = journal
        self._on_update = on_update
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
        self._average = Ema(self._student, config.ema_decay)
        self._objective = make_objective({name: role.network for name, role in self._roles.items()})
        self._shown: dict[str, Any] = {}
        self._rows = config.micro_batch_size or config.batch_size
        self._steps_made = dict.fromkeys(self._roles, 0)
        self._state = TrainingState(
            checkpoints,
            writer,
            accelerator=accelerator,
            roles=self._roles,
            average=self._average,
            objective=self._objective,
            source=source,
            companions=companions,
        )
        self.update = self._state.resume(updates=config.updates)
        self._saved = self.update if self.update else None  # or tried to
        self._is_checkpoint_wanted = is_checkpoint_wanted
        self._others_s = 0.0
        compile_in_place(
            *(role.raw for role in self._roles.values()), *self._objective.state.values(), mode=config.compile
        )

    def run(self, *, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """Train to the end; True if it was reached, False if asked to stop before (a checkpoint is written).

        One worker that is asked is enough; all stop after the same update, also where some are waiting for a batch.
        """
        with ExitStack() as stack:
            for part in (self._source, self._watch, self._publisher, self._writer):
                if part is not None:
                    stack.callback(part.close)
            if self._publisher is not None:
                self._publisher.start()
            stack.enter_context(frozen_heap())
            while self.update < self._config.updates:
                if not self._step(should_stop):
                    break
            else:
                self._listen(ready=True, stop=False, source=self._source.state_dict())
            self._writer.settle()
            return self.update == self._config.updates

    def estimate_memory(self, activations_a_row: int) -> MemoryEstimate:
        """What an update needs, journalled; activations_a_row: bytes that a row of the student's keeps."""
        estimate = estimate_memory(
            self._roles,
            self._objective.state.values(),
            averaged=self._config.ema_decay > 0,
            activations_a_row=activations_a_row,
            rows=min(self._rows, self._config.batch_size // self._accelerator.num_processes),
        )
        if self._journal is not None:
            self._journal.write("memory", **estimate.fields())
        return estimate

    def final_weights(self) -> dict[str, Tensor]:
        """The state dict to export: the weight average, or the last weights where none is kept."""
        return {name: tensor.detach().cpu().clone() for name, tensor in self._average.weights().items()}

    def _step(self, should_stop: Callable[[], bool] = lambda: False) -> bool:
        """One update, or a checkpoint where the workers are to stop instead; False then."""
        begun, source = time.perf_counter(), self._source.state_dict()
        batch = self._next_batch(should_stop, source)
        if batch is None:
            self._save(source)
            return False
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
        if self._watch is not None:
            self._watch(record)
        return True

    def _next_batch(self, should_stop: Callable[[], bool], source: Mapping[str, Any]) -> States[Tensor] | None:
        """The next batch, once every worker has its own; None where the workers are to stop.

        A worker that has its batch asks again and again whether the others have theirs, and one that waits answers now
        and then. So nobody is left behind in a collective operation for longer than that, however long states are not
        to be had, and all hear of a request to stop at the same point, and of what rank 0 wants to be done.
        """
        if self._accelerator.num_processes == 1 and self._listen(ready=True, stop=should_stop(), source=source)[1]:
            return None

        def on_wait() -> None:
            self._on_wait()
            if self._listen(ready=False, stop=should_stop(), source=source)[1]:
                raise _StopWaiting

        try:
            batch = self._source.next(progress=self.update / self._config.updates, on_wait=on_wait)
        except _StopWaiting:
            return None
        begun, stop = time.perf_counter(), False
        while self._accelerator.num_processes > 1 and not stop:
            all_ready, stop = self._listen(ready=True, stop=should_stop(), source=source)
            if all_ready:
                break
            self._on_wait()
        self._others_s = time.perf_counter() - begun
        return None if stop else batch

    def _listen(self, *, ready: bool, stop: bool, source: Mapping[str, Any]) -> tuple[bool, bool]:
        """Whether all workers are ready for the next update, and whether any wants to stop.

        What rank 0 wants of all of them between two updates is done before it returns: the student is published and
        measured, and a checkpoint is written, to draw on from this state of the source.
        """
        wanted = [self._wants_to_publish(), self._wants_to_measure(), self._wants_to_save()]
        wishes = self._gather(torch.tensor([[ready, stop, *wanted]]))
        if wishes[0, 2]:
            self._publish()
        if wishes[0, 3]:
            self._measure()
        if wishes[0, 4]:
            self._save(source)
        return bool(wishes[:, 0].all()), bool(wishes[:, 1].any())

    def _wants_to_publish(self) -> bool:
        last = self.update == self._config.updates
        due = last or self.update % self._config.publish_every == 0
        return self._publisher is not None and self._publisher.wants(self.update, due=due)

    def _wants_to_measure(self) -> bool:
        return self._keeper is not None and self._keeper.wants(self.update)

    def _wants_to_save(self) -> bool:
        """Whether a checkpoint is due; one that finds the writer busy is taken later."""
        if self.update == self._config.updates:
            return self._saved != self.update
        every = self._config.checkpoint_every
        due = self.update // every > (self._saved or 0) // every
        return (
            (due or self._is_checkpoint_wanted(self.update)) and self._saved != self.update and not self._writer.is_busy
        )

    def _save(self, source: Mapping[str, Any]) -> None:
        """Write a checkpoint after this update, unless there is one, to draw on from this state of the source."""
        if self._saved != self.update:
            self._state.save(self.update, source=source)
            self._saved = self.update

    def _phase(self, phase: Phase, batch: States[Tensor]) -> _Step:
        """One optimizer step of a role."""
        role = self._roles[phase.role]
        with in_training(self._roles, phase.role, self._accelerator):
            outputs = self._backward_within_memory(phase, batch)
        norm = role.clip()
        step = self._outcome(role, outputs, norm)
        self._check(role, step)
        role.step(self.update)
        self._steps_made[role.name] += 1
        return step

    def _backward_within_memory(self, phase: Phase, batch: States[Tensor]) -> list[tuple[ObjectiveOutput, float]]:
        """The phase's gradient; where the device's memory is too small for it, in smaller micro-batches from now on.

        Workers must halve theirs together, and none may wait in a collective operation for one that has failed. So
        in a role's first steps of a start each makes its gradient alone, all agree, and only then it is averaged. Later
        nothing new is allocated, and a worker among several that fails all the same ends the run.
        """
        role, accelerator = self._roles[phase.role], self._accelerator
        careful = self._steps_made[role.name] < CAREFUL_UPDATES
        apart = careful and accelerator.num_processes > 1 and not accelerator.is_fsdp2
        while True:
            outputs, problem = self._try_backward(phase, batch, synchronize=not apart)
            failed = problem is not None
            if apart:
                failed = bool(self._gather(torch.tensor([failed])).any())
            if not failed:
                break
            rows = min(self._rows, len(batch))
            if rows == 1 or (accelerator.num_processes > 1 and not apart):
                raise EnvironmentFailure(
                    f"update {self.update}: the device has too little memory for a backward pass of {rows} rows of "
                    f"the {role.name} ({problem}); set learner.micro_batch_size lower or "
                    "learner.gradient_checkpointing=true, and run again to resume"
                )
            self._rows = (rows + 1) // 2
            role.drop_gradient()
            self._objective.retry(self.update)
            gc.collect()  # what the failed attempt left lies in cycles
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            logger.warning(
                "update %d: out of memory with %d rows a backward pass of the %s; from now on %d rows, accumulated to "
                "the same batch of %d",
                *(self.update, rows, role.name, self._rows, len(batch)),
            )
            if self._journal is not None:
                self._journal.write("micro_batch", update=self.update, rows=self._rows)
        if apart:
            role.average_gradient()
        return outputs

    def _try_backward(
        self, phase: Phase, batch: States[Tensor], *, synchronize: bool
    ) -> tuple[list[tuple[ObjectiveOutput, float]], str | None]:
        """The phase's outputs, or why there was no memory for them; of a failed attempt nothing is kept alive."""
        alone = nullcontext() if synchronize else self._accelerator.no_sync(self._roles[phase.role].network)
        try:
            with alone:
                return self._backward(phase, batch), None
        except torch.OutOfMemoryError as error:
            return [], str(error).splitlines()[0]

    def _backward(self, phase: Phase, batch: States[Tensor]) -> list[tuple[ObjectiveOutput, float]]:
        """Accumulate a phase's gradient over the batch's micro-batches; what each gave, and its share of the batch.

        Mixed precision is the prepared networks' own: each casts inside its forward, and the rest of a loss, the
        teacher's answers and the data among it, keeps the precision that it has everywhere else.
        """
        role = self._roles[phase.role]
        outputs: list[tuple[ObjectiveOutput, float]] = []
        micro_batches = batch.split(self._rows)
        for number, micro in enumerate(micro_batches, start=1):
            last = number == len(micro_batches)
            share = len(micro) / len(batch)
            with nullcontext() if last else self._accelerator.no_sync(role.network):
                output = phase.loss(micro)
                self._accelerator.backward(output.loss * share)
            outputs.append((replace(output, loss=output.loss.detach()), share))
        return outputs

    def _outcome(self, role: Role, outputs: list[tuple[ObjectiveOutput, float]], norm: Tensor) -> _Step:
        """A phase's figures over all workers, in one transfer from the device."""
        device = self._accelerator.device
        names = list(outputs[0][0].metrics)
        shares = torch.tensor([share for _, share in outputs], device=device)

        def mean(values: Iterable[Tensor | float]) -> Tensor:
            columns = [torch.as_tensor(value, device=device).detach().float() for value in values]
            return (torch.stack(columns) * shares).sum()

        scalars = [mean(output.loss for output, _ in outputs)]
        scalars += [mean(output.metrics[name] for output, _ in outputs) for name in names]
        columns = [value.float().reshape(1) for value in (*scalars, norm)]
        losses = torch.cat([output.per_sample for output, _ in outputs]).float()
        rows = self._gather(torch.cat([*columns, losses])[None])
        loss, *metrics, norm = rows[:, : len(columns)].mean(0)
        return _Step(
            loss=float(loss),
            per_sample=rows[:, len(columns) :].flatten(),
            metrics={name: float(value) for name, value in zip(names, metrics, strict=True)},
            grad_norm=float(norm),
            learning_rate=role.learning_rate(self.update),
        )

    def _check(self, role: Role, step: _Step) -> None:
        """Raises DivergenceError, on all workers alike, before a step that would spoil the weights."""
        bad = int((~torch.isfinite(step.per_sample)).sum())
        if bad:
            raise self._divergence(f"{bad} of {len(step.per_sample)} losses of the {role.name} are not finite")
        if math.isfinite(step.grad_norm):
            return
        scaler = self._accelerator.scaler
        if scaler is None:
            raise self._divergence(f"the norm of the {role.name}'s gradient is {step.grad_norm}")
        if scaler.get_scale() < LEAST_LOSS_SCALE:  # else the scaler skips the step, and scales by less from now on
            raise self._divergence(
                f"the {role.name}'s gradient overflows though the loss is scaled by {scaler.get_scale():g} only"
            )

    def _gather(self, rows: Tensor) -> Tensor:
        """The rows of all workers, on the CPU; every worker has as many."""
        if self._accelerator.num_processes > 1:
            rows = gather(rows.to(self._accelerator.device))
        return rows.cpu()

    def _divergence(self, finding: str) -> DivergenceError:
        return DivergenceError(
            f"update {self.update}: {finding}; the last good checkpoint is {self._checkpoints.newest() or 'none'}: "
            "lower learner.optimizer.learning_rate, or set thresholding, and run again to resume"
        )

    def _publish(self) -> None:
        """Hand the student to the publisher; every worker takes part where they share the network among them."""
        state = self._student.weights()
        if self._publisher is not None:
            weights = {name: state[name] for name in self._published}
            self._publisher.offer(weights, update=self.update, progress=self.update / self._config.updates)

    def _measure(self) -> None:
        """Hand the student to the keeper as it would be exported; every worker takes part, as in `_publish`."""
        weights = self._average.weights()
        if self._keeper is not None:
            self._keeper.judge(weights, update=self.update)

    def _record(
        self, batch: States[Tensor], steps: Mapping[str, _Step], *, compute_s: float, update_s: float
    ) -> UpdateRecord:
        kept = (batch.step_index, batch.source, batch.policy_version, batch.staleness)
        columns = self._gather(torch.stack([column.cpu().to(torch.int64) for column in kept], 1)).T
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
            update=self.update,
            total_updates=self._config.updates,
            **self._shown,
            losses={role: step.loss for role, step in steps.items()},
            metrics={f"{role}/{name}": value for role, step in steps.items() for name, value in step.metrics.items()},
            sources=_count(sources),
            policy_versions=_count([str(version) for version in versions]),
            staleness_mean=sum(staleness) / len(staleness),
            staleness_max=max(staleness),
            wait_s=self._source.times.wait_s + self._others_s,
            label_s=self._source.times.label_s,
            compute_s=compute_s,
            update_s=update_s,
        )


@contextmanager
def frozen_heap() -> Iterator[None]:
    """Within the block the garbage collector passes over what was there before.

    Networks and libraries are millions of objects; looking through them takes longer than the rest of a small update.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _mean_by(keys: list[str], values: Tensor) -> dict[str, float]:
    groups: dict[str, list[float]] = {}
    for key, value in zip(keys, values.tolist(), strict=True):
        groups.setdefault(key, []).append(value)
    return {key: sum(group) / len(group) for key, group in sorted(groups.items())}


def _count(keys: list[str]) -> dict[str, int]:
    return {key: keys.count(key) for key in sorted(set(keys))}
