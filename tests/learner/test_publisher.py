"""Publishing beside the training: who wants a version, and what becomes of one that cannot be shipped."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch

from ddil_dist.errors import EnvironmentFailure, WaitTimeoutError, WeightsError
from ddil_dist.types import WeightsVersion
from ddil_dist.weights import InMemoryWeightStore, PackedWeights, unpack
from learner.publisher import Publisher
from tests.learner.support import learner_config, make_trainer, weights_of


class Store(InMemoryWeightStore):
    """A store that can be silent, full, slow, or lose what it holds."""

    def __init__(self) -> None:
        super().__init__()
        self.silent = self.full = False
        self.free = threading.Event()
        self.free.set()
        self.publishing = threading.Event()

    def newest(self) -> WeightsVersion | None:
        if self.silent:
            raise WaitTimeoutError("asking for the newest version waited 60 s for the run's weight board")
        return super().newest()

    def publish(self, packed: PackedWeights) -> None:
        self.publishing.set()
        assert self.free.wait(20)
        if self.silent:
            raise WaitTimeoutError("publishing waited 60 s for the run's weight board")
        if self.full:
            raise WeightsError("no room")
        super().publish(packed)

    def lose(self) -> None:
        self._versions.clear()


WEIGHTS = {"w": torch.tensor([1.0, 2.0 + 2**-12])}


@pytest.fixture
def store() -> Store:
    return Store()


def background(store: Store, **options: object) -> Publisher:
    """A publisher whose thread is the test: `tend` is what it would do."""
    made = Publisher(store, background=True, **options)  # type: ignore[arg-type]
    made.tend()
    return made


def test_versions_are_of_the_precision_that_actors_run(store: Store) -> None:
    publisher = Publisher(store, dtype="bfloat16")
    assert publisher.wants(0, due=True)
    publisher.offer(WEIGHTS, update=0, progress=0.0)
    newest = store.newest()
    assert newest is not None
    assert (newest.dtype, newest.size_bytes) == ("bfloat16", 4)
    assert unpack(store.load(0))["w"].tolist() == [1.0, 2.0]


def test_nothing_is_published_while_nobody_reads(store: Store) -> None:
    readers = [False]
    publisher = background(store, has_readers=lambda: readers[0])
    assert not publisher.wants(0, due=True)
    readers[0] = True
    publisher.tend()
    assert publisher.wants(7, due=False), "the first reader does not wait for the next that is due"


def test_whether_anybody_reads_is_not_forgotten_while_redis_is_away(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [False]

    def has_readers() -> bool:
        if not answers:
            raise EnvironmentFailure("Redis cannot be reached")
        return answers.pop()

    publisher = background(store, has_readers=has_readers)
    for _ in range(3):
        publisher.tend()
        assert not publisher.wants(0, due=True)
    assert len(caplog.records) == 1, "said once"


def test_a_version_is_wanted_where_one_is_due_and_newer(store: Store) -> None:
    publisher = background(store)
    publisher.offer(WEIGHTS, update=4, progress=0.0)
    assert not publisher.wants(6, due=True), "another is on its way"
    publisher.tend()
    assert [publisher.wants(update, due=due) for update, due in ((6, True), (6, False), (4, True), (2, True))] == [
        *(True, False, False, False)
    ]


def test_what_the_board_lost_is_published_again_also_by_a_learner_that_has_not_published_yet(store: Store) -> None:
    earlier = Publisher(store)
    earlier.offer(WEIGHTS, update=20, progress=0.0)
    resumed = background(store)
    assert not resumed.wants(10, due=False)
    store.lose()
    resumed.tend()
    assert resumed.wants(10, due=False)
    resumed.offer(WEIGHTS, update=10, progress=0.0)
    resumed.tend()
    assert store.newest() == resumed._newest
    assert not resumed.wants(10, due=False)


def test_a_silent_board_ends_nothing(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    publisher = background(store)
    store.silent = True
    publisher.offer(WEIGHTS, update=0, progress=0.0)
    for _ in range(3):
        publisher.tend()
        assert not publisher.wants(2, due=True)
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert told[0].startswith("a weights version could not be published: publishing waited 60 s")
    assert told[1].startswith("the weight store does not say what it holds: asking")
    store.silent = False
    publisher.tend()
    publisher._not_before = 0.0
    assert publisher.wants(3, due=False)


def test_a_full_store_is_not_tried_at_every_update(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    publisher = background(store)
    store.full = True
    publisher.offer(WEIGHTS, update=0, progress=0.0)
    publisher.tend()
    assert not publisher.wants(0, due=True), "a pause follows"
    assert "could not be published: no room" in caplog.text
    publisher._not_before = 0.0
    assert publisher.wants(1, due=False)


def test_a_version_that_cannot_be_made_known_is_told_of_later(store: Store, caplog: pytest.LogCaptureFixture) -> None:
    told: list[int] = []
    away = [True]

    def on_publish(version: WeightsVersion) -> None:
        if away[0]:
            raise WaitTimeoutError("changing settings waited 30 s for the replay server")
        told.append(version.version)

    publisher = background(store, on_publish=on_publish)
    publisher.offer(WEIGHTS, update=0, progress=0.0)
    for _ in range(3):
        publisher.tend()
    assert told == []
    away[0] = False
    publisher.tend()
    publisher.tend()
    assert told == [0]
    assert len(caplog.records) == 1


def test_training_does_not_wait_for_a_slow_store(tmp_path: Path, store: Store) -> None:
    store.free.clear()
    trainer = make_trainer(tmp_path, config=learner_config(publish_every=1))
    trainer._publisher = Publisher(store, background=True)
    done: list[bool] = []
    training = threading.Thread(target=lambda: done.append(trainer.run()))
    training.start()
    assert store.publishing.wait(20)
    deadline = time.monotonic() + 60
    while trainer.update < 6:
        assert time.monotonic() < deadline, "training waits for the store"
        time.sleep(0.01)
    store.free.set()
    training.join(60)
    assert done == [True]
    newest = store.newest()
    assert newest is not None
    assert newest.version == 0
    started = make_trainer(tmp_path / "fresh")
    assert {name: float(value) for name, value in unpack(store.load(0)).items()} == weights_of(started._student.raw)


def test_a_bug_in_the_thread_is_raised_in_training(store: Store) -> None:
    def broken() -> bool:
        raise ZeroDivisionError

    publisher = Publisher(store, background=True)
    publisher.start()
    publisher._has_readers = broken
    publisher._wake.set()
    assert publisher._thread is not None
    publisher._thread.join(20)
    with pytest.raises(ZeroDivisionError):
        publisher.wants(0, due=True)
    publisher.close()


def test_the_end_does_not_wait_for_ever(store: Store) -> None:
    store.free.clear()
    publisher = Publisher(store, background=True, close_s=0.05)
    publisher.start()
    publisher.offer(WEIGHTS, update=0, progress=0.0)
    assert store.publishing.wait(20)
    begun = time.monotonic()
    publisher.close()
    assert time.monotonic() - begun < 10
    store.free.set()


def test_the_end_does_not_wait_for_redis(store: Store) -> None:
    free, telling = threading.Event(), threading.Event()

    def on_publish(version: WeightsVersion) -> None:
        telling.set()
        assert free.wait(30)

    publisher = Publisher(store, on_publish=on_publish, background=True)
    publisher.start()
    publisher.offer(WEIGHTS, update=0, progress=0.0)
    assert telling.wait(20)
    publisher.close()  # returns though the thread is still telling
    assert not free.is_set()
    assert publisher._thread is not None
    assert publisher._thread.is_alive()
    free.set()
    publisher._thread.join(20)
