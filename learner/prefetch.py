"""Batches drawn on a thread of their own while updates run, at most a few ahead; resumable as if there were none.

A batch source waits for replay, decodes, and copies to the device; a thread does that for the next batch while the
trainer is busy with this one. Each batch comes with the state that the source had after it, so that a checkpoint holds
the order of the batches that were trained on: those that were drawn ahead are drawn again.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Protocol

import torch
from torch import Tensor

from ddil_dist.states import States
from learner.batch_source import SourceTimes

LOOK_S = 0.5
"""How often either side looks whether the other is still there."""


class Source(Protocol):
    """What the trainer draws batches from."""

    times: SourceTimes

    def next(self, *, progress: float, on_wait: Callable[[], None] = ...) -> States[Tensor]: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


@dataclass
class _Drawn:
    """A batch, or the error that came instead; what the source was and took, and when a GPU's copies are done."""

    progress: float
    batch: States[Tensor] | None
    error: BaseException | None
    state: dict[str, Any]
    times: SourceTimes
    copied: torch.cuda.Event | None


class Prefetch:
    """A `Source` that keeps `depth` batches of another ready.

    updates: batches of the whole run; the one of `progress` is number progress * updates, and none is drawn past the
    last. The thread begins with the first `next`. `times` tells what of the source's waiting the trainer felt.
    """

    def __init__(
        self,
        source: Source,
        *,
        updates: int,
        depth: int,
        device: torch.device,
    ) -> None:
        assert depth > 0
        self._source = source
        self._updates = updates
        self._device = device
        self._ready: queue.Queue[_Drawn] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._consumed = source.state_dict()
        self.times = SourceTimes()

    def next(self, *, progress: float, on_wait: Callable[[], None] = lambda: None) -> States[Tensor]:
        """The next batch; raises what the source raised for it.

        on_wait: called every LOOK_S of waiting; what it raises is raised, and the batch is the next call's.
        """
        if self._thread is None:
            first = round(progress * self._updates)
            self._thread = threading.Thread(target=self._draw, args=(first,), name="prefetch", daemon=True)
            self._thread.start()
        begun = time.perf_counter()
        drawn = self._take(on_wait)
        self.times = _waiting_shares(drawn.times, time.perf_counter() - begun)
        if drawn.error is not None:
            raise drawn.error
        assert drawn.batch is not None
        assert drawn.progress == progress, "batches are drawn for the updates in their order"
        self._consumed = drawn.state
        if drawn.copied is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(drawn.copied)
            for tensor in _tensors(drawn.batch):
                tensor.record_stream(stream)
        return drawn.batch

    def state_dict(self) -> dict[str, Any]:
        """The source's, as it was after the batch that `next` returned last."""
        return self._consumed

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Only before the first `next`."""
        assert self._thread is None, "the thread is drawing"
        self._source.load_state_dict(state)
        self._consumed = self._source.state_dict()

    def close(self) -> None:
        """Let the thread end; it may be waiting for replay, and is not waited for longer than a moment."""
        self._stopped.set()
        if self._thread is not None:
            self._thread.join(timeout=LOOK_S)

    def _take(self, on_wait: Callable[[], None]) -> _Drawn:
        assert self._thread is not None
        while True:
            try:
                return self._ready.get(timeout=LOOK_S)
            except queue.Empty:
                on_wait()
                assert self._thread.is_alive() or not self._ready.empty(), "the thread has ended"

    def _draw(self, first: int) -> None:
        """The thread: batch after batch, until the last, an error, or `close`."""
        stream = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        for update in range(first, self._updates):
            drawn = self._draw_one(update / self._updates, stream)
            while not self._stopped.is_set():
                try:
                    self._ready.put(drawn, timeout=LOOK_S)
                    break
                except queue.Full:
                    continue
            if self._stopped.is_set() or drawn.error is not None:
                return

    def _draw_one(self, progress: float, stream: torch.cuda.Stream | None) -> _Drawn:
        try:
            with torch.cuda.stream(stream):  # None: the thread's own
                batch = self._source.next(progress=progress)
                copied = None if stream is None else stream.record_event()
        except BaseException as error:  # it is raised in the trainer's thread
            return _Drawn(progress, None, error, {}, SourceTimes(), None)
        return _Drawn(progress, batch, None, self._source.state_dict(), self._source.times, copied)


def _waiting_shares(taken: SourceTimes, waited_s: float) -> SourceTimes:
    """How `waited_s` seconds for a batch divide into waiting for replay and asking the expert, as its drawing did."""
    total_s = taken.wait_s + taken.label_s
    share = taken.wait_s / total_s if total_s > 0 else 1.0
    return SourceTimes(wait_s=waited_s * share, label_s=waited_s * (1 - share))


def _tensors(batch: States[Tensor]) -> list[Tensor]:
    """A batch's tensors on a GPU."""
    values = [getattr(batch, field.name) for field in fields(batch)]
    values += [getattr(batch.conditioning, field.name) for field in fields(batch.conditioning)]
    return [value for value in values if isinstance(value, Tensor) and value.is_cuda]
