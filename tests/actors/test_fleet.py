"""The fleet's manager with real Ray and Redis, and actors that fail in their own ways."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from actors import fleet
from actors.worker import FleetSpec, RolloutWorker, memory_explained
from ddil_dist.config import RedisConfig, RunConfig
from ddil_dist.control import RunControl
from ddil_dist.replay import EmbeddedServer
from tests.integration.support import wait_for

pytestmark = pytest.mark.integration


class Idle(RolloutWorker):
    """Rolls nothing out; ends when asked."""

    def __init__(self, spec: FleetSpec, **place: Any) -> None:
        super().__init__(spec, **place)
        self._control = RunControl.from_url(str(spec.config.redis.url), spec.config.run.name)

    def run(self) -> int:
        while not self._stop.wait(0.2):
            self._control.heartbeat(self._name, {"writer": self._writer, "pid": os.getpid(), "batch": self._halvings})
        return 0


class Greedy(Idle):
    """Has room for four rows; its allocator refuses more."""

    def run(self) -> int:
        with memory_explained(self._writer):
            if self._spec.config.rollout.batch_size >> self._halvings > 4:
                torch.empty(2**60, dtype=torch.uint8)
        return super().run()


class Broken(Idle):
    def run(self) -> int:
        raise ValueError("the device is on fire")


class Mute(Idle):
    """Its first life hangs."""

    def run(self) -> int:
        if self._writer.endswith(".1"):
            threading.Event().wait(100)
        return super().run()


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    import ray

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    with EmbeddedServer() as redis:
        yield redis.start(tmp_path_factory.mktemp("redis"))
    ray.shutdown()


@pytest.fixture
def start(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    started = []

    def make(worker: type[RolloutWorker], run: str, **rollout: Any) -> RunControl:
        monkeypatch.setattr(fleet, "RolloutWorker", worker)
        config = RunConfig.model_validate(
            {
                "run": {"name": run, "directory": str(tmp_path)},
                "rollout": {"num_cpus": 0, "batch_size": 16, **rollout},
                "redis": RedisConfig(url=server).model_dump(),
            }
        )
        control = RunControl.from_url(server, run)
        control.set_wanted_actors(1)
        started.append(fleet.FleetManager(FleetSpec(config=config, board=None)))
        return control

    yield make
    for manager in started:
        manager.drain()


def beat(control: RunControl) -> dict[str, Any]:
    return control.heartbeats().get("actor-0", {})


def test_an_actor_out_of_memory_comes_back_with_half_its_batch_until_it_fits(start: Any) -> None:
    control = start(Greedy, "greedy")
    wait_for(lambda: beat(control).get("writer") == "actor-0.3", timeout_s=150, what="it fits")
    assert beat(control)["batch"] == 2  # 16 rows, then 8, then 4
    assert control.fleet()["backing_off"] == 0


def test_an_actor_that_keeps_failing_is_reported_with_its_reason_and_backed_off(start: Any) -> None:
    control = start(Broken, "broken")
    wait_for(lambda: beat(control).get("deaths") == 3, timeout_s=150, what="it has died three times")
    assert "actor-0.3 died after" in beat(control)["failed"]
    assert "the device is on fire" in beat(control)["failed"]
    assert beat(control)["next_try_s"] == 4.0  # at once, after 2 s, after 4 s
    wait_for(lambda: control.fleet().get("backing_off") == 1, timeout_s=10, what="the fleet says so")
    assert control.next_incarnation("actor-0") == 4  # nobody was started while it is backed off


def test_an_actor_that_gives_no_sign_of_life_is_replaced(start: Any) -> None:
    control = start(Mute, "mute", silent_timeout_s=3.0)
    wait_for(lambda: beat(control).get("writer") == "actor-0.2", timeout_s=150, what="its successor beats")


def test_a_server_that_lost_its_data_gets_the_wanted_number_back(start: Any) -> None:
    control = start(Idle, "forgotten")
    wait_for(lambda: "pid" in beat(control), timeout_s=150, what="it beats")
    pid = beat(control)["pid"]
    control._redis.flushall()
    wait_for(lambda: control.wanted_actors() == 1 and "pid" in beat(control), timeout_s=100, what="it is known again")
    assert beat(control)["pid"] == pid


def test_surplus_actors_end_and_are_forgotten(start: Any) -> None:
    control = start(Idle, "surplus")
    control.set_wanted_actors(2)
    wait_for(lambda: len(control.heartbeats()) == 2, timeout_s=150, what="two beat")
    control.set_wanted_actors(0)
    wait_for(lambda: not control.heartbeats(), timeout_s=150, what="none is left")
    time.sleep(1)
    assert control.fleet() | {"pid": 0, "time": 0} == {
        "pid": 0,
        "time": 0,
        "wanted": 0,
        "running": 0,
        "stopping": 0,
        "waiting_for_a_place": 0,
        "lacking": "",
        "backing_off": 0,
    }
