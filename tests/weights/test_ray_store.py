"""The cluster's store on real Ray: versions outlive their publisher, and a killed board comes back."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import ray
import torch

from ddil_dist.errors import WaitTimeoutError, WeightsError
from ddil_dist.on_ray import NAMESPACE
from ddil_dist.weights import PackedWeights, Packer, apply, pack, unpack
from ddil_dist.weights.ray_store import RayWeightStore, start_board

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def ray_address() -> Iterator[str]:
    """Ray with one CPU, which nothing here takes."""
    context = ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=200 << 20,
    )
    yield context.address_info["address"]
    ray.shutdown()


@pytest.fixture
def board(ray_address: str) -> Iterator[Any]:
    handle = start_board("mine", timeout_s=20)
    ray.get(handle.newest.remote(), timeout=60)
    yield handle
    ray.kill(handle)
    eventually(_gone)


def _gone() -> bool:
    try:
        ray.get_actor("ddil/mine/weights", namespace=NAMESPACE)
    except ValueError:
        return True
    return False


def eventually(condition: Callable[[], bool], *, within_s: float = 60) -> None:
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come true"
        time.sleep(0.05)


def packed(version: int, *, num: int = 300_000) -> PackedWeights:
    return pack({"w": torch.full((num,), float(version))}, version=version, progress=version / 100)


def kill_board(board: Any) -> int:
    """SIGKILL the board's process; its process id."""
    pid = ray.get(board.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    assert isinstance(pid, int)
    os.kill(pid, signal.SIGKILL)
    return pid


def test_versions_rise_and_the_newest_two_are_kept(board: Any) -> None:
    store = RayWeightStore(board)
    assert store.newest() is None
    for version in (0, 20, 40):
        store.publish(packed(version))
        assert store.newest() == packed(version).version
    for version in (20, 40):
        assert unpack(store.load(version))["w"].unique().tolist() == [float(version)]
    with pytest.raises(WeightsError, match="version 0 is not kept any more"):
        store.load(0)
    store.publish(packed(40))  # as after a reply that was lost
    for refused in (packed(39), replace(packed(40), version=replace(packed(40).version, digest="other"))):
        with pytest.raises(WeightsError, match=rf"version {refused.version.version} is not newer than 40"):
            store.publish(refused)
    assert store.newest() == packed(40).version


def test_a_loaded_version_is_read_only_and_is_not_its_publishers_memory(board: Any) -> None:
    store, packer = RayWeightStore(board), Packer()
    store.publish(packer.pack({"w": torch.ones(300_000)}, version=1, progress=0.0))
    loaded = store.load(1)
    store.publish(packer.pack({"w": torch.zeros(300_000)}, version=2, progress=0.0))
    assert not loaded.buffer.flags.writeable
    with pytest.raises(ValueError, match="read-only"):
        loaded.buffer[0] = 1
    network = torch.nn.ParameterDict({"w": torch.nn.Parameter(torch.full((300_000,), 7.0))})
    apply(loaded, network)
    assert network["w"].unique().tolist() == [1.0]


def test_a_version_outlives_its_killed_publisher(board: Any, ray_address: str) -> None:
    publisher = subprocess.Popen(
        [sys.executable, "-m", "tests.weights.ray_publisher", ray_address, "6"],
        cwd=Path(__file__).parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert publisher.stdout is not None
        assert publisher.stdout.readline().strip() == "published"
    finally:
        publisher.kill()
        publisher.communicate(timeout=30)
    time.sleep(2)  # the cluster finds that the process is gone, and frees what it owned
    store = RayWeightStore(board, timeout_s=20)
    newest = store.newest()
    assert newest is not None
    assert newest.version == 6
    assert unpack(store.load(6))["w"].unique().tolist() == [6.0]


def test_readers_of_a_killed_board_see_nothing_new_until_the_learner_publishes_again(board: Any) -> None:
    learner, reader = RayWeightStore(board), RayWeightStore(board)
    learner.publish(packed(20))
    applied = reader.load(20)
    pid = kill_board(board)
    eventually(lambda: reader.newest() is None)
    with pytest.raises(WeightsError, match="version 20"):
        reader.load(20)
    assert unpack(applied)["w"].unique().tolist() == [20.0], "what a reader holds is not taken from it"
    learner.publish(packed(20))
    assert reader.newest() == packed(20).version
    assert unpack(reader.load(20))["w"].unique().tolist() == [20.0]
    assert ray.get(board.__ray_call__.remote(lambda self: os.getpid()), timeout=60) != pid


def test_publishing_to_a_board_that_is_being_killed_arrives(board: Any) -> None:
    store = RayWeightStore(board)
    store.publish(packed(1))
    kill_board(board)
    store.publish(packed(2))
    assert store.newest() == packed(2).version
    assert unpack(store.load(2))["w"].unique().tolist() == [2.0]


def test_a_board_that_stays_away_is_named_at_the_deadline(ray_address: str) -> None:
    gone = start_board("gone")
    ray.get(gone.newest.remote(), timeout=60)
    ray.kill(gone)
    store = RayWeightStore(gone, timeout_s=1.0)
    begun = time.monotonic()
    with pytest.raises(WaitTimeoutError, match="publishing version 3 waited 1 s for the run's weight board"):
        store.publish(packed(3))
    assert time.monotonic() - begun < 30
    assert store.newest() is None


def test_a_board_that_hangs_is_named_at_the_deadline(board: Any) -> None:
    pid = ray.get(board.__ray_call__.remote(lambda self: os.getpid()), timeout=60)
    store = RayWeightStore(board, timeout_s=1.0)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(WaitTimeoutError, match="asking for the newest version waited 1 s"):
            store.newest()
    finally:
        os.kill(pid, signal.SIGCONT)
