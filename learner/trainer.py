"""The training loop: batch, loss, update; publish, checkpoint and record on their schedules. No Ray, no Redis.

The same trainer runs inline and in every Ray Train worker; Accelerate brings precision, data parallelism and devices.
"""

from __future__ import annotations

import gc
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ddil_dist.config import LearnerConfig
from ddil_dist.journal import Journal
from ddil_dist.states import States
from ddil_dist.weights import published_names
from learner.checkpoint import CheckpointStore
from learner.checkpoint_writer import CheckpointWriter
from learner.compilation import compile_in_place
from learner.ema import Ema
from learner.memory import MemoryEstimate, estimate_memory
from learner.methods import STUDENT, Objective
from learner.phases import PhaseRunner, gathered
from learner.prefetch import Source
from learner.publisher import Publisher
from learner.roles import Role
from learner.training_state import Stateful, TrainingState
from learner.update_record import Recorder, Took, UpdateRecord

logger = logging.getLogger(__name__)


class _StopWaiting(Exception):  # noqa: N818
    """Ends the wait for a batch."""


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
    the shell tell people. `is_checkpoint_wanted` is asked after each update whether it wants a checkpoint that is not
    due.
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
        self._publisher = publisher
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
        self._rows = config.micro_batch_size or config.batch_size
        self._phases = PhaseRunner(
            self._objective,
            self._roles,
            rows=self._rows,
            accelerator=accelerator,
            checkpoints=checkpoints,
            journal=journal,
        )
        self._recorder = Recorder(total_updates=config.updates, timesteps=timesteps, accelerator=accelerator)
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
        steps = {
            phase.role: self._phases.run(phase, batch, update=self.update)
            for phase in self._objective.phases(self.update)
        }
        self._objective.after_update(self.update)
        if STUDENT in steps:
            self._average.update()
        self.update += 1
        done = time.perf_counter()
        times = self._source.times
        took = Took(times.wait_s + self._others_s, times.label_s, compute_s=done - ready, update_s=done - begun)
        record = self._recorder.record(self.update, batch, steps, took=took)
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
        wishes = gathered(self._accelerator, torch.tensor([[ready, stop, *wanted]]))
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
