"""Batches drawn ahead: the same ones in the same order, bounded, resumable at what was trained on, errors on time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from ddil_dist.errors import WaitTimeoutError
from ddil_dist.states import States
from learner.batch_source import SourceTimes
from learner.prefetch import LOOK_S, Prefetch, _waiting_shares
from learner.trainer import Trainer
from learner.update_record import UpdateRecord
from tests.learner.support import SeededSource, learner_config, make_trainer

UPDATES = 6
CPU = torch.device("cpu")


class Counting(SeededSource):
    """Says how many batches were drawn, and fails or waits where it is told to."""

    fails_at: int | None = None

    def next(self, *, progress: float, on_wait: Callable[[], None] = lambda: None) -> States[torch.Tensor]:
        if len(self.progress) == self.fails_at:
            raise WaitTimeoutError("a sample waited for inserts")
        return super().next(progress=progress)


@pytest.fixture
def opened() -> Iterator[list[Prefetch]]:
    found: list[Prefetch] = []
    yield found
    for prefetch in found:
        prefetch.close()


def prefetch_of(source: SeededSource, opened: list[Prefetch], *, depth: int = 1) -> Prefetch:
    opened.append(Prefetch(source, updates=UPDATES, depth=depth, device=CPU))
    return opened[-1]


def run(directory: Path, source: Any, *, stop_at: int | None = None) -> tuple[Trainer, list[UpdateRecord]]:
    records: list[UpdateRecord] = []
    trainer = make_trainer(directory, source=source, on_update=records.append, config=learner_config(updates=UPDATES))
    trainer.run(should_stop=lambda: trainer.update == stop_at)
    return trainer, records


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_a_run_with_batches_drawn_ahead_is_the_run_without_wherever_it_is_stopped(
    tmp_path: Path, opened: list[Prefetch], depth: int, stop_at: int
) -> None:
    whole, plain = run(tmp_path / "plain", SeededSource())
    _, before = run(tmp_path / "ahead", prefetch_of(SeededSource(), opened, depth=depth), stop_at=stop_at)
    other = SeededSource(seed=99)
    resumed, after = run(tmp_path / "ahead", prefetch_of(other, opened, depth=depth))
    assert [record.loss for record in (*before, *after)] == [record.loss for record in plain]
    assert resumed.final_weights() == whole.final_weights()
    assert other.progress == [update / UPDATES for update in range(stop_at, UPDATES)], "and none past the last"


@pytest.mark.parametrize("depth", [1, 2])
def test_only_so_many_batches_are_drawn_ahead(opened: list[Prefetch], depth: int) -> None:
    source = Counting()
    prefetch = prefetch_of(source, opened, depth=depth)
    prefetch.next(progress=0.0)
    deadline = time.monotonic() + 20
    while len(source.progress) < depth + 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    assert len(source.progress) == depth + 2, "the one that was taken, those ready, and the one in the thread's hands"


def test_an_error_comes_with_the_batch_that_it_is_about(opened: list[Prefetch]) -> None:
    source = Counting()
    source.fails_at = 2
    prefetch = prefetch_of(source, opened)
    prefetch.next(progress=0.0)
    prefetch.next(progress=1 / UPDATES)
    with pytest.raises(WaitTimeoutError, match="a sample waited for inserts"):
        prefetch.next(progress=2 / UPDATES)


def test_a_wait_that_is_given_up_loses_no_batch(opened: list[Prefetch]) -> None:
    class GivenUpError(Exception):
        pass

    def give_up() -> None:
        raise GivenUpError

    source, free = Counting(), threading.Event()

    def held_up(update: int, batch: States[torch.Tensor]) -> States[torch.Tensor]:
        assert free.wait(60)
        return batch

    source.spoil = held_up
    prefetch = prefetch_of(source, opened)
    with pytest.raises(GivenUpError):
        prefetch.next(progress=0.0, on_wait=give_up)
    free.set()
    assert torch.equal(prefetch.next(progress=0.0).x_t, SeededSource().next(progress=0.0).x_t)


def test_closing_ends_the_thread(opened: list[Prefetch]) -> None:
    prefetch = prefetch_of(Counting(), opened)
    prefetch.next(progress=0.0)
    prefetch.close()
    deadline = time.monotonic() + 20
    while any(thread.name == "prefetch" for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(LOOK_S / 10)
    assert not any(thread.name == "prefetch" for thread in threading.enumerate())


def test_waiting_is_told_by_its_cause() -> None:
    felt = _waiting_shares(SourceTimes(wait_s=3.0, label_s=1.0), 0.8)
    assert (felt.wait_s, felt.label_s) == pytest.approx((0.6, 0.2))
    assert _waiting_shares(SourceTimes(), 0.5) == SourceTimes(wait_s=0.5)
